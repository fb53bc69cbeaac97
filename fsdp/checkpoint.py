"""Checkpoints of a sharded model: what each kind costs, loading at another number of ranks, and weights for others.

    torchrun --nproc-per-node=2 fsdp/checkpoint.py save                    # three kinds, each timed: some seconds
    torchrun --nproc-per-node=3 fsdp/checkpoint.py load runs/NAME          # a run of fsdp/train.py or ddp/train.py
    python fsdp/checkpoint.py export runs/NAME --output model.safetensors  # one process: the Hugging Face format

`save` shards a model, takes a step, and writes the same state sharded (every rank its part), whole (rank 0 all of it),
and sharded while training goes on; it fails if what was written meanwhile is not the state of the moment of asking.
`load` and `save` print a fingerprint of the weights: the same at any number of ranks.
"""

import argparse
import hashlib
import sys
import tempfile
import time
import warnings
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from settings import FsdpConfig, ShardedConfig, mesh_shape, set_prefetch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from common import checkpoint
from common.config import parse, runs_dir, to_dict
from common.config_fields import PathText, to_path
from common.data_sharding import derive_seed
from common.hf_weights import save_hugging_face
from common.meta_device import fill_shards
from common.optimizer import build_optimizer
from common.ranks import Ranks, fail, join, single_process
from common.runs import manifest, records
from common.transformer import ModelConfig, Transformer


@dataclass
class SaveConfig:
    output: PathText | None = None
    """The run folder to write; by default a new one under runs, or under the variable RUNS_DIR."""
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    seed: int = 1234
    device: str = "auto"
    """auto, cpu or cuda."""


# ------------------------------------------------------------------------------------------------------ save


@record
def save(config: SaveConfig) -> None:
    """Write one state in three ways; print what each costs."""
    ranks = join(config.device)
    settings = ShardedConfig(seed=config.seed, model=config.model, fsdp=config.fsdp)
    settings.data.sequence_length = min(64, config.model.max_sequence)
    model, optimizer = build(settings, ranks)
    train_one_step(model, optimizer, settings, ranks, step=0)
    folder = open_folder(config.output, settings, ranks)
    before = fingerprint(model, ranks)
    ranks.print(f"{ranks.world_size} ranks, run folder {folder}, weights {before}\n")
    ranks.print(f"{'':22}{'training waits':>16}{'written after':>15}   bytes by rank")

    start = time.perf_counter()
    target = checkpoint.save(folder / "checkpoints", 1, model, optimizer, ranks)
    sharded_bytes = written_by(manifest.read(target)["files"], ranks)
    report("sharded, synchronous", start, start, sharded_bytes, ranks)

    # Every rank takes part in gathering (all must call it), one layer after the other, but rank 0 alone keeps what
    # arrives, in its host memory: the whole model and twice as much of optimizer state.
    start = time.perf_counter()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    if ranks.is_main:
        torch.save({"model": weights, "optimizer": moments}, folder / "whole.pt")
    ranks.barrier()
    size = (folder / "whole.pt").stat().st_size if ranks.is_main else 0
    report("whole, on rank 0", start, start, ranks.all_gather(size), ranks)

    # Copied first, then written by a thread, in whose collectives no message of the training must get mixed up: a
    # process group of its own, on the CPU. Without a manifest: as it stands here it is for measuring, not for resuming.
    writers, shards = dist.new_group(backend="gloo"), folder / "asynchronous"
    start = time.perf_counter()
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    pending = dcp.async_save(state, storage_writer=dcp.FileSystemWriter(shards), process_group=writers)
    assert isinstance(pending, Future)
    going_on, steps = time.perf_counter(), 0
    while steps == 0 or not all(ranks.all_gather(pending.done())):  # all ranks go on for equally many steps
        steps += 1
        train_one_step(model, optimizer, settings, ranks, steps)
    pending.result()
    files = {path.name: {"bytes": path.stat().st_size} for path in shards.iterdir()}
    report("sharded, asynchronous", start, going_on, written_by(files, ranks), ranks, time.perf_counter())

    # The proof: meanwhile the weights have changed, and what was written has not.
    assert fingerprint(model, ranks) != before
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, storage_reader=dcp.FileSystemReader(shards), process_group=writers)
    after = fingerprint(model, ranks)  # the state dict's tensors are the model's
    dist.destroy_process_group(writers)
    ranks.leave()
    if after != before:
        raise SystemExit(f"[rank {ranks.rank}] error: the asynchronous checkpoint holds {after}, not {before}")
    trained = "1 step was" if steps == 1 else f"{steps} steps were"
    ranks.print(f"\n{trained} trained meanwhile, and what was written is the state before them: {after}")


