"""DeepSpeed's settings: which of its JSON files, how "auto" is filled in there, and what a rank holds by them."""

import atexit
import json
import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from config_file import off_load, read
from environment import deepspeed
from nvme import nvme_problem
from torch.nn.utils import clip_grad_norm_

from common.config import Config
from common.config_fields import PathText
from common.data_sharding import BatchPlan
from common.ranks import Ranks, fail


@dataclass
class DeepSpeedConfig(Config):
    """The common settings, and where DeepSpeed's are."""

    deepspeed_config: PathText = "deepspeed/configs/zero2.json"
    """A JSON file in DeepSpeed's own format. What is "auto" in it, or absent, is filled in from the settings here."""
    nvme_path: PathText = ""
    """Where parameters and optimizer state go if the file says nvme; default: the variable TMPDIR, else /tmp."""


def start_deepspeed(ranks: Ranks) -> None:
    """Call it right after `join`: DeepSpeed takes this rank's device, and the process group that is there."""
    export_local_rank(ranks)
    deepspeed.init_distributed(verbose=False)


def export_local_rank(ranks: Ranks) -> None:
    """Tell DeepSpeed this rank's device: it takes LOCAL_RANK for the number of the GPU, also where a task sees its own
    GPU alone, and ends with a KeyError where plain python has set none."""
    device, chosen = ranks.device.type, deepspeed.accelerator.get_accelerator().device_name()
    if chosen != device:
        fail(f"device = {device}, but DeepSpeed chose {chosen} when it was imported; export DEVICE={device} "
             f"DS_ACCELERATOR={device}")  # fmt: skip
    os.environ["LOCAL_RANK"] = str(ranks.device.index if device == "cuda" else ranks.local_rank)


def engine_config(config: DeepSpeedConfig, plan: BatchPlan, ranks: Ranks) -> dict[str, Any]:
    """DeepSpeed's settings, complete: the file's, with all filled in that is "auto" there, or absent.

    The batch comes from the plan alone. DeepSpeed asks for it three times (train_batch_size = micro-batch ×
    accumulation × ranks), and an error in one of them trains something else than the run folder says. So would its
    defaults for what is absent: no accumulation, fp32, clipping at 1.

    Raises:
        SystemExit: (exit code 2) the file is missing, is no JSON object, has what DeepSpeed does not take, or
            contradicts the settings; the precision cannot be had; offload to NVMe, and what that needs is missing.
    """
    path, precision = Path(config.deepspeed_config), config.train.precision
    settings = read(path)
    zero = settings["zero_optimization"]
    if precision == "fp64":
        fail("train.precision = fp64: DeepSpeed reduces no gradients in fp64, and ZeRO keeps weights in fp32; use fp32")
    if precision != "fp32" and not zero["stage"]:
        advice = "use deepspeed/configs/zero1.json, or fp32"
        fail(f"train.precision = {precision} with {path}: without ZeRO DeepSpeed has another optimizer there; {advice}")
    if precision == "fp16" and ranks.device.type == "cpu":
        fail("train.precision = fp16: DeepSpeed has no fp16 on the CPU; use bf16 or fp32 there")
    on_disk = [what for what in ("optimizer", "param") if off_load(settings, what) == "nvme"]
    if on_disk and (reason := nvme_problem(ranks)):
        fail(f"{path}: {reason}")
    from_here = {
        "train_batch_size": plan.batch.global_size,
        "train_micro_batch_size_per_gpu": plan.micro_size,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": config.optimizer.clip,
        "bf16.enabled": precision == "bf16",
        "fp16.enabled": precision == "fp16",
    }
    for key, value in from_here.items():
        section, _, name = key.rpartition(".")
        found = settings[section] if section else settings
        if found.setdefault(name, "auto") == "auto":
            found[name] = value
        elif found[name] != value:
            shown = json.dumps(found[name]), json.dumps(value)
            fail(f'{path}: {key} = {shown[0]}, but the settings give {shown[1]}; write "auto" there, and set it here')
    settings.setdefault("zero_allow_untested_optimizer", True)  # torch's SGD is one
    for what in on_disk:
        section = zero[f"offload_{what}"]
        given = section.get("nvme_path", "auto")
        section["nvme_path"] = str(open_swap_folder(config.nvme_path if given == "auto" else given, ranks))
    return settings


def cpu_adam_if_offloaded(optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimizer as it is; or DeepSpeed's own for the CPU, if its state is offloaded and the file insists on it.

    DeepSpeed insists unless the file says `"zero_force_ds_cpu_optimizer": false`. Its AdamW is compiled at first use.
    """
    if off_load(settings, "optimizer") == "none" or not settings.get("zero_force_ds_cpu_optimizer", True):
        return optimizer
    if not isinstance(optimizer, torch.optim.AdamW):
        fail('zero_force_ds_cpu_optimizer: DeepSpeed has AdamW alone for the CPU; set optimizer.name to adamw, or '
             '"zero_force_ds_cpu_optimizer": false in the file')  # fmt: skip
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    DeepSpeedCPUAdam.__name__ = "AdamW"  # a checkpoint is known by it: either goes on with the other's averages
    options = {name: optimizer.defaults[name] for name in ("lr", "betas", "eps")}
    return DeepSpeedCPUAdam(optimizer.param_groups, **options, adamw_mode=True)


def open_swap_folder(parent: str, ranks: Ranks) -> Path:
    """A new folder for what goes to NVMe, of the same name on every node, and gone when the rank has ended.

    DeepSpeed removes what it finds under the names that it writes, which are the same in every job.

    Args:
        parent: a folder on a disk of the node, never a shared one; by default the variable TMPDIR, else /tmp.
    """
    parent = parent or os.environ.get("TMPDIR") or tempfile.gettempdir()
    folder = Path(parent, f"zero_swap_{ranks.broadcast(secrets.token_hex(4))}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"nvme_path {parent}: {error.strerror}; choose a folder on a disk of this node")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def record_grad_norm(engine: Any) -> None:
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
    gradients += [flat.grad for flat in partitions(zero)]  # with offload: in host memory
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
