"""The check of the exercise scale_the_loss.py; run by tools/exercises.py."""

from types import ModuleType

import torch
import torch.nn.functional as F
from grading import expect
from shared import CLOSE, engine_of, engine_settings, off, start, values
from torch import Tensor, nn


def check(module: ModuleType, rank: int, world_size: int) -> None:
    start(rank, world_size)
    accumulation = 4
    for stage, scale_wrt_gas in ((1, False), (1, True), (2, True), (3, False)):
        batches = token_batches(world_size, accumulation)
        alone = small_model()
        losses = [F.cross_entropy(alone(x), y, reduction="sum") for each in batches for x, y in each]
        tokens = sum(int((y != module.IGNORED).sum()) for each in batches for _, y in each)
        (torch.stack(losses).sum() / tokens).backward()
        right = {name: parameter.grad.clone() for name, parameter in alone.named_parameters()}

        model = small_model()
        # With a learning rate of 1 the gradient is what the step takes away, whoever computed and reduced it.
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        engine = engine_of(model, optimizer, engine_settings(stage, accumulation, world_size))
        before = values(model)
        module.train_step(engine, batches[rank], scale_wrt_gas)
        after = values(model)
        found = {name: before[name] - after[name] for name in before}

        where = f"stage {stage}, scale_wrt_gas={scale_wrt_gas}, {world_size} ranks, {accumulation} micro-batches"
        expect(
            engine.global_steps == 1,
            f"{where}: the optimizer has done {engine.global_steps} steps",
            "one",
            "engine.step() after every backward: it counts micro-batches, and acts on the last",
        )
        flat, flat_right = (torch.cat([each[name].flatten() for name in right]) for each in (found, right))
        difference = off(flat, flat_right)
        expect(
            difference <= CLOSE,
            f"{where}: the gradient is off by {difference:.1e}",
            "that of the mean over all valid tokens, as one process has it",
            hint_on_factor(flat, flat_right, tokens, world_size, accumulation),
        )


def small_model() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def token_batches(world_size: int, accumulation: int) -> list[list[tuple[Tensor, Tensor]]]:
    """For each rank its micro-batches of 12 tokens, of which more and more do not count; in one of them, none does."""
    generator = torch.Generator().manual_seed(5)
    batches: list[list[tuple[Tensor, Tensor]]] = []
    for rank in range(world_size):
        batches.append([])
        for number in range(accumulation):
            inputs, targets = torch.randn(12, 8, generator=generator), torch.randint(0, 3, (12,), generator=generator)
            ignored = 12 if (rank, number) == (1, 1) else 4 * rank + number
            targets[:ignored] = -100
            batches[-1].append((inputs, targets))
    return batches


def hint_on_factor(found: Tensor, right: Tensor, tokens: int, world_size: int, accumulation: int) -> str:
    """What a gradient means that has the right direction; else what may be wrong with the direction."""
    factor = ((found @ right) / (right @ right)).item()
    if off(found, factor * right) > CLOSE:
        return (
            "not even its direction is right: a token weighs more where there are few. Sums of losses, and one number "
            "of tokens for all ranks and micro-batches"
        )
    names = {
        1 / world_size: "too small by the number of ranks: the engine takes the mean over them, the sum is wanted",
        1 / accumulation: "too small by the number of micro-batches: with scale_wrt_gas=True the engine divides, too",
        1 / accumulation / world_size: "too small by ranks × micro-batches: the engine divides by both",
        accumulation: "too large by the number of micro-batches: nobody divides by them with scale_wrt_gas=False",
        tokens: "too large by the number of tokens in the global batch: the mean is wanted",
        0: "there is none: has engine.step() been called after every backward?",
    }
    for value, hint in names.items():
        if abs(factor - value) <= 1e-3 * max(value, 1e-2):
            return hint
    return f"it is {factor:.4g} times what it should be; ranks, micro-batches, tokens: what gives that number?"
