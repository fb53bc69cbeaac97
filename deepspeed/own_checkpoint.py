"""DeepSpeed's own checkpoints: every rank writes its shard, and any number of ranks can go on from the universal form.

    torchrun --nproc-per-node=2 deepspeed/own_checkpoint.py save --output runs/zero --stage 3       # three steps
    python deepspeed/convert_checkpoint.py universal runs/zero                                      # for any ranks
    torchrun --nproc-per-node=3 deepspeed/own_checkpoint.py resume runs/zero                        # three steps more

`save` trains and calls `engine.save_checkpoint`: each rank writes the flat partitions that it owns. Both commands print
a fingerprint of the fp32 weights, as those of convert_checkpoint.py do; it stays the same from `save` to `resume`.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from checkpoint_files import fingerprint, newest, refuse_foreign_pickles
from environment import deepspeed

# isort: split
# after environment.py, which chooses the accelerator
from deepspeed.checkpoint.constants import (
    UNIVERSAL_CHECKPOINT_INFO,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)
from deepspeed.utils import safe_get_full_fp32_param
from settings import start_deepspeed
from torch.distributed.elastic.multiprocessing.errors import record

from common.config import parse, runs_dir, to_dict
from common.config_fields import PathText, to_path
from common.data import TextConfig, text_datasets
from common.data_sharding import BatchConfig, BatchPlan, Loader
from common.optimizer import OptimizerConfig, build_optimizer
from common.ranks import Ranks, fail, join
from common.runs import records
from common.transformer import ModelConfig, Transformer, initial_weight


@dataclass
class SaveConfig:
    output: PathText | None = None
    """The run folder to write; by default a new one under runs, or under the variable RUNS_DIR."""
    stage: Literal[1, 2, 3] = 3
    """ZeRO's stage. (Stage 0 has no shards.)"""
    steps: int = 3
    """Optimizer steps before the checkpoint is written."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What the model computes in; the weights in the checkpoint are fp32 either way."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    data: TextConfig = field(default_factory=TextConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    seed: int = 1234
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps = {self.steps} cannot work; allowed: at least 1")


@record
def save(config: SaveConfig) -> None:
    """Train a few steps and write DeepSpeed's own checkpoint: every rank its shard."""
    ranks = join(config.device)
    start_deepspeed(ranks)
    folder = open_folder(config, ranks)
    engine, loader = build(config, ranks, universal=False)
    for step in range(config.steps):
        ranks.print(f"step {step + 1}: loss {train_step(engine, loader, step, config, ranks):.6f}")
    # Stages 1 and 2 can become a universal checkpoint only if whoever saves says that it may; stage 3 always can.
    info = {UNIVERSAL_CHECKPOINT_INFO: {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}}
    start = time.perf_counter()
    engine.save_checkpoint(str(folder / "checkpoints"), tag=f"global_step{config.steps}", client_state=info)
    seconds = max(ranks.all_gather(time.perf_counter() - start))
    weights = fingerprint(gathered(engine))
    if ranks.is_main:
        for path in sorted((folder / "checkpoints" / f"global_step{config.steps}").iterdir()):
            print(f"{path.stat().st_size:>12,} bytes  {path}")
    ranks.print(f"saved by {ranks.world_size} ranks, stage {config.stage}, in {seconds:.3f} s: weights {weights}")
    ranks.leave()


@record
def resume(run_folder: Path, steps: int) -> None:
    """Load the universal checkpoint on any number of ranks, and train on."""
    config = settings_of(run_folder)
    tag = newest(run_folder)
    source = run_folder / "checkpoints" / f"{tag}_universal"
    if not (source / "zero").is_dir():
        script = "python deepspeed/convert_checkpoint.py"
        fail(f"{source}/zero does not exist; expected a universal checkpoint; make it: {script} universal {run_folder}")
    refuse_foreign_pickles(source)
    ranks = join(config.device)
    start_deepspeed(ranks)
    engine, loader = build(config, ranks, universal=True)
    load_universal(engine, source)
    ranks.print(f"{source}: loaded by {ranks.world_size} ranks, weights {fingerprint(gathered(engine))}")
    for step in range(engine.global_steps, engine.global_steps + steps):
        ranks.print(f"step {step + 1}: loss {train_step(engine, loader, step, config, ranks):.6f}")
    ranks.leave()


