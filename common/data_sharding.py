"""Which samples of step N are mine? The batch is a pure function of (seed, step), cut up among ranks and micro-batches.

Every epoch is one permutation of the data set, drawn from (seed, epoch). The global batch of step N is the next
`global_size` positions of that endless sequence; data-parallel rank r gets the r-th contiguous part, in micro-batches.
So the same steps see the same samples at any world size and any accumulation, every sample comes once per epoch, and
there is no loader state to save: resuming at step N is asking for step N.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from common.ranks import fail


class SizedDataset(Protocol):
    """What a loader needs of a data set: a length and items by index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


@dataclass
class BatchConfig:
    """The batch of one optimizer step, and how much of it goes through the model at a time."""

    global_size: int = 24
    """Samples per optimizer step over all ranks; must divide evenly among the data-parallel ranks."""
    micro_size: int | None = None
    """Samples per rank in one forward pass; the rest is gradient accumulation. Default: all at once."""

    def __post_init__(self) -> None:
        for name, value in (("global_size", self.global_size), ("micro_size", self.micro_size)):
            if value is not None and value < 1:
                raise ValueError(f"batch.{name} = {value} cannot work; allowed: at least 1")


def derive_seed(*parts: object) -> int:
    """A seed that depends on all parts, the same on every machine and in every Python process."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1  # torch wants a non-negative int64


@lru_cache(maxsize=4)
def _permutation(samples: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(samples, generator=torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch)))


@dataclass(frozen=True)
class BatchPlan:
    """How one global batch is cut into ranks and micro-batches.

    Args:
        batch: global and micro-batch size.
        samples: number of samples in the training set.
        seed: decides the order.
        dp_rank, dp_size: rank and number of ranks on the data-parallel axis (not always the whole world).

    Raises:
        SystemExit: (exit code 2) the sizes do not divide, or the data set is smaller than one batch.
    """

    batch: BatchConfig
    samples: int
    seed: int
    dp_rank: int = 0
    dp_size: int = 1

    def __post_init__(self) -> None:
        size, ranks, micro = self.batch.global_size, self.dp_size, self.batch.micro_size
        if size % ranks:
            fail(
                f"batch.global_size = {size} does not divide among {ranks} data-parallel ranks; choose a multiple of "
                f"{ranks}, such as {max(1, round(size / ranks)) * ranks}, or another number of ranks"
            )
        if micro and (size // ranks) % micro:
            fail(
                f"batch.micro_size = {micro} does not divide the {size // ranks} samples of each rank (global_size "
                f"{size} / {ranks} ranks); allowed: {[m for m in range(1, size // ranks + 1) if not size // ranks % m]}"
            )
        if self.samples < size:
            fail(f"the training set has {self.samples} samples, fewer than batch.global_size = {size}")

    @property
    def micro_size(self) -> int:
        """Samples in one micro-batch of this rank."""
        return self.batch.micro_size or self.batch.global_size // self.dp_size

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step on each rank: derived, never configured."""
        return self.batch.global_size // self.dp_size // self.micro_size

    def positions(self, step: int) -> list[range]:
        """This rank's part of step `step`: one range of positions in the endless sequence for each micro-batch."""
        start = step * self.batch.global_size + self.dp_rank * self.accumulation * self.micro_size
        return [range(start + i * self.micro_size, start + (i + 1) * self.micro_size) for i in range(self.accumulation)]

    def sample(self, position: int) -> int:
        """Which sample of the data set stands at a position of the endless sequence of epochs."""
        epoch, place = divmod(position, self.samples)
        return int(_permutation(self.samples, self.seed, epoch)[place])


class _ByPosition(Dataset):
    """The data set in the order of the plan. Random augmentation is seeded by position: it depends on nothing else."""

    def __init__(self, dataset: SizedDataset, plan: BatchPlan) -> None:
        self.dataset, self.plan, self.augments = dataset, plan, getattr(dataset, "augments", False)

    def __getitem__(self, position: int) -> Any:
        if not self.augments:
            return self.dataset[self.plan.sample(position)]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.plan.seed, "augment", position))
            return self.dataset[self.plan.sample(position)]


class Loader:
    """Brings the micro-batches of any step to this rank's device; with workers, the following steps are loaded ahead.

    Args:
        dataset: items are tensors or tuples of tensors; with an attribute `augments` that is true, its random
            transforms see a seed of their own for every position.
        plan: who gets what.
        device: where the tensors go (from pinned memory, without waiting, to a GPU).
        workers: loader processes, each two micro-batches ahead; 0 loads in this process, when a batch is asked for.
    """

    def __init__(self, dataset: SizedDataset, plan: BatchPlan, device: torch.device, workers: int = 0) -> None:
        self.dataset, self.plan, self.device, self.workers = _ByPosition(dataset, plan), plan, device, workers
        self._next_step: int | None = None
        self._stream: Iterator[Any] = iter(())

    def _open(self, first_step: int) -> Iterator[Any]:
        plan = self.plan  # not self: a cycle of references would keep the loader processes alive

        def endless() -> Iterator[range]:
            step = first_step
            while True:
                yield from plan.positions(step)
                step += 1

        sampler: Any = endless()
        own = torch.Generator()  # else opening a loader would draw from the global one
        pinned = self.device.type == "cuda"
        return iter(
            DataLoader(self.dataset, batch_sampler=sampler, num_workers=self.workers, pin_memory=pinned, generator=own)
        )

    def micro_batches(self, step: int) -> Iterator[tuple[Any, bool]]:
        """Yield (micro_batch, is_last) for this rank's part of `step`, in order, on the device."""
        if step != self._next_step:
            self._stream = self._open(step)
        self._next_step = None  # until all of this step has been taken
        for number in range(1, self.plan.accumulation + 1):
            try:
                batch = next(self._stream)
            except RuntimeError as error:
                if "DataLoader worker" in str(error):
                    fail(f"a loader process ended at step {step}: {error}; try --data.workers 0, or look above")
                raise
            yield to_device(batch, self.device), number == self.plan.accumulation
        self._next_step = step + 1


def to_device(batch: Any, device: torch.device) -> Any:
    """Move a tensor, or the tensors of a list or tuple, to the device without waiting for the copy."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    return [to_device(part, device) for part in batch]


def evaluation_batches(
    dataset: SizedDataset,
    batch_size: int,
    device: torch.device,
    dp_rank: int = 0,
    dp_size: int = 1,
    workers: int = 0,
    equal_batches: bool = False,
) -> Iterator[Any]:
    """Yield this rank's part of an evaluation set: every sample on exactly one rank, none twice, no padding.

    Ranks may get different numbers of samples, even none: sum losses and counts over the ranks, then divide. Nothing
    collective may happen per batch; where it must (a model whose layers are gathered for each forward), `equal_batches`
    gives every rank equally many batches of (inputs, targets): in those beyond its own no target counts (-100).
    """
    mine = range(dp_rank, len(dataset), dp_size)
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    own = torch.Generator()
    loader: Any = DataLoader(dataset, batch_sampler=batches, num_workers=workers, generator=own)  # type: ignore[arg-type]
    for batch in loader:
        yield to_device(batch, device)
    longest = -(-len(dataset) // dp_size)  # samples of rank 0
    for _ in range(len(batches), -(-longest // batch_size) if equal_batches else 0):
        inputs, targets = dataset[0]
        yield to_device((inputs[None], torch.full_like(targets[None], -100)), device)
