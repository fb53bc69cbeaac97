"""Fine-tuning with the Trainer of `transformers`: its settings, the model, and the checkpoints that Trainer writes."""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoint_files import refuse_foreign_pickles
from settings import export_local_rank
from torch import nn

from common.config_fields import PathText
from common.ranks import Ranks, fail
from common.runs.manifest import checksum
from common.runs.records import write_whole
from finetuning.config import FinetuneConfig, FinetuneTrain
from finetuning.models import random_model, read_model, require

MANIFEST = "complete.json"


@dataclass
class TrainerTrain(FinetuneTrain):
    """How long to train, in which arithmetic, and what to look at on the way."""

    check_replicas_every: int = 0
    """Only 0: Trainer and DeepSpeed keep the replicas, and this script does not look."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision == "fp64" or self.check_replicas_every:
            raise ValueError(
                f"train.precision = {self.precision} and train.check_replicas_every = {self.check_replicas_every} with "
                f"Trainer: expected one of fp32, bf16, fp16, and 0"
            )


@dataclass
class TrainerConfig(FinetuneConfig):
    """The settings of this script."""

    train: TrainerTrain = field(default_factory=TrainerTrain)
    deepspeed_config: PathText | None = None
    """A JSON file in DeepSpeed's own format; without one Trainer uses DDP, which is the baseline."""
    nvme_path: PathText = ""
    """Where parameters and optimizer state go if the file says nvme; default: the variable TMPDIR, else /tmp."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume not in ("auto", "never"):
            raise ValueError(
                f"resume = {self.resume}: Trainer's checkpoints are not those of the other scripts; give the run_name "
                f"of the run to go on with, and resume = auto"
            )


# ----------------------------------------------------------------------------------------------------- model, ranks


def draw_model(config: TrainerConfig, hf_config: Any) -> nn.Module:
    """Make a causal language model with random weights. Call it before Trainer's arguments exist: see `load_model`.

    In stage 3 the random numbers would come in another order, and training would start from other weights.
    """
    torch.manual_seed(config.seed)
    return random_model(hf_config)


def load_model(config: TrainerConfig, hf_config: Any) -> nn.Module:
    """Read the causal language model of `model_path`.

    If the `TrainingArguments` made before say stage 3, `transformers` cuts each parameter up as soon as it is made,
    and gives the ranks their parts: no rank holds the whole model.
    """
    try:
        return read_model(str(config.model_path), hf_config)
    except Exception as error:  # whatever a damaged file makes the library raise
        fail(f"model_path = {config.model_path}: the weights cannot be used ({error}); fetch the files again")


def tell_accelerate(ranks: Ranks, with_deepspeed: bool) -> None:
    """Tell accelerate, which Trainer runs on, this rank's device, and that the ranks work with DeepSpeed.

    Accelerate takes the local rank for the number of the GPU, also where a task sees only its own GPU. It looks for
    GPUs to know whether there are other processes: with DeepSpeed on the CPU it assumes, without a message, that there
    are none. Then losses are multiplied, and tokens counted, for one rank.
    """
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(ranks.device)
    if ranks.world_size > 1 or with_deepspeed:
        export_local_rank(ranks)
    if with_deepspeed:
        for name, value in {"RANK": ranks.rank, "WORLD_SIZE": ranks.world_size}.items():
            os.environ.setdefault(name, str(value))  # under plain python there are none
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        require("accelerate").PartialState(backend="nccl" if ranks.device.type == "cuda" else "gloo")


# ----------------------------------------------------------------------------------------------------- checkpoints


def must_match(config: TrainerConfig) -> dict[str, Any]:
    """What a training has to go on with: otherwise it would be neither the old one nor a new one."""
    # Trainer's checkpoint brings the optimizer's settings along, and the learning rate: others would have no effect.
    sections = {"data": asdict(config.data), "optimizer": asdict(config.optimizer)}
    inside = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    settings = {"seed": config.seed, "batch.global_size": config.batch.global_size, "model_path": config.model_path}
    return json.loads(json.dumps(settings | inside))  # as they come back from the file: no tuples


def commit(folder: Path, step: int, strategy: str, config: TrainerConfig, ranks: Ranks) -> None:
    """When all ranks have written their parts of a checkpoint: the list of its files, then older ones are removed.

    Trainer itself takes the checkpoint with the highest number, also one that was never finished.
    """
    ranks.barrier()
    if ranks.is_main:
        files = {str(path.relative_to(folder)): checksum(path) for path in folder.rglob("*") if path.is_file()}
        manifest = {"step": step, "world_size": ranks.world_size, "strategy": strategy}
        manifest |= {"settings": must_match(config), "files": files}
        write_whole(folder / MANIFEST, json.dumps(manifest, indent=1))
        for old in committed(folder.parent)[: -config.checkpoint.keep]:
            shutil.rmtree(old)
    ranks.barrier()


def committed(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, by step; copies that the user has named otherwise do not count."""
    found = [manifest.parent for manifest in folder.glob(f"checkpoint-*/{MANIFEST}")]
    ours = [path for path in found if re.fullmatch(r"checkpoint-[0-9]+", path.name) and not path.is_symlink()]
    return sorted(ours, key=lambda path: int(path.name.rpartition("-")[2]))


def last_checkpoint(folder: Path, strategy: str, config: TrainerConfig, ranks: Ranks) -> tuple[Path | None, int]:
    """The checkpoint to go on from and its step, or (None, 0); the same on all ranks.

    Raises:
        SystemExit: (exit code 2) a file of it changed, or it is of other data, or of another world size or strategy:
            each rank of ZeRO has written its own part of the optimizer, and there is no way to cut it up otherwise.
    """
    answer: tuple[Path | None, int, str | None] = (None, 0, None)
    if ranks.is_main and (found := committed(folder)):
        answer = check(found[-1], strategy, config, ranks.world_size)
    path, step, problem = ranks.broadcast(answer)
    if problem:
        fail(problem)
    if path and strategy.startswith("zero"):  # the list may be anyone's, and DeepSpeed's parts are pickles
        refuse_foreign_pickles(path)
    return path, step


def check(path: Path, strategy: str, config: TrainerConfig, world_size: int) -> tuple[Path, int, str | None]:
    """A checkpoint, its step, and what is wrong with it."""
    manifest = json.loads((path / MANIFEST).read_text())
    made, now = (manifest["strategy"], manifest["world_size"]), (strategy, world_size)
    if made != now:
        problem = (
            f"{path} was made with {made[0]} on {made[1]} ranks, this is {now[0]} on {now[1]}: Trainer cannot read it; "
            f"go on as it was made, or start a new run_name from its export"
        )
        return path, 0, problem
    before = manifest.get("settings", {})
    for name, value in must_match(config).items():
        if before.get(name) != value:
            problem = (
                f"{path} was made with {name} = {before.get(name)}, this run has {value}; go on as it was made, or "
                f"choose another run_name"
            )
            return path, 0, problem
    for name, entry in manifest["files"].items():
        if not (path / name).is_file() or checksum(path / name) != entry:
            return path, 0, f"{path / name} is missing or changed since it was written; remove {path} to go on without"
    found = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    if others := sorted(found - manifest["files"].keys() - {MANIFEST}):
        return path, 0, f"{path / others[0]} is not among the files of {MANIFEST}; remove it, or {path}"
    return path, manifest["step"], None