def load_universal(engine: Any, source: Path) -> None:
    """Weights, averages and step counters of a universal checkpoint into an engine of any number of ranks.

    In stage 3 DeepSpeed 0.19 loads all values rightly and then makes two mistakes that no message tells of: every group
    of the optimizer gets the options of the first one (norms would decay as matrices do), and all of them share one
    step counter (each step would count once a group). Both are mended here; without it the losses come out otherwise.
    """
    optimizer = engine.optimizer.optimizer
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    level = deepspeed.utils.logger.level
    deepspeed.utils.logger.setLevel("ERROR")  # it warns that there is no tensor parallelism
    engine.load_checkpoint(str(source.parent), tag=source.name)
    deepspeed.utils.logger.setLevel(level)
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)
    for entries in optimizer.state.values():
        if isinstance(entries.get("step"), torch.Tensor):
            entries["step"] = entries["step"].clone()


def build(config: SaveConfig, ranks: Ranks, universal: bool) -> tuple[Any, Loader]:
    """The engine and the data as deepspeed/train.py makes them."""
    train_set, _ = text_datasets(config.data, config.model.vocabulary)
    plan = BatchPlan(config.batch, len(train_set), config.seed, ranks.rank, ranks.world_size)
    settings = {
        "train_batch_size": plan.batch.global_size,
        "train_micro_batch_size_per_gpu": plan.micro_size,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": config.optimizer.clip,
        "bf16": {"enabled": config.precision == "bf16"},
        # A torch optimizer, which DeepSpeed does not know, and no extension to compile.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # By default stage 3 leaves parameters of up to 100,000 elements whole: all of a small model.
        "zero_optimization": {"stage": config.stage, "stage3_param_persistence_threshold": 0},
        "checkpoint": {"load_universal": universal},
    }
    with deepspeed.zero.Init(config_dict_or_path=settings, enabled=config.stage == 3):
        model = Transformer(config.model)
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if parameter.numel():
                parameter.copy_(initial_weight(name, parameter.shape, config.model, config.seed))
    optimizer = build_optimizer(model.parameters(), config.optimizer, ranks.device)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine, Loader(train_set, plan, ranks.device)


def train_step(engine: Any, loader: Loader, step: int, config: SaveConfig, ranks: Ranks) -> float:
    """One optimizer step on the global batch of this step; returns its mean loss per token."""
    tokens_per_step = config.batch.global_size * config.data.sequence_length
    loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for (tokens, targets), _ in loader.micro_batches(step):
        micro_loss_sum = engine(tokens, targets)
        # DeepSpeed averages over the ranks where the global batch wants the sum.
        engine.backward(micro_loss_sum * ranks.world_size / tokens_per_step, scale_wrt_gas=False)
        engine.step()
        loss_sum += micro_loss_sum.detach()
    dist.all_reduce(loss_sum)
    return loss_sum.item() / tokens_per_step


def gathered(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and whole fp32 weights of an engine, one after the other. All ranks must go through all of them."""
    for name, parameter in sorted(engine.module.named_parameters()):
        yield name, safe_get_full_fp32_param(parameter)


def open_folder(config: SaveConfig, ranks: Ranks) -> Path:
    """Make a run folder with the settings in it, on rank 0; one that cannot be made, or is used, ends all ranks."""
    name = f"deepspeed-checkpoint-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(ranks.broadcast(config.output or str(runs_dir() / name)))
    problem = None
    if ranks.is_main:
        try:
            (folder / "checkpoints").mkdir(parents=True)
            records.write_settings(folder, to_dict(config))
        except OSError as error:
            problem = f"--output {folder}: {error.strerror}; choose a new folder where you can write"
    if problem := ranks.broadcast(problem):
        fail(str(problem))
    return folder


def settings_of(run_folder: Path) -> SaveConfig:
    """What the run was made with. SystemExit: there is no such run, or it is of another script."""
    if not (run_folder / "config.yaml").is_file():
        fail(f"{run_folder}/config.yaml does not exist; expected a folder written by save, such as runs/zero")
    try:
        records.read_settings(run_folder)  # an empty file would be read as the defaults
    except ValueError as error:
        fail(str(error))
    return parse(SaveConfig, ["--config", str(run_folder / "config.yaml")])


def main() -> None:
    if sys.argv[1:2] == ["save"]:
        return save(parse(SaveConfig, sys.argv[2:]))
    parser = argparse.ArgumentParser(prog="deepspeed/own_checkpoint.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    commands.add_parser("save", help=save.__doc__, add_help=False)  # its settings are read above
    options = commands.add_parser("resume", help=resume.__doc__)
    options.add_argument("run_folder", type=to_path, help="a folder written by save: config.yaml, checkpoints/")
    options.add_argument("--steps", type=int, default=3, help="optimizer steps to go on (default 3)")
    return resume(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
