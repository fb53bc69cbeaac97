"""What `common/` costs: the training step of ddp/train.py against a bare loop of the same model.

    python benchmarks/loop_overhead.py                               # one process; about a minute
    torchrun --nproc-per-node=2 benchmarks/loop_overhead.py          # both loops under DDP

Ours is the loop of ddp/train.py, line by line (a test compares them): batches from the Loader, learning rate,
autocast and scaler, clipping, metric line with its sum over the ranks, progress bar, replica check. The bare
loop is what one would write with nothing else: tokens that are on the device already, forward, backward,
clip, step. Both have their own copy of the same model and optimizer, see the same batches, and must end with
the same bits in every parameter.

The two take turns, a few steps each, and every second time the other one begins. Overhead is ours / bare - 1
within such a pair; the table gives its median and quartiles over all pairs, and that of the fastest turns,
which other programs disturbed least. Evaluation and checkpoints are not part of a step.
"""

import argparse
import contextlib
import io
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from loop_overhead_report import table  # beside this file
from report import (
    cores,
    date,
    hardware,
    launched,
    other_load_note,
    oversubscription_note,
    processor_seconds,
    quartiles,
    since,
    write_json,
)
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from common.config import Config, TrainConfig
from common.config_fields import to_path
from common.data import TextConfig, text_datasets
from common.data_sharding import BatchConfig, BatchPlan, Loader
from common.flops import flops_per_token
from common.optimizer import OptimizerConfig, build_optimizer, learning_rate, set_learning_rate
from common.ranks import Ranks, fail, join, single_process
from common.replica_check import check_replicas
from common.run import Run
from common.transformer import ModelConfig, Transformer

# name: (model, samples per rank, tokens per sample, steps per turn)
SIZES: dict[str, tuple[dict[str, Any], int, int, int]] = {
    # a few ms a step on one core: here the overhead shows
    "mini": (dict(width=64, layers=2, heads=4, kv_heads=2, ffn_width=192), 4, 64, 20),
    # the model of all lessons, about 100 ms a step on one core
    "tiny": (dict(preset="tiny"), 8, 128, 2),
    # for a GPU
    "gpt_124m": (dict(preset="gpt_124m"), 8, 1024, 5),
}


class Terminal(io.StringIO):
    """Stands in for a terminal, so that our loop draws its progress bar and prints its lines as in use."""

    def isatty(self) -> bool:
        return True


