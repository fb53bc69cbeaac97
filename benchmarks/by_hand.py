"""What is written by hand against the library: time of a step, and how much of the communication is hidden.

    torchrun --nproc-per-node=2 benchmarks/by_hand.py                              # five comparisons, about two minutes
    torchrun --nproc-per-node=2 benchmarks/by_hand.py --compare ddp hidden --turns 40 --json result.json
    sbatch benchmarks/by_hand.sbatch --network "throttled to 200 Mbit/s"           # on the laptop cluster
    python benchmarks/by_hand.py first.json second.json --plot by_hand.png         # draw what was measured

    ddp      torch's DistributedDataParallel and BucketedDataParallel, with the same buckets
    naive    NaiveDataParallel, OverlappedDataParallel, BucketedDataParallel
    fsdp     torch's fully_shard (FSDP2) and from_scratch/fully_sharded.py, each block a unit
    ring     dist.all_reduce and the ring of collectives/ring_all_reduce.py, by message size
    hidden   the share of communication that runs while backward computes, by hand and in torch's DDP

All on the CPU with Gloo. The contestants of a comparison have their own copy of the same model, see the same batch and
take turns, a few steps each; who begins changes from turn to turn. A ratio is taken within each turn, and the table
gives median and quartiles over the turns. In the end all must hold the same parameters, on all ranks: to the bit on
two ranks, within rounding on more. Otherwise somebody did other work, and the program fails.
"""

import argparse
import copy
import json
import math
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from loop_overhead import quartiles, timed  # beside this file
from scaling import cores, hardware, in_words, neighbours, plural, processor_seconds, sharing, without_paths
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common.ranks import Ranks, fail, join
from common.transformer import ModelConfig, Transformer

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "from_scratch"), str(ROOT / "collectives")]  # lessons are scripts, not packages

from bandwidth import BandwidthConfig, check_outputs, slowest  # noqa: E402  (needs the path above)
from data_parallel import BucketedDataParallel, NaiveDataParallel, OverlappedDataParallel  # noqa: E402
from fully_sharded import finish as finish_by_hand  # noqa: E402
from fully_sharded import full_state_dict  # noqa: E402
from fully_sharded import fully_shard as fully_shard_by_hand  # noqa: E402
from ring_all_reduce import ring_all_reduce  # noqa: E402

WARM_UP_STEPS = 3  # DDP rebuilds its buckets after the first backward
TURN_SECONDS = 0.2  # steps a turn, unless given: so many that the slowest contestant's turn lasts this long
SIZES = [4 * 2**10, 64 * 2**10, 2**20, 16 * 2**20]  # of the ring's messages, in bytes
MiB = 2**20

Batch = tuple[Tensor, Tensor]


class Linears(nn.Module):
    """Square matrices, one after the other: few, large gradients. Gives the sum of squared errors."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        for layer in self.layers:
            inputs = torch.tanh(layer(inputs))
        return F.mse_loss(inputs, targets, reduction="sum")


@dataclass(frozen=True)
class Case:
    """A model and a batch: `rows` of `width` numbers for Linears, `rows` × `sequence` tokens for a Transformer."""

    what: str
    build: Callable[[], nn.Module]
    rows: int
    bucket_bytes: int = 0
    width: int = 0
    sequence: int = 0

    def batch(self, rank: int) -> Batch:
        """This rank's own inputs and targets."""
        generator = torch.Generator().manual_seed(rank)
        if self.sequence:
            text = torch.randint(256, (self.rows, self.sequence + 1), generator=generator)
            return text[:, :-1].contiguous(), text[:, 1:].contiguous()
        inputs, targets = torch.randn(2, self.rows, self.width, generator=generator)
        return inputs, targets


CASES = {
    # 75 gradients of 64 bytes to 16 KiB, one bucket: a message costs its latency
    "deep": Case(
        "8 narrow blocks",
        lambda: Transformer(ModelConfig(width=16, layers=8, heads=2, kv_heads=2, ffn_width=48), seed=1),
        rows=1, sequence=16, bucket_bytes=MiB,
    ),
    # three gradients of 4 MiB and a small batch: a message costs its bytes
    "wide": Case("3 wide layers", lambda: Linears(1024, 3), rows=8, width=1024, bucket_bytes=4 * MiB),
    # the same with enough computation to hide communication behind
    "balanced": Case("6 layers, large batch", lambda: Linears(768, 6), rows=512, width=768, bucket_bytes=2 * MiB),
    # the model of all lessons: four blocks
    "tiny": Case("tiny, 4 blocks", lambda: Transformer(ModelConfig(preset="tiny"), seed=1), rows=2, sequence=64),
}  # fmt: skip


