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
import json
import math
import os
import socket
import statistics
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from by_hand_contestants import CASES, COMPARISONS, Contestant  # beside this file
from by_hand_report import plot, table
from loop_overhead import timed
from report import (
    cores,
    date,
    hardware,
    other_load_note,
    oversubscription_note,
    processor_seconds,
    quartiles,
    since,
    without_paths,
    write_json,
)
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

from common.ranks import Ranks, fail, join
from common.runs.run_folder import environment_record

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "collectives"))  # a lesson is no package

from bandwidth_measure import slowest  # by the path above
from bandwidth_output import check_outputs

WARM_UP_STEPS = 3  # DDP rebuilds its buckets after the first backward
TURN_SECONDS = 0.2  # steps a turn, unless given: so many that the slowest contestant's turn lasts this long


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
    check_outputs(ranks, json=options.json, plot=options.plot)
    hosts = len(set(ranks.all_gather(socket.gethostname())))

    jobs = [(comparison, case) for comparison in options.compare for case in COMPARISONS[comparison][1]]
    before, found = processor_seconds(), []
    with tqdm(total=len(jobs) * options.turns, unit="turn", disable=None if ranks.is_main else True) as bar:
        for comparison, case in jobs:
            bar.set_description(f"{comparison} {case}")
            found.append(compare(comparison, case, options.turns, options.steps, ranks, bar))
    seconds, busy, ours = since(before)
    everyone = ranks.all_gather((machine(), ours))
    on_this_machine = [its for where, its in everyone if where == machine()]
    ranks.leave()
    if not ranks.is_main:
        return
    notes = [
        other_load_note(seconds, busy, sum(on_this_machine)),
        oversubscription_note(len(on_this_machine), torch.get_num_threads(), cores(), 0),
    ]
    software = environment_record("torch")
    result = {
        "benchmark": "by_hand",
        "world_size": ranks.world_size,
        "hosts": hosts,
        "network": options.network,
        "command": command(),
        "date": date(),
        "git_commit": software["git_commit"],
        "versions": software["versions"],
        "hardware": hardware("CPU"),
        "threads": torch.get_num_threads(),
        "notes": list(filter(None, notes)),
        "comparisons": found,
    }
    print(f"\n{table(result)}", flush=True)
    if options.json:
        write_json(result, Path(options.json), "--json")
    if options.plot:
        plot([result], Path(options.plot))


if __name__ == "__main__":
    main()
