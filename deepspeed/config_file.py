"""DeepSpeed's JSON file, read strictly: what DeepSpeed would ignore, or answer with a traceback, is one line.

DeepSpeed ignores a key that it does not know at the top of a file and in some sections, takes "auto" for absent, and
keeps the last of two equal keys. Its own models (pydantic) check the sections that have one; tables check the others.
"""

import difflib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from environment import deepspeed

# isort: split
# after environment.py, which chooses the accelerator
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import ValidationError

from common.ranks import fail
from common.strict_files import read_json

assert deepspeed  # imported first, by environment.py

FILLED_IN = (  # from the settings, where the file says "auto"
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
)  # fmt: skip
COUNT, NUMBER, SWITCH, TEXT = "a whole number from 1 on", "a number", "true or false", "text"
FLOATS = ("fp32", "fp16", "bf16")
# What a file may have at its top, and as what. Left out is what this project decides elsewhere: models in parts, data.
TOP: dict[str, Any] = {
    "train_batch_size": COUNT, "train_micro_batch_size_per_gpu": COUNT, "gradient_accumulation_steps": COUNT,
    "gradient_clipping": NUMBER, "zero_allow_untested_optimizer": SWITCH, "zero_force_ds_cpu_optimizer": SWITCH,
    "gradient_allreduce_op": ("mean",), "prescale_gradients": (False,), "gradient_predivide_factor": (1,),
    "communication_data_type": FLOATS, "disable_allgather": SWITCH, "disable_python_gc": SWITCH, "dump_state": SWITCH,
    "log_level": ("debug", "info", "warning", "error", "critical"), "memory_breakdown": SWITCH,
    "steps_per_print": COUNT, "wall_clock_breakdown": SWITCH,
}  # fmt: skip
TABLES: dict[str, dict[str, Any]] = {  # sections for which DeepSpeed has no model
    "activation_checkpointing": {
        "partition_activations": SWITCH, "contiguous_memory_optimization": SWITCH, "cpu_checkpointing": SWITCH,
        "number_checkpoints": COUNT, "synchronize_checkpoint_boundary": SWITCH, "profile": SWITCH,
    },
    "aio": {
        "block_size": COUNT, "queue_depth": COUNT, "intra_op_parallelism": COUNT, "single_submit": SWITCH,
        "overlap_events": SWITCH, "use_gds": SWITCH,
    },
    "checkpoint": {
        "tag_validation": ("Ignore", "Warn", "Fail"), "load_universal": SWITCH, "use_node_local_storage": SWITCH,
    },
    "data_types": {"grad_accum_dtype": FLOATS},
    "flops_profiler": {
        "enabled": SWITCH, "recompute_fwd_factor": NUMBER, "profile_step": COUNT, "module_depth": NUMBER,
        "top_modules": COUNT, "detailed": SWITCH, "output_file": TEXT,
    },
}  # fmt: skip
MODELS: dict[str, Any] = {
    "zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config,
    "tensorboard": TensorBoardConfig, "wandb": WandbConfig, "csv_monitor": CSVConfig, "comet": CometConfig,
    "comms_logger": CommsLoggerConfig, "compile": CompileConfig, "timers": None,
}  # fmt: skip
# Other ways to train: a file may have them switched off.
OFF = ("autotuning", "curriculum_learning", "data_efficiency", "elasticity", "pipeline")
OFFLOAD = {"optimizer": DeepSpeedZeroOffloadOptimizerConfig, "param": DeepSpeedZeroOffloadParamConfig}
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
# These train something else than the settings say, or than the other lessons do: they stay at DeepSpeed's default.
ELSEWHERE = {
    "zenflow", "zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients",
    "compute_grad_norm",
}  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    """Read a file of DeepSpeed's settings, and add the sections that all runs need.

    Raises:
        SystemExit: (exit code 2) the file is missing, or has what DeepSpeed does not take or would ignore.
    """
    if not path.is_file():
        fail(f"deepspeed_config {path}: No such file; expected a JSON file such as deepspeed/configs/zero2.json")
    try:
        settings = read_json(path)
    except ValueError as error:
        fail(f"deepspeed_config {error}")
    if not isinstance(settings, dict):
        fail(f"deepspeed_config {path} holds a {type(settings).__name__}; expected an object with DeepSpeed's settings")
    sections = TABLES.keys() | MODELS.keys()
    for key, value in settings.items():
        if key in ("optimizer", "scheduler"):
            fail(f"{path}: {key} is set by optimizer.* here; take it out of the file")
        if key in OFF and value not in ({}, {"enabled": False}):
            fail(f'{path}: {key} = {json.dumps(value)} takes no part here; expected {{"enabled": false}}')
        if key not in TOP.keys() | sections | set(OFF):
            _unknown(path, key, TOP.keys() | sections)
        if key in sections and not isinstance(value, dict):
            fail(f"{path}: {key} = {json.dumps(value)}; expected an object")
    _refuse_text(path, settings, "")
    for key, value in settings.items():
        if key in TOP:
            _check(path, key, value, TOP[key])
        for name, inner in value.items() if key in TABLES else ():
            if name not in TABLES[key]:
                _unknown(path, f"{key}.{name}", TABLES[key].keys())
            _check(path, f"{key}.{name}", inner, TABLES[key][name])
    zero = settings.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        fail(f"{path}: zero_optimization.stage = {stage!r}; allowed: 0, 1, 2, 3")
    for name in ("bf16", "fp16"):
        settings.setdefault(name, {})
    for name in [name for name in MODELS if name in settings]:
        _check_section(path, name, settings[name])
    _check_offload(path, zero)
    return settings


