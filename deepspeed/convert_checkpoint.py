"""DeepSpeed's own checkpoints: shards to one safetensors file, and to a form that another number of ranks can load.

    torchrun --nproc-per-node=2 deepspeed/convert_checkpoint.py save --output runs/zero --stage 3   # three steps
    python deepspeed/convert_checkpoint.py convert runs/zero --output runs/zero/model               # for transformers
    python deepspeed/convert_checkpoint.py universal runs/zero                                      # for any ranks
    torchrun --nproc-per-node=3 deepspeed/convert_checkpoint.py resume runs/zero                    # three steps more

`save` trains and calls `engine.save_checkpoint`: each rank writes the flat partitions that it owns. All four commands
print a fingerprint of the fp32 weights; it stays the same from `save` to `convert` and `resume`. DeepSpeed's shards are
pickles, which may run code when they are read: a file that asks for more than what DeepSpeed itself writes is refused.
"""

import argparse
import contextlib
import hashlib
import io
import os
import pickle
import shutil
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import yaml
from environment import deepspeed

# isort: split
# after environment.py, which chooses the accelerator
from deepspeed.checkpoint import ds_to_universal
from deepspeed.checkpoint.constants import (
    UNIVERSAL_CHECKPOINT_INFO,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from settings import start_deepspeed
from torch.distributed.elastic.multiprocessing.errors import record
from torch.serialization import get_unsafe_globals_in_checkpoint

from common.config import parse, to_dict
from common.data import TextConfig, text_datasets
from common.data_sharding import BatchConfig, BatchPlan, Loader
from common.hf_weights import save_hugging_face
from common.optimizer import OptimizerConfig, build_optimizer
from common.ranks import Ranks, fail, join, single_process
from common.transformer import ModelConfig, Transformer, initial_weight


@dataclass
class SaveConfig:
    output: str | None = None
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


# ------------------------------------------------------------------------------------------------ save, resume


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


def fingerprint(weights: Iterator[tuple[str, torch.Tensor]]) -> str:
    """A checksum over all bits of the weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def open_folder(config: SaveConfig, ranks: Ranks) -> Path:
    """Make a run folder with the settings in it, on rank 0; one that cannot be made, or is used, ends all ranks."""
    name = f"deepspeed-checkpoint-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(ranks.broadcast(config.output or str(Path(os.environ.get("RUNS_DIR", "runs"), name))))
    problem = None
    if ranks.is_main:
        try:
            (folder / "checkpoints").mkdir(parents=True)
            (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
        except OSError as error:
            problem = f"--output {folder}: {error.strerror}; choose a new folder where you can write"
    if problem := ranks.broadcast(problem):
        fail(str(problem))
    return folder


# ------------------------------------------------------------------------------------------ convert, universal


def convert(run_folder: Path, output: Path) -> None:
    """Put the shards together: model.safetensors and config.json under Hugging Face's names, checked."""
    config, ranks = settings_of(run_folder), single_process("cpu")
    source = shards_of(run_folder)
    start = time.perf_counter()
    try:
        with quiet():
            weights = get_fp32_state_dict_from_zero_checkpoint(str(source.parent), tag=source.name)
    except (ValueError, RuntimeError, KeyError, FileNotFoundError, pickle.UnpicklingError, EOFError) as error:
        fail(f"{source} cannot be put together: {error}; expected all shards of one save, whole; save it again")
    model = Transformer(config.model, seed=None)
    model.load_state_dict(weights)
    merged = time.perf_counter()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent) as folder:  # whole, or not there
            save_hugging_face(model, folder)
            output.mkdir(exist_ok=True)
            for name in ("config.json", "model.safetensors"):
                (Path(folder) / name).replace(output / name)
    except OSError as error:
        fail(f"--output {output}: {error.strerror}; choose a folder where you can write")
    written, size = time.perf_counter(), (output / "model.safetensors").stat().st_size
    print(f"{source}: put together in {merged - start:.3f} s, written in {written - merged:.3f} s")
    print(f"{output / 'model.safetensors'}: {size:,} bytes, {len(weights)} tensors; config.json beside it")
    print(f"weights {fingerprint(iter(sorted(weights.items())))}")

    difference, largest = compare_with_transformers(model, output, config.seed)
    print(f"transformers loads them: logits up to {largest:.4f}, largest difference to this model {difference:.1e}")
    ranks.leave()
    if difference > 1e-5 * max(1.0, largest):  # fp32: sums of some hundred terms in another order
        raise SystemExit(f"error: transformers computes something else from {output}")


