"""The check of the exercise copy_and_reduce.py; run by tools/exercises.py."""

from types import ModuleType

import torch
import torch.nn.functional as F
from grading import expect
from shared import Collectives, close, off, random

WORLD_SIZES = (2, 3, 4)


def check(module: ModuleType, rank: int, world_size: int) -> None:
    x, w1, w2, probe = (random(*shape, seed=i) for i, shape in enumerate([(5, 6), (12, 6), (4, 12), (5, 4)]))
    dense = [tensor.clone().requires_grad_() for tensor in (x, w1, w2)]
    expected = F.linear(F.gelu(F.linear(dense[0], dense[1])), dense[2])
    (expected * probe).sum().backward()
    gradients = [dense[0].grad, dense[1].grad.chunk(world_size, 0)[rank], dense[2].grad.chunk(world_size, 1)[rank]]

    mine = [x.clone(), w1.chunk(world_size, 0)[rank].clone(), w2.chunk(world_size, 1)[rank].clone()]
    for tensor in mine:
        tensor.requires_grad_()
    own_part = F.linear(F.gelu(F.linear(mine[0], mine[1])), mine[2])
    alone = torch.autograd.grad((own_part * probe).sum(), mine[0])[0]  # what this rank's use of x gives
    with Collectives() as counter:
        y = module.parallel_layers(*mine)
        forward = counter.names()
        if not close(y, expected):
            hint = "first layer, then gelu, then second layer; f before and g after"
            if close(y, own_part):
                hint = "this is the part of this rank alone: g has to sum in its forward"
            elif close(y, own_part * world_size):
                hint = "summed before the second layer, or after it was made equal? g stands at the end"
            expect(False, f"the output on rank {rank} is off by {off(y, expected):.1e}", "that of whole layers", hint)
        (y * probe).sum().backward()
    found = [tensor.grad for tensor in mine]

    expect(
        not all(close(f, world_size * g) for f, g in zip(found, gradients, strict=True)),
        f"all gradients are {world_size} times too large",
        "those of one process",
        "an all-reduce in both backward passes: the gradient that g gets is whole on every rank already",
    )
    names = ("the input", "the first weight", "the second weight")
    for name, gradient, right in reversed(list(zip(names, found, gradients, strict=True))):
        hint = "which of the two functions has this gradient passed through, and what did it do to it?"
        if close(gradient, world_size * right):
            hint = f"{world_size} times too large: g must hand the gradient on as it is"
        elif name == "the input" and close(gradient, alone):
            hint = "this is what this rank's use of the input gives: f must add up all of them in its backward"
        elif gradient is None:
            hint = "no gradient came through: does the tensor pass through apply?"
        expect(
            close(gradient, right),
            f"the gradient of {name} on rank {rank} is off by {off(gradient, right):.1e}",
            "that of one process, to 1e-12",
            hint,
        )
    expect(torch.equal(mine[0].detach(), x), "the input has changed", "the same as before", "all-reduce a clone")
    expect(
        [name for name, _ in counter.log] == ["allreduce"] * 2,
        f"communication: {forward} forward, {counter.names()} in all",
        "one all-reduce forward, and one backward",
        "f costs nothing forward, g nothing backward",
    )
