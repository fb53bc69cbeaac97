"""What `common/` costs: the training step of ddp/train.py against a bare loop of the same model, interleaved.

    python benchmarks/loop_overhead.py                               # one process; about half a minute
    torchrun --nproc-per-node=2 benchmarks/loop_overhead.py          # both loops under DDP

Ours is the loop of ddp/train.py, line by line (a test compares them): batches from the Loader, learning rate, autocast
and scaler, clipping, metric line with its sum over the ranks, progress bar, replica check. The bare loop is what one
would write with nothing else: tokens that are on the device already, forward, backward, clip, step. Both have their own
copy of the same model and optimizer, see the same batches, and must end with the same bits in every parameter.

The two take turns, a few steps each, and every second time the other one begins. Overhead is ours / bare - 1 within
such a pair; the table gives its median and quartiles over all pairs. Evaluation and checkpoints are not part of a step.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from scaling import cores, hardware, in_words, without_paths  # the file beside this one
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from common.checkpoint import all_gather
from common.config import Config, TrainConfig
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
    "mini": (dict(width=64, layers=2, heads=4, kv_heads=2, ffn_width=192), 4, 64, 25),  # a few ms: overhead shows
    "tiny": (dict(preset="tiny"), 8, 128, 3),  # the model of all lessons, about 100 ms on one core
    "gpt_124m": (dict(preset="gpt_124m"), 8, 1024, 5),  # for a GPU
}


class Terminal(io.StringIO):
    """Stands in for a terminal, so that our loop draws its progress bar and prints its lines as in real use."""

    def isatty(self) -> bool:
        return True


class Contest:
    """The two loops over equal models; each advances by `next(…)`, one optimizer step at a time."""

    def __init__(self, size: str, ranks: Ranks, steps: int, folder: str) -> None:
        model, samples, length, _ = SIZES[size]
        self.ranks = ranks
        self.config = Config(
            train=TrainConfig(steps=steps + 1),  # the last step, with evaluation and checkpoint, is never reached
            batch=BatchConfig(global_size=samples * ranks.world_size),
            data=TextConfig(sequence_length=length),
            model=ModelConfig(**model),
            optimizer=OptimizerConfig(warmup_steps=0, min_lr_ratio=1.0),  # computed each step, and always the same
            runs_dir=folder,
        )
        self.train_set, _ = text_datasets(self.config.data, self.config.model.vocabulary)
        self.plan = BatchPlan(self.config.batch, len(self.train_set), self.config.seed, ranks.rank, ranks.world_size)
        self.tokens_per_step = self.config.batch.global_size * self.config.data.sequence_length
        self.our_model, self.our_ddp_model = self.build_model()
        self.bare_model, self.bare_ddp_model = self.build_model()
        self.start = [parameter.detach().clone() for parameter in self.our_model.parameters()]
        self.loader = Loader(self.train_set, self.plan, ranks.device)
        self.optimizer = build_optimizer(self.our_model.parameters(), self.config.optimizer, ranks.device)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=False)
        flops = flops_per_token(self.config.model, length)
        self.run = Run(self.config, ranks, "ddp", self.tokens_per_step, flops_per_unit=flops)
        self.run.restore(self.our_model, self.optimizer, self.scaler)
        ahead = Loader(self.train_set, self.plan, ranks.device)
        self.batches = [batch for step in range(steps) for batch, _ in ahead.micro_batches(step)]

    def build_model(self) -> tuple[Transformer, torch.nn.Module]:
        """The model and what computes with it: under a launcher its DDP wrapper, otherwise itself."""
        model = Transformer(self.config.model, self.config.seed).to(self.ranks.device)
        if self.ranks.launcher == "python":
            return model, model
        return model, DistributedDataParallel(model, device_ids=self.ranks.device_ids, gradient_as_bucket_view=True)

    def ours(self) -> Iterator[None]:
        """The loop of ddp/train.py. What it does at the very end of a training is left out."""
        config, ranks, run, loader, optimizer, scaler = (
            self.config, self.ranks, self.run, self.loader, self.optimizer, self.scaler,
        )  # fmt: skip
        model, ddp_model, tokens_per_step = self.our_model, self.our_ddp_model, self.tokens_per_step
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
            run.save_if_due(step, model, optimizer, scaler)
            yield

    def bare(self) -> Iterator[None]:
        """The same training with nothing around it."""
        model, ddp_model = self.bare_model, self.bare_ddp_model
        optimizer = build_optimizer(model.parameters(), self.config.optimizer, self.ranks.device)
        world_size, tokens_per_step, clip = self.ranks.world_size, self.tokens_per_step, self.config.optimizer.clip
        for tokens, targets in self.batches:
            (ddp_model(tokens, targets) * world_size / tokens_per_step).backward()
            clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            yield

    def verdict(self) -> str | None:
        """What makes the comparison unfair, on any rank: None when both loops did the same training."""
        pairs = list(zip(self.our_model.parameters(), self.bare_model.parameters(), self.start, strict=True))
        moved = all(not torch.equal(ours, start) for ours, _, start in pairs)
        difference = max(float((ours - bare).abs().max()) for ours, bare, _ in pairs)
        # Some CUDA kernels add up in no fixed order, and AdamW amplifies last bits: 1e-3 there, the same bits here.
        same = same_bits(self.our_model, self.bare_model) or (self.ranks.device.type == "cuda" and difference < 1e-3)
        found = "a parameter never moved" if not moved else f"parameters differ by up to {difference:.3g}" if not same else None
        return next(filter(None, all_gather(found)), None)

    def parts(self) -> dict[str, tuple[Callable[[], object], float]]:
        """What ours does and bare does not, as calls of their own, and how often a step makes them."""
        run, config, step = self.run, self.config, itertools.count(len(self.batches))
        steps, loss_sum, grad_norm = run.steps(), torch.ones((), dtype=torch.float64), torch.ones(())
        loss_sum, grad_norm = loss_sum.to(self.ranks.device), grad_norm.to(self.ranks.device)
        autocast = torch.autocast(self.ranks.device.type, enabled=False)

        def new_rate() -> None:
            set_learning_rate(self.optimizer, learning_rate(1, config.train.steps, config.optimizer))

        def sums() -> None:
            total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
            with autocast:
                total += loss_sum

        parts: dict[str, tuple[Callable[[], object], float]] = {
            "metric line, sum over the ranks (Run.log)": (lambda: run.log(next(step), loss_sum, grad_norm, 1e-3), 1.0),
            "next batch (Loader)": (lambda: list(self.loader.micro_batches(next(step))), 1.0),
            "seed of the step, progress bar (Run.steps)": (lambda: next(steps), 1.0),
            "learning rate": (new_rate, 1.0),
            "loss sum, autocast": (sums, 1.0),
        }
        if every := config.train.check_replicas_every * (self.ranks.world_size > 1):
            parts[f"replica check, every {every} steps"] = (lambda: check_replicas(self.our_model, 0), 1 / every)
        return parts


def same_bits(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether all parameters of two models are equal, bit by bit."""
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


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


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles; of fewer than two values, the value itself."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def compare(size: str, ranks: Ranks, pairs: int, steps: int, bar: tqdm) -> dict[str, Any]:
    """Let both loops take turns, `pairs` times `steps` steps each after one turn of warm-up; returns one result row."""
    screen = Terminal()
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            contest = Contest(size, ranks, (pairs + 1) * steps, folder)
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
        problem = contest.verdict()
        parts: dict[str, float] = {}
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            for name, (call, per_step) in contest.parts().items():
                # Ten calls at a time: a printed line every ten steps belongs to the cost of Run.log.
                turns = [timed(call, 10, ranks)[0] for _ in range(max(1, min(20, steps * pairs // 10)))]
                parts[name] = statistics.median(turns) * per_step
            contest.run.finish()
    if problem:
        fail(f"{size}: the two loops did not do the same training: {problem}; this comparison would be worth nothing")

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
        "overhead": overhead(wall),
        "overhead_cpu_time": overhead(cpu) if ranks.device.type == "cpu" else None,
        "parts_seconds_per_step": parts,
        "same_parameters": True,
        "record": contest.run.record if ranks.is_main else {},
    }


def table(result: dict[str, Any]) -> str:
    """The result in Markdown: the comparison, then where the difference goes."""

    def percent(value: dict[str, float] | None) -> str:
        if value is None:
            return "–"
        return " ".join(
            [f"{value['median']:+.1%}", f"({value['lower_quartile']:+.1%} – {value['upper_quartile']:+.1%})"]
        )

    rows = result["rows"]
    lines = [
        f"{result['strategy']}, {result['world_size']} process{'es' * (result['world_size'] > 1)}: our step against a bare loop",
        "",
        "| model | parameters | tokens a rank and step | bare, ms | ours, ms | overhead, wall time | overhead, CPU time |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = (
            row["size"],
            f"{row['parameters']:,}",
            f"{row['tokens_per_rank_and_step']:,}",
            f"{row['bare_step_seconds']['median'] * 1e3:.2f}",
            f"{row['ours_step_seconds']['median'] * 1e3:.2f}",
            percent(row["overhead"]),
            percent(row["overhead_cpu_time"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| part of our step, µs | {' | '.join(row['size'] for row in rows)} |", f"|---|{'---:|' * len(rows)}"]
    for part in rows[0]["parts_seconds_per_step"]:
        shares = [
            f"{row['parts_seconds_per_step'][part] * 1e6:,.0f} "
            f"({row['parts_seconds_per_step'][part] / row['bare_step_seconds']['median']:.1%})"
            for row in rows
        ]
        lines.append(f"| {part} | {' | '.join(shares)} |")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    turns = ", ".join(f"{row['size']} {row['pairs']} × {row['steps_per_turn']}" for row in rows)
    lines += [
        "",
        "- overhead = ours / bare - 1 within each pair of turns: median (quartiles); parts: timed on their own, in % of the bare step",
        f"- pairs × steps a turn: {turns}; "
        f"{result['threads']} thread{'s' * (result['threads'] != 1)} a process; "
        "both loops ended with the same parameters",
        f"- {in_words(result['hardware'])}; {versions}; commit {result['git_commit']}; {result['date']}",
        *(f"- {note}" for note in result["notes"]),
        f"- `{result['command']}`",
    ]
    return "\n".join(lines)


@record
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["mini", "tiny"], help="default: mini tiny")
    parser.add_argument("--pairs", type=int, default=24, help="turns of each loop (default: 24)")
    parser.add_argument("--steps", type=int, help="steps per turn (default: by size, for turns of some tenths of a second)")
    parser.add_argument("--output", type=Path, help="also write the result to this JSON file")
    options = parser.parse_args()
    if options.pairs < 1 or (options.steps is not None and options.steps < 1):
        fail(f"--pairs {options.pairs} and --steps {options.steps} must both be at least 1")
    load = os.getloadavg()[0]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # torchrun's default: one thread a process
    ranks = join() if "RANK" in os.environ else single_process()

    rows = []
    total = len(options.sizes) * (options.pairs + 1)
    with tqdm(total=total, unit="pair", disable=None if ranks.is_main else True) as bar:
        for size in options.sizes:
            bar.set_description(size)
            rows.append(compare(size, ranks, options.pairs, options.steps or SIZES[size][3], bar))
    ranks.leave()
    if not ranks.is_main:
        return
    first = [row.pop("record") for row in rows][0]
    notes = []
    if load > 0.5:
        notes.append(f"others kept this machine busy: load average {load:.1f} on {cores()} cores at the start")
    if ranks.device.type == "cpu" and ranks.local_world_size * torch.get_num_threads() > cores():
        notes.append(f"{ranks.local_world_size} ranks share {cores()} cores")
    result = {
        "benchmark": "loop_overhead",
        "strategy": "no DDP" if ranks.launcher == "python" else "DDP",
        "world_size": ranks.world_size,
        "command": without_paths(
            ["python"] * (ranks.launcher == "python")
            + ["torchrun", f"--nproc-per-node={ranks.world_size}"] * (ranks.launcher != "python")
            + ["benchmarks/loop_overhead.py", *sys.argv[1:]]
        ),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "git_commit": first["git_commit"],
        "versions": first["versions"],
        "hardware": hardware(first["device"]),
        "threads": torch.get_num_threads(),
        "notes": notes,
        "rows": rows,
    }
    print(f"\n{table(result)}", flush=True)
    if options.output:
        try:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            fail(f"--output {options.output}: {error.strerror}; choose a file you can write")


if __name__ == "__main__":
    main()
