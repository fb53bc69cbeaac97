"""The check of the exercise average_the_gradients.py; run by tools/exercises.py."""

import copy
from types import ModuleType

import torch
import torch.nn.functional as F
from grading import expect
from shared import CountAllReduce, gradients, largest_difference
from torch import Tensor, nn


class Awkward(nn.Module):
    """A small model in fp64 with a tied weight, a frozen one, and one that no output needs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Linear(6, 6)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.inner.weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.unused = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.again(torch.tanh(self.inner(self.frozen(x))))))


def check(module: ModuleType, rank: int, world_size: int) -> None:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (12,), generator=generator)
    one_process = Awkward()
    F.cross_entropy(one_process(inputs), labels).backward()
    expected = gradients(one_process)

    model = Awkward()
    before = copy.deepcopy(model.state_dict())
    share = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
    F.cross_entropy(model(inputs[share]), labels[share]).backward()
    alone = gradients(model)
    with CountAllReduce() as counter:
        module.average_gradients(model)
    found = gradients(model)

    for name, value in model.state_dict().items():
        expect(
            torch.equal(value, before[name]),
            f"{name} itself has changed",
            "the same weights as before",
            "average parameter.grad, and leave the parameter to the optimizer",
        )
    extra = sorted(set(found) - set(expected))
    expect(
        not extra,
        f"{', '.join(extra)} had no gradient and has one now",
        "grad is None, as before",
        "skip a parameter whose grad is None: zeros make AdamW decay a weight that nothing trains",
    )
    missing = sorted(set(expected) - set(found))
    expect(not missing, f"{', '.join(missing)} lost its gradient", "a gradient", "work in place, or assign .grad")
    name, difference = largest_difference(found, expected)
    if difference > 1e-12 or difference != difference:
        hint = "compare with the gradient of one process that sees the whole batch"
        if largest_difference(found, alone)[1] == 0:
            hint = "these are still the gradients of this rank alone"
        elif largest_difference(found, {n: g * world_size for n, g in expected.items()})[1] < 1e-12:
            hint = f"this is the sum over the ranks: {world_size} times too much"
        expect(
            False,
            f"on rank {rank} the gradient of {name} is off by {difference:.1e}",
            "the mean over all ranks, to 1e-12",
            hint,
        )
    numbers = sum(gradient.numel() for gradient in expected.values())
    expect(
        counter.elements == numbers,
        f"{counter.elements} numbers travelled",
        f"{numbers}, each gradient once",
        "model.parameters() gives a tied weight once; lists of layers or names give it twice",
    )
