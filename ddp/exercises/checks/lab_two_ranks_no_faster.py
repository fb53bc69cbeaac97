"""The check of the exercise lab_two_ranks_no_faster.py; run by tools/exercises.py."""

from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from grading import expect

WORLD_SIZES = (2, 3)


class Recorder(torch.utils.data.Dataset):
    """The first samples of a data set; writes down the number of each that is read."""

    def __init__(self, dataset: torch.utils.data.Dataset, size: int) -> None:
        self.dataset, self.size = dataset, size
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        self.read.append(int(index))
        return self.dataset[int(index)]


def check(module: ModuleType, rank: int, world_size: int) -> None:
    recorder = Recorder(module.Digits(), 96)
    losses = module.train(recorder, steps=8, global_size=24)  # two epochs
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, recorder.read)
    share = 24 // world_size
    expect(
        all(len(read) == 8 * share for read in everyone) and len(losses) == 8,
        f"the ranks read {[len(read) for read in everyone]} samples in {len(losses)} steps of 24",
        f"{8 * share} on each of {world_size} ranks",
        "a rank's batch is the global batch divided by the world size; load without workers",
    )
    steps = [[read[s * share : (s + 1) * share] for read in everyone] for s in range(8)]
    for step, parts in enumerate(steps):
        together = [sample for part in parts for sample in part]
        expect(
            len(set(together)) == 24,
            f"step {step} saw {len(set(together))} different samples; rank 0 read {sorted(parts[0])[:4]} …, "
            f"rank 1 read {sorted(parts[1])[:4]} …",
            "24 different samples in a global batch of 24",
            "what makes the ranks choose their samples, and what is different about it on rank 1?",
        )
    epochs = [[s for parts in steps[first : first + 4] for part in parts for s in part] for first in (0, 4)]
    for epoch, samples in enumerate(epochs):
        expect(
            len(set(samples)) == 96,
            f"epoch {epoch} saw {len(set(samples))} different samples of 96",
            "each sample once in an epoch",
            "ranks that shuffle with seeds of their own do not share an epoch: one order, then deal it out",
        )
    expect(
        epochs[0] != epochs[1],
        "the second epoch came in the same order as the first",
        "another order",
        "a DistributedSampler learns of a new epoch only through set_epoch",
    )
