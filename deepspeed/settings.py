"""DeepSpeed's settings: which of its JSON files, how "auto" is filled in there, and what a rank holds by them."""

import difflib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from environment import deepspeed
from nvme import why_not_nvme
from torch.nn.utils import clip_grad_norm_

from common.config import Config
from common.data_sharding import BatchPlan
from common.ranks import Ranks, fail


@dataclass
class DeepSpeedConfig(Config):
    """The common settings, and where DeepSpeed's are."""

    deepspeed_config: str = "deepspeed/configs/zero2.json"
    """A JSON file in DeepSpeed's own format. What is "auto" in it is filled in from the settings here."""
    nvme_path: str = ""
    """Where parameters and optimizer state go if the file says nvme; default: the variable TMPDIR, else /tmp."""


def engine_config(config: DeepSpeedConfig, plan: BatchPlan, ranks: Ranks) -> dict[str, Any]:
    """DeepSpeed's settings, complete: the file's, with every "auto" filled in.

    The batch comes from the plan alone. DeepSpeed asks for it three times (train_batch_size = micro-batch ×
    accumulation × ranks), and an error in one of them trains something else than the run folder says.

    Raises:
        SystemExit: (exit code 2) the file is missing, is no JSON object, has a key that DeepSpeed does not know, or
            contradicts the settings; the precision cannot be had; off-load to NVMe, and what that needs is missing.
    """
    take_place(ranks)
    path, precision = Path(config.deepspeed_config), config.train.precision
    settings = read(path)
    if precision == "fp64":
        fail("train.precision = fp64: DeepSpeed reduces no gradients in fp64, and ZeRO keeps weights in fp32; use fp32")
    if precision != "fp32" and not settings.get("zero_optimization", {}).get("stage"):
        advice = "use deepspeed/configs/zero1.json, or fp32"
        fail(f"train.precision = {precision} with {path}: without ZeRO DeepSpeed has another optimizer there; {advice}")
    if precision == "fp16" and ranks.device.type == "cpu":
        fail("train.precision = fp16: DeepSpeed has no fp16 on the CPU; use bf16 or fp32 there")
    if "nvme" in (off_load(settings, "optimizer"), off_load(settings, "param")) and (reason := why_not_nvme(ranks)):
        fail(f"{path}: {reason}")
    from_here = {
        "train_batch_size": plan.batch.global_size,
        "train_micro_batch_size_per_gpu": plan.micro_size,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": config.optimizer.clip,
        "bf16.enabled": precision == "bf16",
        "fp16.enabled": precision == "fp16",
        "zero_optimization.offload_optimizer.nvme_path": nvme_folder(config),
        "zero_optimization.offload_param.nvme_path": nvme_folder(config),
    }
    for key, value in from_here.items():
        *sections, name = key.split(".")
        section = settings
        for each in sections:
            section = section.get(each, {})
        if section.get(name) == "auto":
            section[name] = value
        elif name in section and section[name] != value and name != "nvme_path":
            fail(f'{path}: {key} = {section[name]}, but the settings give {value}; write "auto" there, and set it here')
    return settings


def take_place(ranks: Ranks) -> None:
    """Tell DeepSpeed this rank's device: it takes LOCAL_RANK for the number of the GPU, also where a task sees its own
    GPU alone, and ends with a KeyError where plain python has set none."""
    index = ranks.device.index if ranks.device.type == "cuda" else ranks.local_rank
    os.environ["LOCAL_RANK"] = str(index)


def read(path: Path) -> dict[str, Any]:
    """A file of DeepSpeed's settings. DeepSpeed ignores keys that it does not know; here they are errors."""
    try:
        settings = json.loads(path.read_text())
    except OSError as error:
        fail(f"deepspeed_config {path}: {error.strerror}; expected a JSON file such as deepspeed/configs/zero2.json")
    except ValueError as error:
        fail(f"deepspeed_config {path} is not valid JSON: {error}")
    if not isinstance(settings, dict):
        fail(f"deepspeed_config {path} holds a {type(settings).__name__}; expected an object with DeepSpeed's settings")
    fields = deepspeed.runtime.zero.config.DeepSpeedZeroConfig.model_fields
    zero = set(fields) | {field.alias for field in fields.values() if field.alias}  # stage3_… are such
    sections = {"": (settings, known_keys()), "zero_optimization.": (settings.get("zero_optimization", {}), zero)}
    for prefix, (found, known) in sections.items():
        if not isinstance(found, dict):
            fail(f"{path}: {prefix.rstrip('.')} = {found!r}; expected an object")
        for key in sorted(set(found) - known):
            near = difflib.get_close_matches(key, known, 1)
            fail(f"{path}: unknown key {prefix}{key}{f'; did you mean {near[0]}?' if near else ''}")
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        fail(f"{path}: zero_optimization.stage = {stage!r}; allowed: 0, 1, 2, 3")
    return settings