def build(settings: ShardedConfig, ranks: Ranks) -> tuple[Transformer, torch.optim.Optimizer]:
    """Model and optimizer as fsdp/train.py makes them."""
    with torch.device("meta"):
        model = Transformer(settings.model)
    if settings.train.precision == "fp64":
        model.double()
    copies, shards = mesh_shape(settings.fsdp, ranks)
    mesh = init_device_mesh(ranks.device.type, (copies, shards), mesh_dim_names=("dp_replicate", "dp_shard"))
    low_precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.train.precision)
    on_gpu = ranks.device.type == "cuda"
    for unit in (*model.blocks.values(), model):
        fully_shard(
            unit,
            mesh=mesh if copies > 1 else mesh["dp_shard"],
            mp_policy=MixedPrecisionPolicy(low_precision, low_precision and torch.float32, cast_forward_inputs=False),
            offload_policy=CPUOffloadPolicy(pin_memory=on_gpu) if settings.fsdp.cpu_offload else OffloadPolicy(),
            reshard_after_forward=None if settings.fsdp.reshard_after_forward else False,
        )
    set_prefetch(list(model.blocks.values()), settings.fsdp.prefetch)
    model.to_empty(device="cpu" if settings.fsdp.cpu_offload else ranks.device)
    fill_shards(model, settings.seed)
    return model, build_optimizer(model.parameters(), settings.optimizer, ranks.device)


def train_one_step(
    model: Transformer, optimizer: torch.optim.Optimizer, settings: ShardedConfig, ranks: Ranks, step: int
) -> None:
    generator = torch.Generator().manual_seed(derive_seed(settings.seed, step, ranks.rank))
    shape = (2, settings.data.sequence_length + 1)
    text = torch.randint(settings.model.vocabulary, shape, generator=generator).to(ranks.device)
    (model(text[:, :-1], text[:, 1:]) / text[:, 1:].numel()).backward()
    optimizer.step()
    optimizer.zero_grad()


def fingerprint(model: torch.nn.Module, ranks: Ranks) -> str:
    """A checksum of all weights, whoever holds which part; one parameter after the other is whole on every rank."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        whole = parameter.detach()
        whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        digest.update(name.encode())
        digest.update(whole.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def written_by(files: dict[str, Any], ranks: Ranks) -> list[int]:
    """Bytes by rank: DCP names a file after the rank that wrote it; `.metadata` is rank 0's."""
    sizes = [0] * ranks.world_size
    for name, entry in files.items():
        sizes[0 if name == ".metadata" else int(name.split("_")[2])] += entry["bytes"]
    return sizes


def report(
    name: str, start: float, blocked_until: float, sizes: list[int], ranks: Ranks, end: float | None = None
) -> None:
    """One row; a synchronous save keeps training waiting until it is written."""
    end = end or time.perf_counter()
    blocked = blocked_until - start if blocked_until > start else end - start
    waits, written = (max(values) for values in zip(*ranks.all_gather((blocked, end - start)), strict=True))
    ranks.print(f"{name:22}{waits:>14.3f} s{written:>13.3f} s   {'  '.join(f'{size:,}' for size in sizes)}")


def open_folder(output: str | None, settings: ShardedConfig, ranks: Ranks) -> Path:
    """Make a run folder with the settings in it, on rank 0; one that cannot be made, or is used, ends all ranks."""
    name = f"fsdp-checkpoint-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(ranks.broadcast(output or str(runs_dir() / name)))
    problem = None
    if ranks.is_main:
        try:
            (folder / "checkpoints").mkdir(parents=True)
            records.write_settings(folder, to_dict(settings))
        except OSError as error:
            problem = f"--output {folder}: {error.strerror}; choose a new folder where you can write"
    if problem := ranks.broadcast(problem):
        fail(str(problem))
    return folder


