"""How long a checkpoint keeps training waiting: written at once, or copied and written while training goes on.

    torchrun --nproc-per-node=2 benchmarks/saving.py                                    # 50 million parameters; minutes
    torchrun --nproc-per-node=2 benchmarks/saving.py --size mini --rounds 1             # seconds, to see it work
    torchrun --nproc-per-node=8 benchmarks/saving.py --size llama_1b                    # on eight GPUs

Five ways write the same FSDP model with AdamW's state through `torch.distributed.checkpoint`, each rank its shards:

    synchronous   dcp.save: training goes on when everything is written and synced
    fresh-copy    dcp.async_save as fsdp/checkpoint.py calls it: it copies into new memory, and a thread writes the copy
    kept-copy     the same with a stager that keeps its memory from one save to the next
    thread        the kept copy is filled by a thread, beside forward and backward, which only read the weights; the
                  optimizer step, which changes them, waits for the copy
    process       likewise, and another process writes: it shares no interpreter lock with the training

The waiting is the time that the call takes, making the state dict included, and what the next optimizer step waits for
the copy; the rank that waits longest counts. The ways take turns, every second round backwards. After each save the
files are read into tensors of NaN and compared, bit by bit, with the state of the moment of asking.
"""

import argparse
import logging
import platform
import shutil
import statistics
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from nested_state import copy_of, differing, leaves  # beside this file
from report import (
    cores,
    date,
    git_commit,
    hardware,
    launched,
    other_load_note,
    oversubscription_note,
    plural,
    processor_seconds,
    quartiles,
    since,
    write_json,
)
from saving_report import WAYS, Saved, Way, summarize, table
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

from common.config import Config, runs_dir
from common.config_fields import to_path
from common.data_sharding import BatchConfig, derive_seed
from common.optimizer import OptimizerConfig, build_optimizer
from common.ranks import Ranks, fail, join
from common.transformer import ModelConfig, Transformer

if __name__ == "__mp_main__":  # in the process that writes, which would announce every save
    logging.disable(logging.INFO)

# name: (model, samples per rank, tokens per sample)
SIZES: dict[str, tuple[dict[str, Any], int, int]] = {
    # for the tests
    "mini": (dict(width=64, layers=2, heads=4, kv_heads=2, ffn_width=192), 2, 32),
    # 50 million parameters, 604 MB with AdamW's state: a disk notices
    "medium": (dict(width=512, layers=16, heads=8, kv_heads=4, ffn_width=1536), 2, 64),
    # for GPUs: 1.5 GB and 15 GB
    "gpt_124m": (dict(preset="gpt_124m"), 8, 1024),
    "llama_1b": (dict(preset="llama_1b"), 2, 2048),
}


def written_by(folder: Path, ranks: Ranks) -> list[int]:
    """Bytes by rank: DCP names a file after the rank that wrote it; `.metadata` is rank 0's."""
    sizes = [0] * ranks.world_size
    for path in folder.iterdir():
        sizes[0 if path.name == ".metadata" else int(path.name.split("_")[2])] += path.stat().st_size
    return sizes


# ---------------------------------------------------------------------------------------------------- training


class Training:
    """An FSDP model in training, and the stagers of the ways to save it."""

    def __init__(self, size: str, ranks: Ranks) -> None:
        model, samples, length = SIZES[size]
        self.ranks, self.step = ranks, 0
        self.config = Config(model=ModelConfig(**model), batch=BatchConfig(global_size=samples * ranks.world_size))
        self.batch = samples, length + 1
        self.model = Transformer(self.config.model, self.config.seed).to(ranks.device)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        for block in self.model.blocks.values():
            fully_shard(block)
        fully_shard(self.model)
        self.optimizer = build_optimizer(self.model.parameters(), OptimizerConfig(), ranks.device)
        # A process group of their own: in the training's, their messages would meet its all-gathers.
        self.writers = dist.new_group(backend="gloo")
        self.stagers = {name: self.stager(way) for name, way in WAYS.items() if way.keeps_memory}

    def stager(self, way: Way) -> DefaultStager:
        """What copies the state to host memory and keeps that; from a GPU into pinned memory, beside its kernels."""
        gpu = self.ranks.device.type == "cuda"
        return DefaultStager(
            StagingOptions(
                use_pinned_memory=gpu,
                use_shared_memory=way.written_by_process,  # the other process writes what lies there
                use_async_staging=way.copied_by_thread,
                use_non_blocking_copy=gpu,
            )
        )

    def state(self) -> dict[str, Any]:
        weights, moments = get_state_dict(self.model, self.optimizer)
        return {"model": weights, "optimizer": moments}

    def train_one_step(self, before_optimizer: Callable[[], object] = lambda: None) -> float:
        """Forward, backward, whatever must be done before weights change, and the optimizer step. Returns seconds."""
        self.synchronize()
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, self.step, self.ranks.rank))
        text = torch.randint(self.config.model.vocabulary, self.batch, generator=generator).to(self.ranks.device)
        (self.model(text[:, :-1], text[:, 1:]) / text[:, 1:].numel()).backward()
        before_optimizer()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.synchronize()
        self.step += 1
        return time.perf_counter() - start

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read on the CPU tells the truth."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()

    def close(self) -> None:
        for stager in self.stagers.values():
            stager.close()
        dist.destroy_process_group(self.writers)