def known_keys() -> set[str]:
    """The names that DeepSpeed's settings have at the top, from the constants in its sources."""
    modules = deepspeed.runtime.constants, deepspeed.runtime.zero.config
    values = [value for module in modules for name, value in vars(module).items() if name.isupper()]
    return {value for value in values if isinstance(value, str) and value.isidentifier()}


def off_load(settings: dict[str, Any], what: str) -> str:
    """Where "optimizer" or "param" go by the file: cpu, nvme, or none."""
    return (settings.get("zero_optimization", {}).get(f"offload_{what}") or {}).get("device", "none")


def or_compiled(optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimizer as it is; or DeepSpeed's own for the CPU, if its state is off-loaded and the file insists on it.

    DeepSpeed insists unless the file says `"zero_force_ds_cpu_optimizer": false`. Its AdamW is compiled at first use.
    """
    if off_load(settings, "optimizer") == "none" or not settings.get("zero_force_ds_cpu_optimizer", True):
        return optimizer
    if not isinstance(optimizer, torch.optim.AdamW):
        fail('zero_force_ds_cpu_optimizer: DeepSpeed has AdamW alone for the CPU; set optimizer.name to adamw, or '
             '"zero_force_ds_cpu_optimizer": false in the file')  # fmt: skip
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    options = {name: optimizer.defaults[name] for name in ("lr", "betas", "eps")}
    return DeepSpeedCPUAdam(optimizer.param_groups, **options, adamw_mode=True)


def nvme_folder(config: DeepSpeedConfig) -> str:
    """Where off-load to NVMe writes; a disk of the node, never a shared one."""
    return config.nvme_path or os.environ.get("TMPDIR") or tempfile.gettempdir()


def keep_norm(engine: Any) -> None:
    """Make stage 0 remember the gradient norm: in fp32 it clips, and forgets what the norm was."""

    def clip() -> None:
        engine._global_grad_norm = clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping())

    engine.clip_fp32_gradients = clip


def state_bytes(engine: Any) -> dict[str, int]:
    """Bytes that this rank keeps, counted on the tensors themselves. Call it between backward and step.

    Returns:
        weights (what the model computes with), gradients, master (the fp32 copy that the optimizer updates; none in
        stage 0 without mixed precision) and moments (the optimizer's averages).
    """
    zero, parameters = engine.optimizer, list(engine.module.parameters())
    gradients = [p.grad for p in parameters]
    if not hasattr(zero, "optimizer"):  # a plain torch optimizer over the model's own parameters
        return _in_bytes(weights=parameters, gradients=gradients, master=[], moments=_moments(zero))
    # In stage 3 a part, and those that are whole at this moment: small ones always, unless the file says otherwise.
    weights = parameters + [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
    for kept in ("averaged_gradients", "all_grad_tensors"):  # before and between the last micro-batches
        gradients += list(getattr(zero, kept, {}).values())
    gradients += [flat.grad for flat in partitions(zero)]  # with off-load: in host memory
    return _in_bytes(weights=weights, gradients=gradients, master=partitions(zero), moments=_moments(zero.optimizer))


def partitions(zero: Any) -> list[torch.Tensor]:
    """The flat fp32 vectors that the torch optimizer updates: this rank's part of the model."""
    kinds = "fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"
    return next(getattr(zero, kind) for kind in kinds if hasattr(zero, kind))


def describe(engine: Any) -> str:
    """One line: the stage, and how many bytes of what this rank keeps."""
    kept = ", ".join(f"{count:,} of {kind}" for kind, count in state_bytes(engine).items())
    return f"ZeRO stage {engine.zero_optimization_stage()}: this rank keeps {kept} (bytes)"


def _moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    entries = [value for state in optimizer.state.values() for value in state.values()]
    return [value for value in entries if isinstance(value, torch.Tensor) and value.ndim]


def _in_bytes(**kinds: Any) -> dict[str, int]:
    def tensors(found: Any) -> list[torch.Tensor]:
        return [found] if isinstance(found, torch.Tensor) else [t for each in found or [] for t in tensors(each)]

    return {kind: sum(tensor.nbytes for tensor in tensors(found)) for kind, found in kinds.items()}
