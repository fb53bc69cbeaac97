"""The check of the exercise lab_wrong_mean.py; run by tools/exercises.py."""

import copy
import math
from types import ModuleType

import torch
import torch.nn.functional as F
from grading import expect
from torch import Tensor, nn

WORLD_SIZES = (2, 3)


def check(module: ModuleType, rank: int, world_size: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 3).double()
    for samples, batch_size in ((24, 4), (25, 4), (24, 5), (1, 4)):
        inputs, kinds = module.make_data(samples, seed=samples)

        def exact(chosen: Tensor, inputs: Tensor = inputs, kinds: Tensor = kinds) -> tuple[float, float]:
            logits = model(inputs[chosen])
            return F.cross_entropy(logits, kinds[chosen]).item(), (
                logits.argmax(1) == kinds[chosen]
            ).double().mean().item()

        expected = exact(torch.arange(samples))
        padded = exact(torch.arange(-(-samples // world_size) * world_size) % samples)
        weights = copy.deepcopy(model.state_dict())
        found = module.evaluate(model, inputs, kinds, batch_size)
        hint = "how many samples does each mean stand for? Means of unequal numbers of samples do not average"
        if same(found, padded):
            hint = "some samples count twice: DistributedSampler fills up until the ranks have equally many"
        elif any(math.isnan(number) for number in found):
            hint = "a rank without samples has no mean: 0/0"
        where = f"{samples} samples in batches of {batch_size} on {world_size} ranks"
        expect(
            same(found, expected),
            f"{where}: loss and accuracy {found} on rank {rank}",
            f"{expected}, as in one process",
            hint,
        )
        expect(
            all(torch.equal(value, weights[name]) for name, value in model.state_dict().items()),
            "evaluate has changed the model",
            "the same weights as before",
            "nothing trains here",
        )


def same(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Equal to 1e-12: sums of 25 numbers of order 1 in fp64."""
    return all(abs(x - y) <= 1e-12 for x, y in zip(a, b, strict=True))
