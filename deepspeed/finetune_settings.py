"""Fine-tuning with the Trainer of `transformers`: its settings, the model, and the checkpoints that Trainer writes."""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.config import RunConfig, TrainConfig
from common.manifest import checksum
from common.question_answering import QuestionsConfig, require
from common.ranks import Ranks, fail

MANIFEST = "complete.json"


@dataclass
class FinetuneTrain(TrainConfig):
    """How long to train, in which arithmetic, and what to look at on the way."""

    steps: int = 300
    """Optimizer steps of the whole training, whatever the world size."""
    check_replicas_every: int = 0
    """Only 0: Trainer and DeepSpeed keep the replicas, and this script does not look."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile or self.precision == "fp64" or self.check_replicas_every:
            raise ValueError(
                f"train.compile = {self.compile}, train.precision = {self.precision} and train.check_replicas_every = "
                f"{self.check_replicas_every} with Trainer: expected false, one of fp32, bf16, fp16, and 0"
            )


@dataclass
class FinetuneConfig(RunConfig):
    """The settings of this script."""

    train: FinetuneTrain = field(default_factory=FinetuneTrain)
    data: QuestionsConfig = field(default_factory=QuestionsConfig)
    model_path: str | None = None
    """A local folder in the Hugging Face format, with safetensors; by default a tiny Llama with random weights."""
    export: bool = True
    """Write the model to exported/ in the run folder when all steps are done."""
    deepspeed_config: str | None = None
    """A JSON file in DeepSpeed's own format; without one Trainer uses DDP, which is the baseline."""
    nvme_path: str = ""
    """Where parameters and optimizer state go if the file says nvme; default: the variable TMPDIR, else /tmp."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume not in ("auto", "never"):
            raise ValueError(
                f"resume = {self.resume}: Trainer's checkpoints are not those of the other scripts; give the run_name "
                f"of the run to go on with, and resume = auto"
            )


# ------------------------------------------------------------------------------------------------------- the model


def draw_model(config: FinetuneConfig, shape: Any) -> nn.Module:
    """A causal language model with random weights in fp32. Call it before Trainer's arguments exist: see `read_model`.

    In parts, its random numbers would come in another order, and stage 3 would start elsewhere than the others.
    """
    torch.manual_seed(config.seed)
    return require("transformers").AutoModelForCausalLM.from_config(shape, dtype=torch.float32)


def read_model(config: FinetuneConfig, shape: Any) -> nn.Module:
    """The causal language model of a folder in fp32.

    If the `TrainingArguments` made before say stage 3, `transformers` cuts each parameter up as soon as it is made,
    and gives the ranks their parts: no rank holds the whole model.
    """
    try:
        model, report = require("transformers").AutoModelForCausalLM.from_pretrained(
            config.model_path, config=shape, dtype=torch.float32, local_files_only=True, use_safetensors=True,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # whatever a damaged file makes the library raise
        fail(f"model_path = {config.model_path}: the weights cannot be used ({error}); fetch the files again")
    if absent := sorted(report["missing_keys"]):  # transformers would go on with random values
        fail(f"model_path = {config.model_path}: {', '.join(absent[:3])} missing ({len(absent)} in all)")
    return model


# ----------------------------------------------------------------------------------------------------- checkpoints


def must_match(config: FinetuneConfig) -> dict[str, Any]:
    """What a training has to go on with: otherwise it would be neither the old one nor a new one."""
    data = {f"data.{name}": value for name, value in asdict(config.data).items()}
    return {"seed": config.seed, "batch.global_size": config.batch.global_size, "model_path": config.model_path} | data


def commit(folder: Path, step: int, strategy: str, config: FinetuneConfig, ranks: Ranks) -> None:
    """When all ranks have written their parts of a checkpoint: the list of its files, then older ones are removed.

    Trainer itself takes the checkpoint with the highest number, also one that was never finished.
    """
    ranks.barrier()
    if ranks.is_main:
        files = {str(path.relative_to(folder)): checksum(path) for path in folder.rglob("*") if path.is_file()}
        manifest = {"step": step, "world_size": ranks.world_size, "strategy": strategy}
        manifest |= {"settings": must_match(config), "files": files}
        (folder / "unfinished").write_text(json.dumps(manifest, indent=1))
        os.replace(folder / "unfinished", folder / MANIFEST)
        for old in committed(folder.parent)[: -config.checkpoint.keep]:
            shutil.rmtree(old)
    ranks.barrier()


def committed(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, by step."""
    found = [manifest.parent for manifest in folder.glob(f"checkpoint-*/{MANIFEST}")]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def last_checkpoint(folder: Path, strategy: str, config: FinetuneConfig, ranks: Ranks) -> tuple[Path | None, int]:
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
    return path, step


def check(path: Path, strategy: str, config: FinetuneConfig, world_size: int) -> tuple[Path, int, str | None]:
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
    # DeepSpeed's parts are pickles, which may run code when they are read: only files that this run wrote.
    for name, entry in manifest["files"].items():
        if not (path / name).is_file() or checksum(path / name) != entry:
            return path, 0, f"{path / name} is missing or changed since it was written; remove {path} to go on without"
    return path, manifest["step"], None
