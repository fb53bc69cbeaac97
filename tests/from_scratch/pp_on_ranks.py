"""What the ranks of a `group` run for the tests of pipeline parallelism."""

import functools

import torch
import torch.distributed as dist
from tp_on_ranks import CLIP, SAMPLES, Differences, batch, dense, optimizer_for, small

import pipeline_parallel as pp  # isort: skip  (tp_on_ranks puts from_scratch/ on the path)


@functools.cache
def edges() -> dict[tuple[int, int], dist.ProcessGroup]:
    return pp.connect([list(range(dist.get_world_size()))])


def edges_of() -> dict[tuple[int, int], list[int]]:
    """The ranks of each edge's group."""
    return {edge: dist.get_process_group_ranks(group) for edge, group in edges().items()}


def samples(micro_batches: int) -> int:
    """So many that they divide, and few."""
    return SAMPLES if SAMPLES % micro_batches == 0 else micro_batches


def pipeline(schedule: str, chunks: int, changes: dict, layers=None) -> pp.Pipeline:
    return pp.Pipeline(
        small(**changes), 1, 24, dist.group.WORLD, edges(), schedule, chunks, layers, dtype=torch.float64
    )


def parts(step: int, micro_batches: int, changes: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
    tensors = batch(small(**changes), step, samples(micro_batches))
    return list(zip(*(t.chunk(micro_batches) for t in tensors), strict=True))


def train(schedule: str, micro_batches: int, chunks: int, changes: dict, steps: int, layers=None) -> tuple[dict, list]:
    """Steps beside the dense model's: this rank's largest differences, and its events of the last step."""
    rows, first, last = dense(steps, samples(micro_batches), **changes)
    pipe, seen = pipeline(schedule, chunks, changes, layers), Differences()
    optimizer, tokens = optimizer_for(pipe.stages), samples(micro_batches) * 24

    def whole(name: str) -> str:  # "3.head.weight" of stage 3; the copy of a tied weight is the embedding's
        name = name.partition(".")[2]
        return "embedding.weight" if pipe.tied and name == "head.weight" else name

    for step, (loss, gradients, norm) in enumerate(rows):
        loss_sum = pipe.step(parts(step, micro_batches, changes), 1 / tokens)
        if pipe.rank == pipe.ranks - 1:
            seen.note("loss", loss_sum / tokens, loss)
        for name, parameter in pipe.stages.named_parameters():
            seen.note("gradients", parameter.grad, gradients[whole(name)])
        seen.note("norm", pipe.clip_grad_norm(CLIP), norm)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in pipe.stages.named_parameters():
        seen.note("parameters", parameter.detach(), last[whole(name)])
        seen.note("moved", parameter.detach(), first[whole(name)])
    seen["layers"] = sum(len(stage.blocks) for stage in pipe.stages.values())
    return dict(seen), [event for event in pipe.events if event["step"] == steps - 1]


def write_log(schedule: str, folder: str) -> None:
    pipe = pipeline(schedule, 1, {"layers": 4})
    for step in range(2):
        pipe.step(parts(step, 4, {}), 1.0)
    pipe.write_events(folder)


def refused(schedule: str, chunks: int, changes: dict) -> str:
    try:
        pipeline(schedule, chunks, changes)
    except ValueError as error:
        return str(error)
    return "nothing"