@dataclass
class Contestant:
    """One way to do the same work. The first of a comparison is the one that the others are held against."""

    name: str
    step: Callable[[], object]
    ended: Callable[[], dict[str, Tensor]]  # whole tensors by name, on every rank; may communicate
    reset: Callable[[], object] = lambda: None  # before each turn, off the clock
    alone: bool = False  # computes without communication: its parameters are nobody else's


def nothing() -> None:
    """There is nothing to wait for."""


def trained(
    name: str,
    model: nn.Module,
    batch: Batch,
    wrapped: nn.Module,
    finish: Callable[[], object] = nothing,
    around: Callable[[], AbstractContextManager] = nullcontext,
    ended: Callable[[], dict[str, Tensor]] | None = None,
    alone: bool = False,
) -> Contestant:
    """Plain SGD on one batch: what is computed beside communication shall be little, and the same for all."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003, foreach=True)  # there is no fused one for DTensors
    targets = batch[1]
    samples = len(targets) if targets.is_floating_point() else targets.numel()  # a token is a sample

    def step() -> None:
        with around():
            (wrapped(*batch) / samples).backward()
        finish()
        optimizer.step()
        optimizer.zero_grad()

    def parameters() -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    return Contestant(name, step, ended or parameters, alone=alone)


# ------------------------------------------------------------------------------------------ the comparisons


def data_parallel(case: str, rank: int, kinds: list[str]) -> list[Contestant]:
    """Contestants by kind, each with a model of its own."""
    chosen, found = CASES[case], []
    model, batch = chosen.build(), chosen.batch(rank)
    for kind in kinds:
        mine = copy.deepcopy(model)
        if kind == "torch DDP":
            mib = chosen.bucket_bytes / MiB
            ddp = DistributedDataParallel(mine, bucket_cap_mb=mib, gradient_as_bucket_view=True)
            found.append(trained(kind, mine, batch, ddp))
        elif kind in ("naive", "overlapped"):
            by_hand = {"naive": NaiveDataParallel, "overlapped": OverlappedDataParallel}[kind](mine)
            found.append(trained(kind, mine, batch, by_hand, by_hand.finish))
        else:
            by_hand = BucketedDataParallel(mine, bucket_bytes=chosen.bucket_bytes)
            if kind == "buckets after backward":  # the same messages, but `finish` starts them all
                found.append(trained(kind, mine, batch, by_hand, by_hand.finish, by_hand.no_sync))
            elif kind == "no communication":
                found.append(trained(kind, mine, batch, by_hand, around=by_hand.no_sync, alone=True))
            else:
                found.append(trained(kind, mine, batch, by_hand, by_hand.finish))
    return found


def compare_ddp(case: str, rank: int) -> list[Contestant]:
    return data_parallel(case, rank, ["torch DDP", "bucketed by hand"])


def compare_naive(case: str, rank: int) -> list[Contestant]:
    return data_parallel(case, rank, ["naive", "overlapped", "bucketed"])


def compare_hidden(case: str, rank: int) -> list[Contestant]:
    return data_parallel(case, rank, ["buckets after backward", "bucketed by hand", "torch DDP", "no communication"])


def compare_fsdp(case: str, rank: int) -> list[Contestant]:
    chosen = CASES[case]
    batch = chosen.batch(rank)
    theirs, ours = chosen.build(), chosen.build()
    for model, fully_shard in ((theirs, torch_fully_shard), (ours, fully_shard_by_hand)):
        for block in model.blocks.values():
            fully_shard(block, reshard_after_forward=True)
        fully_shard(model, reshard_after_forward=False)  # its backward begins at once
    return [
        trained(
            "torch fully_shard", theirs, batch, theirs,
            ended=lambda: {name: parameter.full_tensor().detach() for name, parameter in theirs.named_parameters()},
        ),
        trained(
            "by hand", ours, batch, ours, lambda: finish_by_hand(ours), ended=lambda: full_state_dict(ours)
        ),
    ]  # fmt: skip


def compare_ring(case: str, rank: int) -> list[Contestant]:
    """`case` is a number of bytes. Each operation is done on the result of the one before."""
    # Whole numbers: on two ranks every sum of sums is exact, so that the buffers tell how many operations there were.
    start = (torch.arange(int(case) // 4) % 3 + rank).float()

    def contestant(name: str, operation: Callable[[Tensor], object]) -> Contestant:
        buffer = start.clone()
        return Contestant(name, lambda: operation(buffer), lambda: {"sum": buffer}, lambda: buffer.copy_(start))

    return [contestant("dist.all_reduce", dist.all_reduce), contestant("ring by hand", ring_all_reduce)]


COMPARISONS: dict[str, tuple[Callable[[str, int], list[Contestant]], list[str]]] = {
    "ddp": (compare_ddp, ["deep", "wide"]),
    "naive": (compare_naive, ["deep", "wide"]),
    "fsdp": (compare_fsdp, ["tiny"]),
    "ring": (compare_ring, [str(size) for size in SIZES]),
    "hidden": (compare_hidden, ["balanced"]),
}


def hidden_share(seconds: float, compute: float, after: float) -> float:
    """Share of communication that costs no time: 1 − (T − T_compute) / (T_after − T_compute).

    1: the step takes as long as without communication; 0: as long as when communication begins after backward.
    """
    return 1 - (seconds - compute) / (after - compute)


# ------------------------------------------------------------------------------------------------- measuring


def messages_so_far() -> int:
    """Collectives that this rank has entered, whoever called them, in Python or in C++ (sends do not count)."""
    return dist.group.WORLD._get_sequence_number_for_group()


@dataclass
class Turns:
    """What was seen; all but `steps` by contestant, times of a step by turn, those of the slowest rank."""

    seconds: list[list[float]]
    cpu_seconds: list[list[float]]  # of all threads, Gloo's too
    collectives: list[float]  # of a step
    steps: int  # of a turn


def take_turns(contestants: list[Contestant], turns: int, steps: int | None, ranks: Ranks, bar: tqdm) -> Turns:
    """Let all contestants warm up, then take turns."""
    for each in contestants:
        timed(each.step, WARM_UP_STEPS, ranks)
    most = int(100 / math.log2(ranks.world_size))  # the ring's sums stay below the greatest fp32, 2^127
    pilot = slowest([timed(each.step, WARM_UP_STEPS, ranks)[0] for each in contestants], ranks)
    steps = min(most, steps or math.ceil(TURN_SECONDS / max(pilot)))

    times: list[list[tuple[float, float]]] = [[] for _ in contestants]
    collectives = [0.0 for _ in contestants]
    numbers = list(range(len(contestants)))
    for turn in range(turns):
        first = turn % len(numbers)
        order = numbers[first:] + numbers[:first]
        for number in order if turn // len(numbers) % 2 == 0 else reversed(order):
            each = contestants[number]
            each.reset()
            before = messages_so_far()
            times[number].append(timed(each.step, steps, ranks))
            collectives[number] = (messages_so_far() - before - 1) / steps  # `timed` begins with a barrier
        bar.update()
    wall, cpu = ([slowest([turn[which] for turn in each], ranks) for each in times] for which in (0, 1))
    return Turns(wall, cpu, collectives, steps)


def verdict(contestants: list[Contestant], start: list[dict[str, Tensor]], seen: Turns, ranks: Ranks) -> str | None:
    """What makes the comparison unfair, on any rank: None when all did the same work."""
    problem, reference = None, {}
    steps = 2 * WARM_UP_STEPS + len(seen.seconds[0]) * seen.steps
    for each, before, count in zip(contestants, start, seen.collectives, strict=True):
        ended = {name: tensor.clone() for name, tensor in each.ended().items()}
        sums = ranks.all_gather({name: zlib.crc32(tensor.numpy().tobytes()) for name, tensor in ended.items()})
        if any(torch.equal(ended[name], before[name]) for name in ended):
            problem = f"{each.name}: a parameter never moved"
        if each.alone:
            if count:
                problem = f"{each.name}: {count:g} collectives a step, expected none"
            continue
        if any(other != sums[0] for other in sums):
            problem = f"{each.name}: the ranks ended with different parameters"
        reference = reference or ended
        if ended.keys() != reference.keys():
            problem = f"{each.name}: other parameters than {contestants[0].name}"
            continue
        for name, expected in reference.items():
            difference = float((ended[name] - expected).abs().max())
            # A sum of two numbers is the same in either order. Of three or more it rounds differently in buckets that
            # are cut differently: in each step by an eps of the weight, and of the way that it has gone by what the
            # steps make of it. A step left out is some thousandth of the way, or more.
            way, weight = float((expected - before[name]).abs().max()), float(expected.abs().max())
            rounding = 1e-3 * way + steps * torch.finfo(expected.dtype).eps * weight
            allowed = 0.0 if ranks.world_size == 2 else rounding
            if not difference <= allowed:  # so that NaN is a difference
                found = f"{name} differs by up to {difference:.3g} from that of {contestants[0].name}"
                problem = f"{each.name}: {found}, allowed: {allowed:.3g}"
    return next(filter(None, ranks.all_gather(problem)), None)


def compare(comparison: str, case: str, turns: int, steps: int | None, ranks: Ranks, bar: tqdm) -> dict[str, Any]:
    """One comparison of one case: a row of results for each contestant. Ends the program where it was not fair."""
    contestants = COMPARISONS[comparison][0](case, ranks.rank)
    start = [{name: tensor.clone() for name, tensor in each.ended().items()} for each in contestants]
    seen = take_turns(contestants, turns, steps, ranks, bar)
    if problem := verdict(contestants, start, seen, ranks):
        fail(f"{comparison}, {case}: not the same work ({problem}); comparing the times is worth nothing")
    ring = comparison == "ring"
    rows, seconds = [], seen.seconds
    after, compute = (statistics.median(seconds[number]) for number in (0, -1))
    something_to_hide = contestants[-1].alone and after > 1.1 * compute  # else a share of it is noise
    for each, times, cpu, count in zip(contestants, seconds, seen.cpu_seconds, seen.collectives, strict=True):
        row = {
            "contestant": each.name,
            "collectives_per_step": None if ring else count,
            "step_seconds": quartiles(times),
            "step_cpu_seconds": quartiles(cpu),
            "ratio": quartiles([mine / theirs for mine, theirs in zip(times, seconds[0], strict=True)]),
        }
        if something_to_hide and each not in (contestants[0], contestants[-1]):
            every = zip(times, seconds[-1], seconds[0], strict=True)
            row["hidden"] = quartiles([hidden_share(*turn) for turn in every])
        rows.append(row)
    numel = sum(tensor.numel() for tensor in start[0].values())
    return {
        "comparison": comparison,
        "case": f"{int(case) // 1024:,} KiB" if ring else f"{case}: {CASES[case].what}",
        "bytes": 4 * numel,
        "bucket_bytes": None if ring else CASES[case].bucket_bytes or None,
        "turns": turns,
        "steps_per_turn": seen.steps,
        "same_result": True,
        "rows": rows,
    }


# ---------------------------------------------------------------------------------------------------- output


def spread(value: dict[str, float], form: str, factor: float = 1.0) -> str:
    """Median (quartiles)."""
    middle, low, high = (format(value[key] * factor, form) for key in ("median", "lower_quartile", "upper_quartile"))
    return f"{middle} ({low} – {high})"


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    lines = [
        f"by hand against the libraries: {result['world_size']} ranks on {plural(result['hosts'], 'host')}, Gloo, "
        f"network: {result['network']}",
        "",
        "| comparison | case | contestant | collectives a step | CPU, ms | step, ms "
        "| time / the first one's | hidden, % |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for one in result["comparisons"]:
        for number, row in enumerate(one["rows"]):
            cells = (
                one["comparison"],
                one["case"],
                row["contestant"],
                "–" if row["collectives_per_step"] is None else f"{row['collectives_per_step']:g}",
                f"{row['step_cpu_seconds']['median'] * 1e3:,.2f}",
                spread(row["step_seconds"], ",.2f", 1e3),
                spread(row["ratio"], ".2f") if number else "1",
                spread(row["hidden"], ".0f", 100) if "hidden" in row else "",
            )
            lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    steps = dict.fromkeys(
        f"{one['comparison']} {one['case'].split(':')[0]} {one['turns']} × {one['steps_per_turn']}"
        for one in result["comparisons"]
    )
    lines += [
        "",
        "- median (quartiles) over all turns; ratios and shares are taken within each turn; CPU: processor time of a "
        "rank, Gloo's threads included",
        f"- turns × steps a turn: {', '.join(steps)}; {plural(result['threads'], 'thread')} a rank; "
        "all contestants of a comparison ended with the same parameters",
        f"- {in_words(result['hardware'])}; {versions}; commit {result['git_commit']}; {result['date']}",
        *(f"- {note}" for note in result["notes"]),
        f"- `{result['command']}`",
    ]
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Ratios, the ring by message size, and the hidden share, of several networks, into a PNG."""
    from matplotlib.figure import Figure  # without pyplot: no window system is touched

    figure = Figure(figsize=(13, 5.2), dpi=130, layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.45, 1, 1])
    colours = [f"C{number}" for number in range(len(results))]

    def bars(value: dict[str, float], factor: float = 1.0) -> tuple[float, list[list[float]]]:
        low, at, high = (value[key] * factor for key in ("lower_quartile", "median", "upper_quartile"))
        return at, [[at - low], [high - at]]

    names: list[str] = []
    for place, (result, colour) in enumerate(zip(results, colours, strict=True)):
        shift = 0.22 * (place - (len(results) - 1) / 2)
        left.plot([], [], "o", color=colour, label=result["network"])
        ring = [one for one in result["comparisons"] if one["comparison"] == "ring"]
        for one in result["comparisons"]:
            for row in one["rows"][1:]:
                if one["comparison"] in ("ddp", "naive", "fsdp"):
                    label = f"{row['contestant']} / {one['rows'][0]['contestant']}\n{one['case'].split(':')[0]}"
                    if label not in names:
                        names.append(label)
                    at, error = bars(row["ratio"])
                    left.errorbar(at, names.index(label) + shift, xerr=error, fmt="o", color=colour, capsize=3)
        if ring:
            sizes = [one["bytes"] for one in ring]
            ratios = [bars(one["rows"][1]["ratio"]) for one in ring]
            errors = [[error[side][0] for _, error in ratios] for side in (0, 1)]
            middle.errorbar(sizes, [at for at, _ in ratios], yerr=errors, fmt="o-", color=colour, capsize=3)
        shares = [(row, one) for one in result["comparisons"] for row in one["rows"] if "hidden" in row]
        for number, (row, _) in enumerate(shares):
            at, error = bars(row["hidden"], 100)
            style = {"color": colour, "capsize": 4, "width": 0.2, "alpha": 0.75}
            right.bar(number + shift, at, yerr=error, **style)
        if shares:
            right.set_xticks(range(len(shares)), [row["contestant"] for row, _ in shares])
    left.axvline(1, color="0.4", linestyle="--")
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.invert_yaxis()
    left.set(xscale="log", xlabel="time / the other's (below 1: faster)", title="A step")
    left.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    left.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if value in (0.3, 0.5, 0.7, 2, 3, 5) else "")
    left.legend(fontsize=8, title="network", title_fontsize=8)
    middle.axhline(1, color="0.4", linestyle="--")
    middle.set(xscale="log", xlabel="bytes", ylabel="time / dist.all_reduce's", title="The ring by hand")
    middle.set_ylim(0)
    right.set(ylabel="%", title="Communication hidden")
    right.axhline(100, color="0.4", linestyle="--")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    first = results[0]
    where = f"{first['world_size']} ranks on {plural(first['hosts'], 'host')}, Gloo; median and quartiles over turns"
    figure.suptitle(f"{where}\n{in_words(first['hardware'])}; {first['date'][:10]}", fontsize=10)
    figure.savefig(path, format="png")


