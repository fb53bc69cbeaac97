# exercise 2: Keep the samples
"""The Trainer puts a sampler of its own into your loaders. Which samples does a rank see, with it and without?

    make grade M=lightning ARGS="keep_the_samples"

Under a strategy with several ranks the Trainer replaces the sampler of each DataLoader, unless the option
`use_distributed_sampler` is off:

- a plain loader gets torch's DistributedSampler: in training shuffled anew in each epoch, every rank a part. If the
  samples cannot be shared evenly, it fills the parts up with samples that another rank has, in evaluation as well;
- a loader with a sampler of your own gets that one *wrapped*: each rank takes every n-th of what your sampler gives.
  If yours has already dealt the samples out, they are dealt out twice: an epoch is shorter by the number of ranks,
  and most samples are in nobody's;
- with the option off nothing is replaced. A loader with shuffle=True then gives every rank all samples.

Before each epoch the Trainer calls `set_epoch(epoch)` of a loader's sampler, if it has that method.

What is wanted here: samplers of one's own, that one can reason about.

- Training: in each epoch another order, drawn from SEED and the epoch, of which each rank takes its part: every sample
  once on one rank. (Ranks × batch size divides the number of samples: a rank with a batch more would wait for ever.)
- Evaluation: every sample once on one rank, any number of samples (not fewer than ranks), so shares may differ; and the
  mean over all of them. `self.log(…, sync_dist=True)` divides by a number of samples from which it has dropped what the
  ranks do not divide: 25 samples on 2 ranks count as 24.

Fill the gaps. Graded on 2 and 3 ranks: who saw which sample in three epochs of a Trainer, and the validation loss
against that of one process, to 1e-12 in fp64.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

SEED = 0

# What the Trainer is to be told, besides what it trains on and how long.
# solution
TRAINER: dict[str, Any] = {"use_distributed_sampler": False}
# task: TRAINER: dict[str, Any] = {}
# end


class EpochSampler(Sampler[int]):
    """This rank's part of each epoch: indices of samples."""

    def __init__(self, samples: int, rank: int, world_size: int) -> None:
        self.samples, self.rank, self.world_size = samples, rank, world_size
        self.epoch = 0

    # solution
    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.samples // self.world_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(SEED + self.epoch)  # the same order on all ranks
        order = torch.randperm(self.samples, generator=generator)
        return iter(order[self.rank :: self.world_size].tolist())

    # task: # Besides these two: what does the Trainer call before each epoch?
    # task: def __len__(self) -> int:
    # task:     raise NotImplementedError("EpochSampler")
    # task:
    # task: def __iter__(self) -> Iterator[int]:
    # task:     raise NotImplementedError("EpochSampler")
    # end


class Lesson(LightningModule):
    """A classifier; `validation_loss` is the mean over the validation set after each epoch, the same on all ranks."""

    def __init__(self, model: nn.Module, train_set: Dataset, validation_set: Dataset, batch_size: int) -> None:
        super().__init__()
        self.model, self.batch_size = model, batch_size
        self.train_set, self.validation_set = train_set, validation_set
        self.validation_loss = float("nan")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def train_dataloader(self) -> DataLoader:
        sampler = EpochSampler(len(self.train_set), self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(self.train_set, self.batch_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        """Loads this rank's part of the validation set."""
        # solution
        mine = range(self.trainer.global_rank, len(self.validation_set), self.trainer.world_size)
        return DataLoader(self.validation_set, self.batch_size, sampler=mine)
        # task: # Anything that gives indices is a sampler.
        # task: raise NotImplementedError("val_dataloader")
        # end

    # Evaluation. Batches are lists: inputs (batch, 8) and labels (batch,) int64.
    # solution
    def on_validation_epoch_start(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64)  # loss, samples

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.sums[0] += F.cross_entropy(self.model(batch[0]), batch[1], reduction="sum")
        self.sums[1] += len(batch[1])

    def on_validation_epoch_end(self) -> None:
        loss, samples = self.trainer.strategy.reduce(self.sums, reduce_op="sum").tolist()  # over the ranks
        self.validation_loss = loss / samples

    # task: # Also on_validation_epoch_start and on_validation_epoch_end are yours to use;
    # task: # self.trainer.strategy.reduce(tensor, reduce_op="sum") adds up over the ranks.
    # task: def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
    # task:     raise NotImplementedError("validation_step")
    # end