# ----------------------------------------------------------------------------------------------- load, export


def committed(run_folder: Path) -> Path:
    """The newest whole checkpoint of a run. SystemExit: there is none."""
    found = manifest.latest(run_folder / "checkpoints")
    if found is None:
        fail(
            f"{run_folder} holds no finished checkpoint (checkpoints/step_N/manifest.json); give the folder of a run "
            "that has saved one"
        )
    return found


def settings_of(run_folder: Path) -> ShardedConfig:
    """What the run was made with. SystemExit: there is no such run, or it is of another script."""
    if not (run_folder / "config.yaml").is_file():
        fail(f"{run_folder}/config.yaml does not exist; expected the folder of a run, such as runs/NAME")
    try:
        records.read_settings(run_folder)  # an empty file would be read as the defaults
    except ValueError as error:
        fail(str(error))
    return parse(ShardedConfig, ["--config", str(run_folder / "config.yaml")])


@record
def load(run_folder: Path) -> None:
    """Load a run's newest checkpoint, model and optimizer, whatever number of ranks saved it."""
    settings, source = settings_of(run_folder), committed(run_folder)
    ranks = join()  # here: the run may have had GPUs, or none
    source = ranks.broadcast(source)  # a run that is still going on may have saved another since
    settings.fsdp.replicate = 1  # how the run was sharded is its own affair
    model, optimizer = build(settings, ranks)
    start = time.perf_counter()
    manifest = checkpoint.load(source, model, optimizer, ranks)
    seconds = max(ranks.all_gather(time.perf_counter() - start))
    state = [value for entries in optimizer.state.values() for value in entries.values() if value.dim()]
    mine = sum(tensor.to_local().nbytes for tensor in (*model.parameters(), *state))
    held, weights = "  ".join(f"{size:,}" for size in ranks.all_gather(mine)), fingerprint(model, ranks)
    by, step = manifest["world_size"], manifest["step"]
    ranks.print(f"{source}: step {step}, saved by {by} ranks, loaded by {ranks.world_size}, weights {weights}")
    ranks.print(f"{seconds:.3f} s; bytes of weights and optimizer state by rank: {held}")
    ranks.leave()


def export(run_folder: Path, output: Path) -> None:
    """Put a run's weights into one safetensors file, under Hugging Face's names, with a config.json beside it."""
    if output.suffix != ".safetensors":
        fail(f"--output {output} is no safetensors file; expected a name such as model.safetensors")
    settings, source, ranks = settings_of(run_folder), committed(run_folder), single_process("cpu")
    model = Transformer(settings.model, seed=None)
    if settings.train.precision == "fp64":
        model.double()
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no process group here is no surprise
        checkpoint.load(source, model, None, ranks)
    loaded = time.perf_counter()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent) as folder:  # whole, or not there
            save_hugging_face(model, folder)
            (Path(folder) / "config.json").replace(output.parent / "config.json")
            (Path(folder) / "model.safetensors").replace(output)
    except OSError as error:
        fail(f"--output {output}: {error.strerror}; choose a folder where you can write")
    now = time.perf_counter()
    weights, size = fingerprint(model, ranks), output.stat().st_size
    print(f"{source}: read in {loaded - start:.3f} s, written in {now - loaded:.3f} s, weights {weights}")
    print(f"{output}: {size:,} bytes, {len(model.state_dict())} tensors; config.json beside it")


def main() -> None:
    if sys.argv[1:2] == ["save"]:
        return save(parse(SaveConfig, sys.argv[2:]))
    parser = argparse.ArgumentParser(prog="fsdp/checkpoint.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("save", help=save.__doc__, add_help=False)  # its settings are read above
    for function in (load, export):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.add_argument("run_folder", type=to_path, help="the folder of a run: config.yaml, checkpoints/")
    command.add_argument("--output", type=to_path, required=True, help="the file to write: model.safetensors")
    given = vars(parser.parse_args())
    return {"load": load, "export": export}[given.pop("command")](**given)


if __name__ == "__main__":
    main()
