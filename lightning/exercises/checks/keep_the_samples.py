"""The check of the exercise keep_the_samples.py; run by tools/exercises.py."""

import math
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from grading import expect
from lightning.pytorch import Callback, LightningModule, Trainer
from shared import EXACT, build_trainer, small_model
from torch.utils.data import TensorDataset


class Witness(Callback):
    """Writes down the samples of each training epoch, and of the last evaluation; feature 0 is a sample's number."""

    def __init__(self, epochs: int) -> None:
        self.trained: list[list[int]] = [[] for _ in range(epochs)]
        self.evaluated: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, lesson: LightningModule, batch: Any, batch_idx: int) -> None:
        self.trained[trainer.current_epoch] += batch[0][:, 0].long().tolist()

    def on_validation_start(self, trainer: Trainer, lesson: LightningModule) -> None:
        self.evaluated = []

    def on_validation_batch_start(
        self, trainer: Trainer, lesson: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.evaluated += batch[0][:, 0].long().tolist()


def numbered(samples: int) -> TensorDataset:
    """Samples of 8 features, the first of which is the sample's number."""
    generator = torch.Generator().manual_seed(samples)
    inputs = torch.randn(samples, 8, generator=generator, dtype=torch.float64)
    inputs[:, 0] = torch.arange(samples)
    return TensorDataset(inputs, torch.randint(0, 3, (samples,), generator=generator))


def check(module: ModuleType, rank: int, world_size: int) -> None:
    epochs, samples = 3, 24
    for validation_samples, batch_size in ((25, 2), (world_size, 4)):
        train_set, validation_set = numbered(samples), numbered(validation_samples)
        witness = Witness(epochs)
        lesson = module.Lesson(small_model(), train_set, validation_set, batch_size)
        trainer = build_trainer(rank, world_size, **(module.TRAINER | {"max_epochs": epochs, "callbacks": [witness]}))
        trainer.fit(lesson)
        everyone = gathered((witness.trained, witness.evaluated), world_size)
        check_training([each[0] for each in everyone], samples)
        check_evaluation([each[1] for each in everyone], validation_samples)
        inputs, labels = validation_set.tensors
        with torch.no_grad():  # nothing is trained after the last evaluation
            right = F.cross_entropy(lesson.model(inputs), labels).item()
        difference = abs(lesson.validation_loss - right)
        hint = "add up losses and samples over batches and ranks, divide once: a mean of means weighs small parts more"
        losses = gathered(float(lesson.validation_loss), world_size)
        if math.isnan(lesson.validation_loss):
            hint = "set self.validation_loss when an evaluation ends: on_validation_epoch_end"
        elif len({round(each, 12) for each in losses}) > 1:
            hint = "each rank has another number: nothing has been added up over the ranks"
        expect(
            difference <= EXACT,
            f"{validation_samples} validation samples on {world_size} ranks: validation_loss is "
            f"{lesson.validation_loss:.12f} on rank {rank}",
            f"{right:.12f}, as one process has it",
            hint,
        )


def gathered(value: Any, world_size: int) -> list[Any]:
    """Each rank's value, by rank."""
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, value)
    return everyone


def check_training(trained: list[list[list[int]]], samples: int) -> None:
    """trained[rank][epoch]: the samples that were seen, in their order."""
    ranks, epochs = len(trained), len(trained[0])
    for epoch in range(epochs):
        seen = [sample for each in trained for sample in each[epoch]]
        where = f"training, epoch {epoch}: {ranks} ranks saw {len(seen)} samples, {len(set(seen))} different ones"
        expected = f"all {samples}, each on one rank"
        hint = "the order must be the same on all ranks, so that every rank-th of it makes parts without overlap"
        if all(each[epoch] == trained[0][epoch] for each in trained):
            hint = "all ranks saw the same ones: deal the order out, order[rank::world_size]"
        elif len(seen) * ranks == samples:
            hint = "they were dealt out twice: the Trainer has wrapped your sampler; see use_distributed_sampler"
        expect(sorted(seen) == list(range(samples)), where, expected, hint)
    for rank, each in enumerate(trained):
        expect(
            len({tuple(order) for order in each}) == epochs,
            f"training: rank {rank} saw the same samples in the same order in two of {epochs} epochs",
            "another order in each epoch",
            "the Trainer calls set_epoch(epoch) of a sampler that has it; the seed must depend on that epoch",
        )


def check_evaluation(evaluated: list[list[int]], samples: int) -> None:
    seen = [sample for each in evaluated for sample in each]
    twice = sorted({sample for sample in seen if seen.count(sample) > 1})
    missing = sorted(set(range(samples)) - set(seen))
    hint = "every n-th sample from this rank's on, and no filling up: that is range(rank, samples, n)"
    if len(seen) == len(evaluated) * samples:
        hint = "each rank evaluates all samples: right, but no faster than one process"
    elif missing:
        hint = "what is left over counts as well: shares may differ by one"
    elif twice:
        hint = "DistributedSampler fills the shares up with samples that another rank has; use one that does not"
    expect(
        not twice and not missing,
        f"evaluation of {samples} samples: {len(twice)} of them more than once, {len(missing)} not at all",
        "each of them on one rank",
        hint,
    )