# ------------------------------------------------------------------------------------------------------ main


def parse_arguments() -> argparse.Namespace:
    """The options; a mistake ends in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail  # type: ignore[method-assign]
    add = parser.add_argument
    add("results", nargs="*", metavar="RESULT.json", help="draw these into --plot instead of measuring")
    add("--compare", nargs="+", choices=list(COMPARISONS), default=list(COMPARISONS), help="default: all five")
    add("--turns", type=int, default=20, help="turns of each contestant (default: 20)")
    add("--steps", type=int, help=f"steps a turn (default: as many as take {TURN_SECONDS:g} s)")
    add("--network", default="as it is", help="what the network is, in words, for the table")
    add("--json", help="write the result to this file")
    add("--plot", help="draw into this PNG")
    options = parser.parse_args()
    if options.turns < 1 or (options.steps is not None and options.steps < 1):
        fail(f"--turns {options.turns} and --steps {options.steps} must both be at least 1")
    if options.results and not options.plot:
        fail(f"{options.results[0]}: results are drawn, and there is no --plot; name a PNG, such as --plot by_hand.png")
    return options


def draw(options: argparse.Namespace) -> None:
    """Draw earlier results."""
    results = []
    for name in options.results:
        try:
            results.append(json.loads(Path(name).read_text()))
        except (OSError, ValueError) as error:
            fail(f"{name}: {getattr(error, 'strerror', error)}; expected a file that --json wrote")
        if not isinstance(results[-1], dict) or results[-1].get("benchmark") != "by_hand":
            fail(f"{name} is no result of this benchmark; expected a file that --json wrote")
    try:
        plot(results, Path(options.plot))
    except OSError as error:
        fail(f"--plot {options.plot}: {error.strerror}; choose a file you can write")


def machine() -> str:
    """This machine, as its kernel calls it: nodes of the laptop cluster have names of their own, and one kernel."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text() if boot.is_file() else socket.gethostname()