def save(training: Training, name: str, folder: Path) -> tuple[Saved, list[str]]:
    """Save once in the way `name`, training on meanwhile. All ranks must call it.

    Returns:
        What it took, and what is wrong with it on this rank: nothing, if the files hold the state as it was then.
    """
    way, ranks = WAYS[name], training.ranks
    quiet_steps = [training.train_one_step() for _ in range(2)]
    asked_for = copy_of(training.state())
    writer = dcp.FileSystemWriter(folder)  # synced to disk
    common = {"storage_writer": writer, "process_group": training.writers}
    events: dict[str, float] = {}
    steps: list[float] = []

    def note_time(event: str) -> Callable[[Future], None]:
        return lambda _: events.__setitem__(event, time.perf_counter())

    training.synchronize()
    ranks.barrier()
    start = time.perf_counter()
    state = training.state()
    collected = time.perf_counter()
    before_step = 0.0
    if not way.asynchronous:
        dcp.save(state, **common)
        called = events["written"] = time.perf_counter()
    else:
        kind = AsyncCheckpointerType.PROCESS if way.written_by_process else AsyncCheckpointerType.THREAD
        stager = training.stagers.get(name)  # none: the storage writer copies, into new memory
        answer = dcp.async_save(state, async_checkpointer_type=kind, async_stager=stager, **common)
        called = time.perf_counter()
        pending = answer.upload_completion if isinstance(answer, AsyncSaveResponse) else answer
        pending.add_done_callback(note_time("written"))
        copying = answer.staging_completion if isinstance(answer, AsyncSaveResponse) else None
        if copying:
            copying.add_done_callback(note_time("copied"))

        def wait_for_copy() -> None:
            nonlocal before_step
            since = time.perf_counter()
            copying.result()
            before_step = time.perf_counter() - since

        while not steps or not all(ranks.all_gather(pending.done())):  # equally many steps on all ranks
            first = copying is not None and not steps
            seconds = training.train_one_step(wait_for_copy if first else lambda: None)
            steps.append(seconds - (before_step if first else 0.0))
        pending.result()
    ranks.barrier()

    found = copy_of(state, fill=float("nan"))
    dcp.load(found, storage_reader=dcp.FileSystemReader(folder), process_group=training.writers)
    problems = [f"the files do not hold {name} as it was" for name in differing(found, asked_for)]
    if way.asynchronous and not differing(training.state(), asked_for):
        problems.append("nothing was trained meanwhile: the comparison proves nothing")
    own = (collected - start, called - collected, before_step, called - start + before_step)
    collecting, calling, late, waiting = (max(each) for each in zip(*ranks.all_gather(own), strict=True))
    copied = max(ranks.all_gather(events.get("copied", start) - start))
    written = max(ranks.all_gather(events["written"] - start))
    sizes = written_by(folder, ranks)
    saved = Saved(collecting, calling, late, waiting, copied or None, written, steps, quiet_steps, sizes)
    return saved, problems


# ------------------------------------------------------------------------------------------------------ result


def time_copies(training: Training) -> tuple[int, dict[str, float]]:
    """Bytes of this rank's tensors, and the seconds that a plain copy of them takes: the least any save can do."""
    tensors = [leaf for leaf in leaves(training.state()).values() if isinstance(leaf, Tensor)]
    kept = [torch.empty_like(tensor, device="cpu") for tensor in tensors]
    seconds: dict[str, list[float]] = {"fresh": [], "kept": []}
    for repeat in range(6):
        training.ranks.barrier()
        start = time.perf_counter()
        fresh = [torch.empty_like(tensor, device="cpu").copy_(tensor) for tensor in tensors]
        middle = time.perf_counter()
        del fresh
        again = time.perf_counter()
        for target, tensor in zip(kept, tensors, strict=True):
            target.copy_(tensor)
        if repeat:
            seconds["fresh"].append(middle - start)
            seconds["kept"].append(time.perf_counter() - again)
    medians = {name: max(training.ranks.all_gather(statistics.median(times))) for name, times in seconds.items()}
    return sum(tensor.nbytes for tensor in tensors), medians


