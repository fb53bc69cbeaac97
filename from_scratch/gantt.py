"""Draw what a pipeline did, name the schedule from the order of its events, and compare its idle time with theory.

    python from_scratch/gantt.py runs/NAME/events --out pipeline.png        # what pipeline_parallel.py recorded
    python from_scratch/gantt.py --simulate 1f1b --ranks 4 --micro_batches 8 --out ideal.png

A line of the log's .jsonl files has step, rank, stage, micro_batch, event (forward, backward, send, recv), start and
end in seconds. The name is read from nowhere: what is said to be AFAB but was recorded from 1F1B is called 1F1B.
"""

import argparse
import itertools
import json
from pathlib import Path

import matplotlib
from matplotlib import patches, pyplot
from pipeline_parallel import SCHEDULES, ideal_bubble, order

from common.config_fields import to_path
from common.ranks import fail

matplotlib.use("Agg")  # a file, no window
COLOURS = {"forward": "#4c78a8", "backward": "#f58518", "send": "#54a24b", "recv": "#bab0ac"}


def read(folder: Path) -> list[dict]:
    """The events of the last step (the first ones warm up) in a folder's .jsonl files, in order of their start."""
    events = [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    if not events:
        fail(f"no event in {folder}/*.jsonl; expected a folder that Pipeline.write_events filled")
    last = max(event["step"] for event in events)
    return sorted((event for event in events if event["step"] == last), key=lambda event: event["start"])


def computed(events: list[dict]) -> dict[int, list[dict]]:
    """Each rank's forwards and backwards, in order of their start."""
    work = sorted((e for e in events if e["event"] in ("forward", "backward")), key=lambda event: event["start"])
    return {rank: [e for e in work if e["rank"] == rank] for rank in sorted({e["rank"] for e in work})}


def shape(events: list[dict]) -> tuple[int, int, int]:
    """(ranks, micro-batches, stages a rank)."""
    stages = {(event["rank"], event["stage"]) for event in events}
    ranks, numbers = {rank for rank, _ in stages}, {event["micro_batch"] for event in events}
    return len(ranks), len(numbers), len(stages) // len(ranks)


def peak_in_flight(work: list[dict]) -> int:
    """The most (stage, micro-batch) whose forward was done and backward not yet, on one rank."""
    return max(itertools.accumulate(1 if event["event"] == "forward" else -1 for event in work))


def name_schedule(events: list[dict]) -> str:
    """AFAB, 1F1B or interleaved 1F1B, from the order of forwards and backwards on all ranks; else what it is not."""
    ranks, micro_batches, chunks = shape(events)
    kinds = {rank: "".join(event["event"][0] for event in row) for rank, row in computed(events).items()}
    total = micro_batches * chunks

    def alternates(a_rank: int, more: int) -> bool:  # after a warm-up one forward and one backward in turn
        warm_up = {rank: min(total, a_rank * (ranks - rank - 1) + more) for rank in kinds}
        return all(kinds[r] == "f" * w + "fb" * (total - w) + "b" * w for r, w in warm_up.items())

    if total == 1:
        return "AFAB or 1F1B (with one micro-batch they are the same)"
    several = f" with {chunks} stages a rank" if chunks > 1 else ""
    if all("bf" not in row for row in kinds.values()):
        return "AFAB" + several
    if several:
        return "interleaved 1F1B" + several if alternates(2, (chunks - 1) * ranks) else "none of AFAB, interleaved"
    return "1F1B" if alternates(1, 0) else "none of AFAB, 1F1B"


def bubble(events: list[dict]) -> float:
    """The share of the ranks' time, from the first forward to the last backward, in which they computed nothing."""
    work = [event for row in computed(events).values() for event in row]
    span = max(event["end"] for event in work) - min(event["start"] for event in work)
    return 1 - sum(event["end"] - event["start"] for event in work) / (span * shape(events)[0])


def simulate(schedule: str, ranks: int, micro_batches: int, chunks: int) -> list[dict]:
    """The events on ideal ranks: a forward takes 1 / chunks, a backward twice that. RuntimeError: a deadlock."""
    queues = [order(schedule, rank, ranks, micro_batches, chunks) for rank in range(ranks)]
    free, events = [0.0] * ranks, []
    done = {("forward", -1, number): 0.0 for number in range(micro_batches)}  # the tokens are there
    while any(queues):
        so_far = len(done)
        for rank, queue in enumerate(queues):
            while queue:
                kind, chunk, number = queue[0]
                stage = chunk * ranks + rank
                needs = (kind, stage - 1 if kind == "forward" else stage + 1, number)
                if needs not in done:
                    break
                start = max(free[rank], done[needs])
                free[rank] = done[kind, stage, number] = start + (1 if kind == "forward" else 2) / chunks
                if (kind, stage) == ("forward", ranks * chunks - 1):
                    done["backward", stage + 1, number] = free[rank]  # the loss is there
                place = {"step": 0, "rank": rank, "stage": stage, "micro_batch": number, "event": kind}
                events.append(place | {"start": start, "end": free[rank]})
                queue.pop(0)
        if len(done) == so_far:
            raise RuntimeError(f"{schedule} on {ranks} ranks with {micro_batches} micro-batches waits for itself")
    return events


def draw(events: list[dict], title: str, file: Path) -> None:
    """One row a rank; numbers are micro-batches; stages after a rank's first are hatched."""
    ranks, zero = shape(events)[0], min(event["start"] for event in events)
    _, axes = pyplot.subplots(figsize=(12, 1.2 + 0.6 * ranks), layout="constrained")
    for event in events:
        computes = event["event"] in ("forward", "backward")
        height, hatch = (0.8, "//" * (event["stage"] // ranks)) if computes else (0.25, "")
        start, length = event["start"] - zero, event["end"] - event["start"]
        bar = axes.barh(event["rank"], length, height, start, color=COLOURS[event["event"]], hatch=hatch, zorder=height,
                        edgecolor="white" if computes else "none", linewidth=0.5)  # fmt: skip
        axes.bar_label(bar, [event["micro_batch"] if computes else ""], label_type="center", fontsize=8)
    axes.set(title=title, xlabel="seconds", ylabel="rank", yticks=range(ranks), ylim=(ranks - 0.5, -0.5))
    seen = {event["event"] for event in events}
    handles = [patches.Patch(color=color, label=kind) for kind, color in COLOURS.items() if kind in seen]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    pyplot.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=to_path, nargs="?", help="folder of .jsonl files")
    parser.add_argument("--simulate", choices=SCHEDULES, help="draw this schedule on ideal ranks instead of a log")
    for option, default in (("ranks", 4), ("micro_batches", 8), ("chunks", 1)):
        parser.add_argument(f"--{option}", type=int, default=default, help=f"for --simulate, default {default}")
    parser.add_argument("--out", type=to_path, default=Path("pipeline.png"))
    args = parser.parse_args()
    if (args.log is None) == (args.simulate is None) or min(args.ranks, args.chunks) < 1:
        fail("expected a log's folder or --simulate, one of them, and at least 1 rank and chunk; see --help")
    try:
        events = read(args.log) if args.log else simulate(args.simulate, args.ranks, args.micro_batches, args.chunks)
    except ValueError as error:
        fail(str(error))
    ranks, micro_batches, chunks = shape(events)
    title = f"{name_schedule(events)}: {ranks} ranks, {micro_batches} micro-batches"
    peaks = ", ".join(str(peak_in_flight(row)) for row in computed(events).values())
    idle = f"bubble {bubble(events):.1%} (ideal {ideal_bubble(ranks, micro_batches, chunks):.1%})"
    draw(events, f"{title}, {idle}", args.out)
    print(f"{title}\nin flight at most, by rank: {peaks}\n{idle}\ndrawn to {args.out}")


if __name__ == "__main__":
    main()