def off_load(settings: dict[str, Any], what: str) -> str:
    """Where "optimizer" or "param" go by the file: cpu, nvme, or none."""
    return (settings.get("zero_optimization", {}).get(f"offload_{what}") or {}).get("device", "none")


def _check(path: Path, key: str, value: Any, allowed: Any) -> None:
    """End with one line unless a value is one of those allowed, or of the kind that is."""
    if value == "auto" and key in FILLED_IN:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(allowed, tuple):  # DeepSpeed takes "Mean" and "MEAN" for "mean"
        plain = value.lower() if isinstance(value, str) else value
        right = plain in [one.lower() if isinstance(one, str) else one for one in allowed]
        right = right and isinstance(value, bool) == isinstance(allowed[0], bool)
        allowed = ", ".join(map(json.dumps, allowed))
    else:
        right = {
            COUNT: number and float(value).is_integer() and value >= 1, NUMBER: number,
            SWITCH: isinstance(value, bool), TEXT: isinstance(value, str | None),
        }[allowed]  # fmt: skip
    if not right:
        fail(f"{path}: {key} = {json.dumps(value)}; expected {allowed}")


def _refuse_text(path: Path, tree: dict[str, Any], prefix: str) -> None:
    """End with one line about a number, or true or false, that stands in quotes: DeepSpeed takes some as text."""
    for name, value in tree.items():
        if isinstance(value, dict):
            _refuse_text(path, value, f"{prefix}{name}.")
        elif isinstance(value, str) and prefix.partition(".")[0] not in PACKAGES.keys() | {"csv_monitor"}:
            try:
                plain = json.loads(value.strip().lower())
            except ValueError:
                continue
            if not isinstance(plain, list | dict | str):
                words = f"is text; write {json.dumps(plain)}, without quotes"
                fail(f"{path}: {prefix}{name} = {json.dumps(value)} {words}")


def _check_section(path: Path, name: str, section: dict[str, Any]) -> None:
    """Let DeepSpeed's own model check a section, and refuse old names, which other parts of it do not look at."""
    if name == "timers":
        for key in section.keys() - {"throughput"}:
            _unknown(path, f"timers.{key}", {"throughput"})
        model, section, name = DeepSpeedThroughputTimerConfig, section.get("throughput", {}), "timers.throughput"
        if not isinstance(section, dict):
            fail(f"{path}: {name} = {json.dumps(section)}; expected an object")
    else:
        model = MODELS[name]
    for key, field in model.model_fields.items():
        about = field.json_schema_extra or {}
        if key in section and about.get("deprecated"):
            fail(f"{path}: {name}.{key} is an old name; write {about.get('new_param') or 'the new one'} in its place")
    try:
        model(**section)
    except ValidationError as error:
        wrong = error.errors()[0]
        location = ".".join([name, *map(str, wrong["loc"])])
        if wrong["type"] == "extra_forbidden":
            _unknown(path, location, _names_of(model, *(OFFLOAD.values() if name == "zero_optimization" else ())))
        fail(f"{path}: {location}: {wrong['msg']}")
    except (TypeError, ValueError, AssertionError) as error:
        fail(f"{path}: {name}: {error}")
    if section.get("enabled") is True and name in PACKAGES and find_spec(PACKAGES[name]) is None:
        fail(f"{path}: {name}.enabled = true needs the package {PACKAGES[name]}; pip install it, or write false")


def _check_offload(path: Path, zero: dict[str, Any]) -> None:
    """Refuse what would be offloaded nowhere, and what trains something else than the other lessons."""
    for key in sorted(ELSEWHERE & zero.keys()):
        if zero[key] not in (None, DeepSpeedZeroConfig.model_fields[key].default):
            found = f"{path}: zero_optimization.{key} = {json.dumps(zero[key])}"
            fail(f"{found} changes what is trained, or hides its norm; take it out of the file")
    for what, least in (("optimizer", 1), ("param", 3)):
        section, key = zero.get(f"offload_{what}"), f"zero_optimization.offload_{what}"
        if section is None:
            continue
        device = section.get("device")
        if device not in ("none", "cpu", "nvme"):
            fail(f"{path}: {key}.device = {json.dumps(device)} offloads nothing; expected cpu, nvme or none")
        if device != "none" and zero["stage"] < least:
            stages = "stage 3" if least == 3 else "stages 1, 2 and 3"
            fail(f"{path}: {key}.device = {device} has no effect at stage {zero['stage']}; expected {stages}, or none")
        if device == "nvme" and zero["stage"] < 3:
            fail(f"{path}: {key}.device = nvme at stage {zero['stage']}; DeepSpeed has it at stage 3 alone: use cpu")


def _unknown(path: Path, key: str, known: Any) -> NoReturn:
    """End with one line about a key that DeepSpeed does not have there."""
    near = difflib.get_close_matches(key.rpartition(".")[2], list(known), 1)
    hint = f"; did you mean {near[0]}?" if near else "; take it out of the file"
    fail(f"{path}: unknown key {key}{hint}")


def _names_of(*models: Any) -> set[str]:
    """The keys of some of DeepSpeed's sections; those of stage 3 have a second name, stage3_…"""
    fields = [item for model in models for item in model.model_fields.items()]
    return {name for name, _ in fields} | {field.alias for _, field in fields if field.alias}