def command() -> str:
    """How this was started, for others to repeat."""
    per_node, nodes = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("SLURM_NNODES", "1")
    launcher = ["torchrun", f"--nproc-per-node={per_node}", "benchmarks/by_hand.py"]
    if nodes != "1":
        launcher = ["sbatch", f"--nodes={nodes}", f"--gpus-per-node={per_node}", "benchmarks/by_hand.sbatch"]
    return without_paths([*launcher, *sys.argv[1:]])


@record
def main() -> None:
    options = parse_arguments()
    if options.results:
        draw(options)
        return
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    ranks = join("cpu", timeout_s=120)
    if ranks.world_size < 2:
        fail("one process has nobody to send to; start several with torchrun --nproc-per-node=2")
    check_outputs(BandwidthConfig(json=options.json, plot=options.plot), ranks)
    hosts = len(set(ranks.all_gather(socket.gethostname())))

    jobs = [(comparison, case) for comparison in options.compare for case in COMPARISONS[comparison][1]]
    before, found = processor_seconds(), []
    with tqdm(total=len(jobs) * options.turns, unit="turn", disable=None if ranks.is_main else True) as bar:
        for comparison, case in jobs:
            bar.set_description(f"{comparison} {case}")
            found.append(compare(comparison, case, options.turns, options.steps, ranks, bar))
    seconds, busy, ours = (now - then for now, then in zip(processor_seconds(), before, strict=True))
    everyone = ranks.all_gather((machine(), ours))
    on_this_machine = [its for where, its in everyone if where == machine()]
    ranks.leave()
    if not ranks.is_main:
        return
    notes = [
        neighbours(seconds, busy, sum(on_this_machine)),
        sharing(len(on_this_machine), torch.get_num_threads(), cores(), 0),
    ]
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    result = {
        "benchmark": "by_hand",
        "world_size": ranks.world_size,
        "hosts": hosts,
        "network": options.network,
        "command": command(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "git_commit": commit or None,
        "versions": {"python": platform.python_version()}
        | {"torch": torch.__version__, "numpy": metadata.version("numpy")},
        "hardware": hardware("CPU"),
        "threads": torch.get_num_threads(),
        "notes": list(filter(None, notes)),
        "comparisons": found,
    }
    print(f"\n{table(result)}", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if options.plot:
        plot([result], Path(options.plot))


if __name__ == "__main__":
    main()
