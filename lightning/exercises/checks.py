"""What is expected of the exercises; run by tools/exercises.py on the number of ranks given here."""

import logging
import math
import os
import warnings
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from grading import expect
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

EXACT = 1e-12  # fp64, numbers of order 1, sums of some dozens of them: errors stay below 1e-14


def build_trainer(rank: int, world_size: int, **options: Any) -> Trainer:
    """A Trainer for ranks that have joined already, as they would under torchrun; it writes nothing."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world_size}
    place |= {"LOCAL_WORLD_SIZE": world_size, "TORCHELASTIC_RUN_ID": "exercise"}
    os.environ.update({name: str(value) for name, value in place.items()})
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # about loaders without workers
    fixed = {
        "accelerator": "cpu",
        "devices": world_size,
        "strategy": "ddp",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**(options | fixed))


def small_model() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference; infinite for nan."""
    return math.inf if found.isnan().any() else (found - expected).abs().max().item()


# ------------------------------------------------------------------------------------------ exercise 1


def check_scale_the_step(module: ModuleType, rank: int, world_size: int) -> None:
    # (micro-batches of a rank, accumulation): one whole step; one micro-batch a step; an epoch that ends in mid-step
    for micro_batches, accumulation in ((4, 4), (2, 1), (5, 3)):
        batches = token_batches(world_size, micro_batches)
        firsts = range(0, micro_batches, accumulation)
        steps = [range(first, min(first + accumulation, micro_batches)) for first in firsts]
        counts = [sum(int((some[i][1] != -100).sum()) for some in batches for i in step) for step in steps]
        mine = [(*batches[rank][i], count) for step, count in zip(steps, counts, strict=True) for i in step]
        loader = DataLoader(mine, batch_size=None)  # each item is a micro-batch already
        lesson = module.Lesson(small_model(), learning_rate=0.5)
        trainer = build_trainer(
            rank, world_size, max_epochs=1, accumulate_grad_batches=accumulation, use_distributed_sampler=False
        )
        trainer.fit(lesson, loader)

        alone, start = small_model(), nn.utils.parameters_to_vector(small_model().parameters()).detach()
        optimizer = torch.optim.SGD(alone.parameters(), lr=0.5)
        for step, count in zip(steps, counts, strict=True):
            for some in batches:
                for i in step:
                    inputs, targets = some[i]
                    (F.cross_entropy(alone(inputs), targets, reduction="sum") / count).backward()
            optimizer.step()
            optimizer.zero_grad()
        right = nn.utils.parameters_to_vector(alone.parameters()).detach()
        found = nn.utils.parameters_to_vector(lesson.model.parameters()).detach()
        difference = off(found, right)
        if len(steps) == 1:
            hint = hint_on_factor(found - start, right - start, counts[0], world_size, accumulation)
        elif accumulation == 1:
            hint = "this has one micro-batch a step, the one before had 4: what in your factor knows about that?"
        else:
            hint = "the last step has fewer micro-batches; the Trainer divides by accumulate_grad_batches all the same"
        expect(
            difference <= EXACT,
            f"{world_size} ranks with {micro_batches} micro-batches, accumulate_grad_batches={accumulation}: after "
            f"{len(steps)} step{'s' * (len(steps) > 1)} of SGD the weights are off by {difference:.1e}",
            "those of one process, to 1e-12",
            hint,
        )


def token_batches(world_size: int, micro_batches: int) -> list[list[tuple[Tensor, Tensor]]]:
    """For each rank its micro-batches of 12 tokens, of which more and more do not count; in one of them, none does."""
    generator = torch.Generator().manual_seed(5)
    batches: list[list[tuple[Tensor, Tensor]]] = []
    for rank in range(world_size):
        batches.append([])
        for number in range(micro_batches):
            inputs = torch.randn(12, 8, generator=generator, dtype=torch.float64)
            targets = torch.randint(0, 3, (12,), generator=generator)
            targets[: 12 if (rank, number) == (1, 1) else 3 * rank + number] = -100
            batches[-1].append((inputs, targets))
    return batches


def hint_on_factor(found: Tensor, right: Tensor, tokens: int, world_size: int, accumulation: int) -> str:
    """What a step means that has the right direction; else what may be wrong with the direction."""
    factor = ((found @ right) / (right @ right)).item()
    if off(found, factor * right) > EXACT * max(1.0, abs(factor)):
        return (
            "not even its direction is right: a token weighs more where there are few. Sums of losses, and one number "
            "of tokens for all ranks and micro-batches"
        )
    names = {
        1 / world_size: "too small by the number of ranks: DDP takes the mean over them, the sum is wanted",
        1 / accumulation: "too small by the number of micro-batches: the Trainer divides by them",
        1 / accumulation / world_size: "too small by ranks × micro-batches: DDP and the Trainer divide by them",
        tokens: "too large by the number of tokens in the global batch: the mean is wanted",
    }
    for value, hint in names.items():
        if abs(factor - value) <= 1e-6 * value:
            return hint
    return f"the step is {factor:.4g} times what it should be; ranks, micro-batches, tokens: what gives that number?"


# ------------------------------------------------------------------------------------------ exercise 2


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


def check_keep_the_samples(module: ModuleType, rank: int, world_size: int) -> None:
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