class Contest:
    """The two loops over equal models; each advances by `next(…)`, one optimizer step at a time."""

    def __init__(self, size: str, ranks: Ranks, steps: int, folder: str) -> None:
        model, samples, length, _ = SIZES[size]
        self.ranks = ranks
        self.config = config = Config(
            # One step more than are made: evaluation and checkpoint come after the last one.
            train=TrainConfig(steps=steps + 1),
            batch=BatchConfig(global_size=samples * ranks.world_size),
            data=TextConfig(sequence_length=length),
            model=ModelConfig(**model),
            # Computed in every step, and always the same: the bare loop needs none.
            optimizer=OptimizerConfig(warmup_steps=0, min_lr_ratio=1.0),
            runs_dir=folder,
        )
        train_set, _ = text_datasets(config.data, config.model.vocabulary)
        plan = BatchPlan(config.batch, len(train_set), config.seed, ranks.rank, ranks.world_size)
        self.tokens_per_step = config.batch.global_size * config.data.sequence_length
        self.our_model, self.our_ddp_model = self.build_model()
        self.bare_model, self.bare_ddp_model = self.build_model()
        self.start = [parameter.detach().clone() for parameter in self.our_model.parameters()]
        self.loader = Loader(train_set, plan, ranks.device)
        self.optimizer = build_optimizer(self.our_model.parameters(), config.optimizer, ranks.device)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=False)
        flops = flops_per_token(config.model, length)
        self.run = Run(config, ranks, "ddp", units_per_step=self.tokens_per_step, flops_per_unit=flops)
        self.run.restore(self.our_model, self.optimizer, self.scaler)
        ahead = Loader(train_set, plan, ranks.device)
        self.batches = [batch for step in range(steps) for batch, _ in ahead.micro_batches(step)]

    def build_model(self) -> tuple[Transformer, torch.nn.Module]:
        """The model and what computes with it: under a launcher its DDP wrapper, otherwise itself."""
        ranks = self.ranks
        model = Transformer(self.config.model, self.config.seed).to(ranks.device)
        if ranks.launcher == "python":
            return model, model
        return model, DistributedDataParallel(model, device_ids=ranks.device_ids, gradient_as_bucket_view=True)

    def ours(self) -> Iterator[None]:
        """The loop of ddp/train.py. What it does at the very end of a training is left out."""
        config, ranks, run, loader = self.config, self.ranks, self.run, self.loader
        optimizer, scaler, tokens_per_step = self.optimizer, self.scaler, self.tokens_per_step
        model, ddp_model = self.our_model, self.our_ddp_model
        autocast = torch.autocast(ranks.device.type, enabled=False)
        for step in run.steps():
            lr = learning_rate(step, config.train.steps, config.optimizer)
            set_learning_rate(optimizer, lr)
            loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
            for (tokens, targets), is_last in loader.micro_batches(step):
                with nullcontext() if is_last else ddp_model.no_sync():
                    with autocast:
                        micro_loss_sum = ddp_model(tokens, targets)
                    scaler.scale(micro_loss_sum * ranks.world_size / tokens_per_step).backward()
                loss_sum += micro_loss_sum.detach()
            scaler.unscale_(optimizer)
            grad_norm = clip_grad_norm_(model.parameters(), config.optimizer.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            run.log(step, loss_sum, grad_norm, lr)
            if run.wants_evaluation(step):
                break
            run.end_step(step, model, optimizer, scaler)
            yield

    def bare(self) -> Iterator[None]:
        """The same training with nothing around it."""
        config, world_size, tokens_per_step = self.config, self.ranks.world_size, self.tokens_per_step
        model, ddp_model = self.bare_model, self.bare_ddp_model
        optimizer = build_optimizer(model.parameters(), config.optimizer, self.ranks.device)
        for tokens, targets in self.batches:
            (ddp_model(tokens, targets) * world_size / tokens_per_step).backward()
            clip_grad_norm_(model.parameters(), config.optimizer.clip)
            optimizer.step()
            optimizer.zero_grad()
            yield

    def verdict(self) -> str | None:
        """What makes the comparison unfair, on any rank: None when both loops did the same training."""
        ours, bare = list(self.our_model.parameters()), list(self.bare_model.parameters())
        problem = None
        if any(torch.equal(now, start) for now, start in zip(ours, self.start, strict=True)):
            problem = "a parameter never moved"
        difference = max(float((a - b).detach().abs().max()) for a, b in zip(ours, bare, strict=True))
        # Some CUDA kernels add up in no fixed order, and AdamW amplifies last bits; CPUs agree in all bits.
        if difference > (1e-3 if self.ranks.device.type == "cuda" else 0.0):
            problem = f"parameters differ by up to {difference:.3g}"
        return next(filter(None, self.ranks.all_gather(problem)), None)

    def parts(self, steps: int) -> dict[str, float]:
        """Where the difference goes: median seconds a step in the running loop. Trains on: call it last."""
        run, loader, ranks = self.run, self.loader, self.ranks
        seconds: dict[str, list[float]] = {}

        def clocked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            times = seconds.setdefault(name, [])

            def call(*arguments: Any) -> Any:
                start = time.perf_counter()
                result = function(*arguments)
                times.append(time.perf_counter() - start)
                return result

            return call

        def clocked_items(name: str, generator: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
            return lambda *arguments: iter(clocked(name, generator(*arguments).__next__), object())

        run.log = clocked("metric line, sum over the ranks (Run.log)", run.log)
        run.steps = clocked_items("seed of the step, progress bar (Run.steps)", run.steps)
        loader.micro_batches = clocked_items("next batch (Loader)", loader.micro_batches)
        loop = self.ours()
        for _ in range(steps):
            next(loop)
        found = {name: statistics.median(times) for name, times in seconds.items()}
        if (every := self.config.train.check_replicas_every) and ranks.world_size > 1:
            check = [timed(lambda: check_replicas(self.our_model, 0), 1, ranks)[0] for _ in range(5)]
            found[f"replica check, every {every} steps"] = statistics.median(check) / every
        return found


def timed(call: Callable[[], object], times: int, ranks: Ranks) -> tuple[float, float]:
    """Wall and CPU seconds of one of `times` calls, all device work included; all ranks start together."""
    ranks.barrier()
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        call()
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - wall) / times, (time.process_time() - cpu) / times


def compare(size: str, ranks: Ranks, pairs: int, steps: int, bar: tqdm) -> dict[str, Any]:
    """Let both loops take `pairs` turns of `steps` steps each, after one to warm up; one row of results."""
    screen = Terminal()
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            contest = Contest(size, ranks, (pairs + 1) * steps, folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Run took it, to stop after a step
        loops = {"ours": contest.ours(), "bare": contest.bare()}
        wall: dict[str, list[float]] = {"ours": [], "bare": []}
        cpu: dict[str, list[float]] = {"ours": [], "bare": []}
        for pair in range(pairs + 1):
            for name in ("ours", "bare") if pair % 2 else ("bare", "ours"):
                with contextlib.redirect_stdout(screen):  # its lines; its bar was made with the same screen
                    seconds = timed(loops[name].__next__, steps, ranks)
                if pair:  # the first turn allocates
                    wall[name].append(seconds[0])
                    cpu[name].append(seconds[1])
            bar.update()
        # Before the parts: their replica check would end the ranks without a word, its stderr is the stand-in's.
        if problem := contest.verdict():
            fail(f"{size}: the loops did not do the same training ({problem}); comparing them is worth nothing")
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            parts = contest.parts(min(max(10, 4 * steps), len(contest.batches)))
            contest.run.finish()

    def overhead(times: dict[str, list[float]]) -> dict[str, float]:
        return quartiles([a / b - 1 for a, b in zip(times["ours"], times["bare"], strict=True)])

    return {
        "size": size,
        "parameters": sum(parameter.numel() for parameter in contest.our_model.parameters()),
        "tokens_per_rank_and_step": contest.tokens_per_step // ranks.world_size,
        "pairs": pairs,
        "steps_per_turn": steps,
        "ours_step_seconds": quartiles(wall["ours"]),
        "bare_step_seconds": quartiles(wall["bare"]),
        "overhead": overhead(wall) | {"fastest": min(wall["ours"]) / min(wall["bare"]) - 1},
        "overhead_cpu_time": overhead(cpu) if ranks.device.type == "cpu" else None,
        "parts_seconds_per_step": parts,
        "same_parameters": True,
        "record": contest.run.record if ranks.is_main else {},
    }


@record
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["mini", "tiny"]
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=default, help="default: mini tiny")
    parser.add_argument("--pairs", type=int, default=40, help="turns of each loop (default: 40)")
    parser.add_argument("--steps", type=int, help="steps per turn (default: 20, 2 and 5 by size)")
    parser.add_argument("--output", type=to_path, help="also write the result to this JSON file")
    options = parser.parse_args()
    if options.pairs < 1 or (options.steps is not None and options.steps < 1):
        fail(f"--pairs {options.pairs} and --steps {options.steps} must both be at least 1")
    # One thread, as torchrun sets it: plain python would take all cores.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    ranks = join() if "RANK" in os.environ else single_process()

    rows, before = [], processor_seconds()
    total = len(options.sizes) * (options.pairs + 1)
    with tqdm(total=total, unit="pair", disable=None if ranks.is_main else True) as bar:
        for size in options.sizes:
            bar.set_description(size)
            rows.append(compare(size, ranks, options.pairs, options.steps or SIZES[size][3], bar))
    seconds, busy, ours = since(before)
    ours = sum(ranks.all_gather(ours))  # of all ranks: one machine is taken for granted
    ranks.leave()
    if not ranks.is_main:
        return
    about = [row.pop("record") for row in rows][-1]
    on_cpu = ranks.device.type == "cpu"
    notes = [other_load_note(seconds, busy, ours)]
    notes.append(oversubscription_note(ranks.local_world_size, torch.get_num_threads(), cores(), 0) if on_cpu else None)
    result = {
        "benchmark": "loop_overhead",
        "strategy": "no DDP" if ranks.launcher == "python" else "DDP",
        "world_size": ranks.world_size,
        "command": launched(ranks, "benchmarks/loop_overhead.py", sys.argv[1:]),
        "date": date(),
        "git_commit": about["git_commit"],
        "versions": about["versions"],
        "hardware": hardware(about["device"]),
        "threads": torch.get_num_threads(),
        "notes": list(filter(None, notes)),
        "rows": rows,
    }
    print(f"\n{table(result)}", flush=True)
    if options.output:
        write_json(result, options.output, "--output")


if __name__ == "__main__":
    main()