def parse_arguments(words: list[str]) -> argparse.Namespace:
    """Our options. SystemExit (exit code 2): one that cannot work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=list(SIZES), default="medium", help="default: medium")
    add("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY", help="default: all five")
    add("--rounds", type=int, default=5, help="saves in each way, after one to warm up (default: 5)")
    add(
        "--folder",
        type=to_path,
        help="where to write the checkpoints, on the disk to measure (default: RUNS_DIR or runs)",
    )
    add("--output", type=to_path, help="also write the result to this JSON file")
    options = parser.parse_args(words)
    if options.rounds < 1:
        fail(f"--rounds {options.rounds} cannot work; allowed: 1 or more")
    if len(set(options.ways)) < len(options.ways):
        fail(f"--ways {' '.join(options.ways)} names one twice; give each once")
    options.folder = options.folder or runs_dir()
    return options


def measure(options: argparse.Namespace, ranks: Ranks, folder: Path, bar: tqdm) -> dict[str, Any]:
    """Save in all ways, round by round. Ends all ranks where a file does not hold what it should."""
    training = Training(options.size, ranks)
    training.train_one_step()  # AdamW's state comes with it
    rounds: list[dict[str, Saved]] = []
    for number in range(options.rounds + 1):
        rounds.append({})
        for name in options.ways[:: -1 if number % 2 else 1]:
            bar.set_description(name)
            shards = folder / f"{number}-{name}"
            try:
                rounds[-1][name], problems = save(training, name, shards)
            except (OSError, dcp.CheckpointException) as error:
                fail(f"{name}: {shards} could not be written: {error}; choose another --folder, or a smaller --size")
            if wrong := [problem for each in ranks.all_gather(problems) for problem in each]:
                fail(f"{name}: {wrong[0]} ({plural(len(wrong), 'such problem')}); its seconds are worth nothing")
            if ranks.is_main:
                shutil.rmtree(shards)
            bar.update()
    shard_bytes, copy_seconds = time_copies(training)
    first, *measured = [{name: each[name] for name in options.ways} for each in rounds]
    parameters = training.parameters
    training.close()
    return {
        "size": options.size,
        "parameters": parameters,
        "rounds": options.rounds,
        "saves": len(rounds) * len(options.ways),
        "shard_bytes": ranks.all_gather(shard_bytes),
        "copy_seconds": copy_seconds,
        "quiet_step_seconds": quartiles([t for each in measured for saved in each.values() for t in saved.quiet_steps]),
        "rows": summarize(measured, first),
    }


@record
def main() -> None:
    options = parse_arguments(sys.argv[1:])
    ranks = join()
    # One folder for all ranks, made by rank 0, and gone at the end.
    folder, problem = options.folder / f"saving-{ranks.broadcast(uuid.uuid4().hex[:8])}", None
    if ranks.is_main:
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            problem = f"--folder {options.folder}: {error.strerror}; choose a folder where you can write"
    if problem := ranks.broadcast(problem):
        fail(problem)
    before = processor_seconds()
    total = len(options.ways) * (options.rounds + 1)
    try:
        with tqdm(total=total, unit="save", disable=None if ranks.is_main else True) as bar:
            measured = measure(options, ranks, folder, bar)
    finally:
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
    seconds, busy, ours = since(before)
    ours += sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children())  # the process that writes
    ours = sum(ranks.all_gather(ours))  # of all ranks: one machine is taken for granted
    on_cpu = ranks.device.type == "cpu"
    device = f"{platform.machine()} CPU" if on_cpu else torch.cuda.get_device_name(ranks.device)
    ranks.leave()
    if not ranks.is_main:
        return
    notes = [other_load_note(seconds, busy, ours)]
    notes.append(oversubscription_note(ranks.local_world_size, torch.get_num_threads(), cores(), 0) if on_cpu else None)
    result = {
        "benchmark": "saving",
        "world_size": ranks.world_size,
        "command": launched(ranks, "benchmarks/saving.py", sys.argv[1:]),
        "date": date(),
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "notes": list(filter(None, notes)),
        **measured,
    }
    print(f"\n{table(result)}", flush=True)
    if options.output:
        write_json(result, options.output, "--output")


if __name__ == "__main__":
    main()
