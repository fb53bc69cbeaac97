"""What Lightning iterates over: the batches of our plan, in place of a DataLoader."""

from collections.abc import Iterator
from typing import Any

import torch
from run_folder import RunFolder

from common.data_sharding import BatchPlan, Loader, SizedDataset, evaluation_batches


class Batches:
    """The micro-batches of the run's steps, from where its checkpoint ended until it says stop."""

    def __init__(self, loader: Loader, steps: int, accumulation: int, run_folder: RunFolder) -> None:
        self.loader, self.length, self.run_folder = loader, steps * accumulation, run_folder

    def __len__(self) -> int:  # with a length, Lightning asks for no batch before it needs it
        return self.length

    def __iter__(self) -> Iterator[Any]:
        while (step := self.run_folder.step) is not None:
            for micro_batch, _ in self.loader.micro_batches(step):
                yield micro_batch


class EvaluationBatches:
    """This rank's part of a validation set: every sample on exactly one rank.

    Args:
        equal_batches: ranks with fewer samples join in with batches that do not count.
    """

    def __init__(
        self,
        dataset: SizedDataset,
        plan: BatchPlan,
        device: torch.device,
        workers: int = 0,
        equal_batches: bool = False,
    ) -> None:
        self.dataset, self.plan, self.device = dataset, plan, device
        self.workers, self.equal_batches = workers, equal_batches

    def __iter__(self) -> Iterator[Any]:
        plan = self.plan
        return evaluation_batches(
            self.dataset, plan.micro_size, self.device, dp_rank=plan.dp_rank, dp_size=plan.dp_size,
            workers=self.workers, equal_batches=self.equal_batches,
        )  # fmt: skip
