"""The check of the exercise scale_the_step.py; run by tools/exercises.py."""

import math
from types import ModuleType

import torch
import torch.nn.functional as F
from grading import expect
from shared import EXACT, build_trainer, small_model
from torch import Tensor, nn
from torch.utils.data import DataLoader


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference; infinite for nan."""
    return math.inf if found.isnan().any() else (found - expected).abs().max().item()


def check(module: ModuleType, rank: int, world_size: int) -> None:
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
