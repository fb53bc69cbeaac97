"""What each pipeline schedule does when: measured, drawn, and its idle time beside the formula's.

    torchrun --nproc-per-node=2 model_parallel/schedule_timeline.py --batch.micro_size 3 --output timeline.png
    torchrun --nproc-per-node=4 model_parallel/schedule_timeline.py --model.layers 8 --batch.micro_size 6

Runs steps of `pipeline_parallel.py` with all four schedules in turn, on the same model and data, and notes when every
stage computes. Drawn is the fastest of the measured steps. More ranks than cores make a picture of the cores. Two
schedules take two stages a rank: the model needs twice as many layers as there are ranks.
"""

import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib import patches, pyplot
from mesh_settings import PipelineConfig
from pipeline_parallel import SCHEDULES, build_schedule, build_stages, run_schedule
from torch.distributed.elastic.multiprocessing.errors import record

from common.config import parse
from common.config_fields import PathText
from common.data import text_datasets
from common.data_sharding import BatchPlan, Loader
from common.ranks import Ranks, fail, join

matplotlib.use("Agg")  # a file, no window
COLOURS = {"forward": "#4c78a8", "backward": "#f58518", "backward, inputs": "#e45756", "backward, weights": "#54a24b"}
Event = tuple[str, int, int, float, float]  # kind, stage, micro-batch, start and end in seconds


@dataclass
class TimelineConfig(PipelineConfig):
    """The settings of a pipeline; the schedule is each in turn."""

    output: PathText = "timeline.png"
    """The picture to write: .png, .pdf or .svg, in a folder that exists."""
    repeats: int = 5
    """Steps measured of each schedule, after two to warm up."""


@record
def main(config: TimelineConfig) -> None:
    ranks = join(config.device, config.timeout_s, config.network_profile)
    if config.repeats < 1:
        fail(f"repeats = {config.repeats}; expected 1 or more")
    output = Path(config.output)
    if output.suffix not in (".png", ".pdf", ".svg") or output.is_dir() or not os.access(output.parent, os.W_OK):
        fail(f"output = {output}; expected a file .png, .pdf or .svg in a folder that you can write; choose another")
    train_set, _ = text_datasets(config.data, config.model.vocabulary)
    plan = BatchPlan(config.batch, len(train_set), config.seed)
    loader = Loader(train_set, plan, ranks.device)
    parts = zip(*[batch for batch, _ in loader.micro_batches(0)], strict=True)
    tokens, targets = (torch.cat(part) for part in parts)

    measured = {}
    for name in SCHEDULES:
        config.schedule, config.stages_per_rank = name, None
        config.__post_init__()  # stages_per_rank is what the schedule wants
        events: list[Event] = []
        stages = build_stages(config, ranks)
        for stage in stages:
            note_times(stage, events, ranks.device)
        schedule = build_schedule(config, ranks.world_size, stages, plan.accumulation, 1 / tokens.numel())
        steps = []
        for _ in range(2 + config.repeats):
            events.clear()
            ranks.barrier()
            run_schedule(schedule.step, stages, tokens, targets)
            synchronise(ranks.device)
            steps.append(list(events))
        measured[name] = [dict(enumerate(each)) for each in zip(*ranks.all_gather(steps[2:]), strict=True)]
    if ranks.is_main:
        report(measured, plan.accumulation, ranks, output)
    ranks.leave()


def note_times(stage, events: list[Event], device: torch.device) -> None:
    """Note the start and end of all that this stage computes. Waiting is between, in the schedule."""

    def timed(call, kind):
        def wrapped(number, *args, full_backward=True, **options):
            more = {} if kind == "forward" or kind.endswith("weights") else {"full_backward": full_backward}
            what = kind if kind != "backward" or full_backward else "backward, inputs"
            synchronise(device)
            start = time.time()
            result = call(number, *args, **more, **options)
            synchronise(device)
            events.append((what, stage.stage_index, number, start, time.time()))
            return result

        return wrapped

    stage.forward_one_chunk = timed(stage.forward_one_chunk, "forward")
    stage.backward_one_chunk = timed(stage.backward_one_chunk, "backward")
    stage.backward_weight_one_chunk = timed(stage.backward_weight_one_chunk, "backward, weights")


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def length(step: dict[int, list[Event]]) -> float:
    """Seconds from the first start to the last end, on any rank."""
    events = [event for row in step.values() for event in row]
    return max(event[4] for event in events) - min(event[3] for event in events)


def idle(step: dict[int, list[Event]]) -> float:
    """The part of the ranks' time in which they do not compute."""
    busy = sum(end - start for row in step.values() for *_, start, end in row)
    return 1 - busy / (len(step) * length(step))


def report(measured: dict[str, list], micro_batches: int, ranks: Ranks, output: Path) -> None:
    """Print one row for each schedule, and draw the fastest step of each."""
    n = ranks.world_size
    figure, axes = pyplot.subplots(len(measured), sharex=True, figsize=(11, 1.3 + (0.5 + 0.35 * n) * len(measured)))
    print(f"{n} ranks, {micro_batches} micro-batches; medians of {len(measured['gpipe'])} steps")
    print(f"{'schedule':14}{'stages a rank':>14}{'step':>10}{'idle':>8}{'formula':>9}")
    for axis, (name, steps) in zip(axes, measured.items(), strict=True):
        stages = len({event[1] for row in steps[0].values() for event in row}) // n
        # arXiv 2104.04473, 2.2; not of the zero bubble, whose idle time depends on the parts of backward (2401.10241)
        formula = "–" if name == "zero_bubble" else f"{(n - 1) / (stages * micro_batches + n - 1):.0%}"
        waits, seconds = statistics.median(map(idle, steps)), statistics.median(map(length, steps))
        print(f"{name:14}{stages:>14}{1000 * seconds:>7.0f} ms{waits:>8.0%}{formula:>9}")
        draw(axis, min(steps, key=length), stages)
        axis.set_title(f"{name}: {1000 * seconds:.0f} ms, idle {waits:.0%} (formula {formula})", loc="left", size=10)
    axes[-1].set_xlabel("milliseconds")
    handles = [patches.Patch(color=color, label=kind) for kind, color in COLOURS.items()]
    figure.legend(handles=handles, ncols=4, loc="upper right", frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    figure.savefig(output, dpi=110)
    print(f"picture: {output}")


def draw(axis, step: dict[int, list[Event]], stages: int) -> None:
    """A row for each rank; a box for each piece of work, with the number of its micro-batch; pale: later stages."""
    first = min(event[3] for row in step.values() for event in row)
    for rank, row in step.items():
        for kind, stage, number, start, end in row:
            pale = stage // len(step) / (stages + 1)
            left, width = 1000 * (start - first), 1000 * (end - start)
            axis.barh(
                rank, width, left=left, height=0.8, color=COLOURS[kind], alpha=1 - pale, edgecolor="white", lw=0.5
            )
            axis.text(left + width / 2, rank, str(number), ha="center", va="center", color="white", fontsize=7)
    axis.set_yticks(list(step), [f"rank {rank}" for rank in step])
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main(parse(TimelineConfig))