@torch.no_grad()
def compare_with_transformers(model: Transformer, folder: Path, seed: int) -> tuple[float, float]:
    """Largest difference of the logits, and the largest logit, on random tokens."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    length = min(32, model.config.max_sequence)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.vocabulary, (2, length), generator=generator)
    ours = model(tokens)
    return (theirs(tokens).logits - ours).abs().max().item(), ours.abs().max().item()


def universal(run_folder: Path) -> None:
    """Cut the shards up by parameter: a folder for each, which any number of ranks can load."""
    settings_of(run_folder)
    single_process("cpu")
    source = shards_of(run_folder)
    target = source.with_name(f"{source.name}_universal")
    if target.exists():
        fail(f"{target} exists already; expected to make it; remove it, or go on with: resume {run_folder}")
    unfinished = target.with_name(f"{target.name}.unfinished")  # whole, or not there
    shutil.rmtree(unfinished, ignore_errors=True)  # of a conversion that was killed
    start = time.perf_counter()
    options = Namespace(
        input_folder=str(source), output_folder=str(unfinished), num_extract_workers=1, num_merge_workers=1,
        keep_temp_folder=False, strict=True, inject_missing_state=False,
    )  # fmt: skip
    try:
        with quiet():
            ds_to_universal.main(options)
        unfinished.replace(target)
        target.with_name("latest_universal").write_text(target.name)  # DeepSpeed wrote the other name there
    except (ValueError, RuntimeError, KeyError, AssertionError, OSError, EOFError, pickle.UnpicklingError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        fail(f"{source} cannot be converted: {error}; expected all shards of one save, whole; save it again")
    seconds = time.perf_counter() - start
    names = sorted(path.name for path in (target / "zero").iterdir() if path.is_dir())
    weights = ((name, torch.load(target / "zero" / name / "fp32.pt", weights_only=True)) for name in names)
    whole = ((name, entry["param"] if isinstance(entry, dict) else entry) for name, entry in weights)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target}: {len(names)} parameters, {size:,} bytes, made in {seconds:.3f} s; weights {fingerprint(whole)}")


def settings_of(run_folder: Path) -> SaveConfig:
    """What the run was made with. SystemExit: there is no such run, or it is of another script."""
    if not (run_folder / "config.yaml").is_file():
        fail(f"{run_folder}/config.yaml does not exist; expected a folder written by save, such as runs/zero")
    return parse(SaveConfig, ["--config", str(run_folder / "config.yaml")])


def newest(run_folder: Path) -> str:
    """The name of the checkpoint that `latest` points to. SystemExit: there is none."""
    latest = run_folder / "checkpoints" / "latest"
    if not latest.is_file():
        fail(f"{latest} does not exist; expected the name of a checkpoint in it; was save interrupted?")
    tag = latest.read_text().strip()
    if not (latest.parent / tag).is_dir():
        fail(f"{latest} names {tag!r}, but {latest.parent / tag} does not exist; fetch that folder, or save again")
    return tag


def shards_of(run_folder: Path) -> Path:
    """The folder of the newest checkpoint's shards. SystemExit: one is missing, damaged, or asks to run code."""
    source = run_folder / "checkpoints" / newest(run_folder)
    shards = {int(path.name.split("pp_rank_")[1].split("_")[0]) for path in source.glob("*pp_rank_*_optim_states.pt")}
    if not shards:
        fail(
            f"{source} is no ZeRO checkpoint: no *_optim_states.pt in it; expected one a rank; save with stage 1, 2, 3"
        )
    if missing := sorted(set(range(max(shards) + 1)) - shards):
        fail(
            f"{source}: the optimizer shard of rank {missing[0]} is missing; found those of {sorted(shards)}; fetch it"
        )
    refuse_foreign_pickles(source)
    return source


# All that DeepSpeed's checkpoints of a dense model name beside tensors, numbers and plain containers.
WRITTEN_BY_DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum", "deepspeed.utils.tensor_fragment.fragment_address",
}  # fmt: skip


def refuse_foreign_pickles(folder: Path) -> None:
    """End with one line if a file names a function or class that DeepSpeed's own checkpoints do not have.

    torch reads such names without calling anything. DeepSpeed itself loads with `weights_only=False`: whatever a file
    names is imported and called. This is a fence, no proof: load only what you, or someone you trust, wrote.
    """
    for path in sorted(folder.rglob("*.pt")):
        try:
            found = set(get_unsafe_globals_in_checkpoint(path))
        except Exception as error:  # whatever a damaged file may cause
            fail(f"{path} is no whole file of torch.save ({type(error).__name__}); expected a shard; fetch it again")
        if foreign := sorted(found - WRITTEN_BY_DEEPSPEED):
            fail(f"{path} asks for {', '.join(foreign[:3])} when it is read; DeepSpeed does not write that; not read")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the lines that DeepSpeed prints while it converts, and torch's warnings about its use of torch."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    if sys.argv[1:2] == ["save"]:
        return save(parse(SaveConfig, sys.argv[2:]))
    parser = argparse.ArgumentParser(prog="deepspeed/convert_checkpoint.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("save", help=save.__doc__, add_help=False)  # its settings are read above
    of = {}
    for function in (convert, universal, resume):
        of[function] = commands.add_parser(function.__name__, help=function.__doc__)
        of[function].add_argument("run_folder", type=Path, help="a folder written by save: config.yaml, checkpoints/")
    of[convert].add_argument("--output", type=Path, required=True, help="the folder to write")
    of[resume].add_argument("--steps", type=int, default=3, help="optimizer steps to go on (default 3)")
    given = vars(parser.parse_args())
    return {"convert": convert, "universal": universal, "resume": resume}[given.pop("command")](**given)


if __name__ == "__main__":
    main()
