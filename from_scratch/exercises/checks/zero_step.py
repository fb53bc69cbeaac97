"""The check of the exercise zero_step.py; run by tools/exercises.py."""

from types import ModuleType

import torch
from grading import expect
from shared import EXACT, Collectives, close, off, random
from torch import Tensor, nn

WORLD_SIZES = (2, 3, 4)


def check(module: ModuleType, rank: int, world_size: int) -> None:
    settings = {"lr": 0.1, "weight_decay": 0.1}
    # 25 elements: 2, 3 and 4 do not divide them. 5 elements on 4 ranks: nothing is left for the last.
    for shapes in ([(4, 5), (5,)], [(2, 2), (1,)]):
        parameters = [nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(shapes)]
        whole = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
        plain = torch.optim.AdamW(whole, **settings)
        sharded = module.ShardedAdamW(parameters, **settings)
        count = sum(parameter.numel() for parameter in whole)
        size = -(-count // world_size)
        where = f"{count} elements on {world_size} ranks"
        for step in range(5):
            for number, (a, b) in enumerate(zip(whole, parameters, strict=True)):
                a.grad = random(*a.shape, seed=10 * step + number + 2)
                b.grad = a.grad.clone()
            plain.step()
            with Collectives() as counter:
                sharded.step()
            sharded.zero_grad()
            for number, (a, b) in enumerate(zip(whole, parameters, strict=True)):
                difference = off(b.detach(), a.detach())
                own = slice(rank * size, (rank + 1) * size)
                rows = [torch.cat([p.detach().flatten() for p in ps])[own] for ps in (whole, parameters)]
                hint = "is the piece of the gradient that of the same elements as the piece of the parameters?"
                if close(*rows):
                    hint = "this rank's own piece is right: the pieces of the others must come by an all-gather"
                expect(
                    difference <= EXACT,
                    f"{where}: after step {step}, parameter {number} on rank {rank} is off by {difference:.1e}",
                    "that of a plain AdamW, to 1e-12",
                    hint,
                )
        state = [
            value
            for entries in sharded.inner.state.values()
            for value in entries.values()
            if isinstance(value, Tensor) and value.dim()
        ]
        kept = sum(value.nbytes for value in state)
        expect(
            kept == 2 * 8 * size,
            f"{where}: rank {rank} keeps {kept} bytes of optimizer state",
            f"{2 * 8 * size}: two averages in fp64 for each of {size} elements, instead of {2 * 8 * count}",
            "AdamW's state has the shape of its parameters: give it this rank's piece alone",
        )
        expect(
            [size for _, size in counter.log] == [8 * size * world_size],
            f"{where}: a step communicates {counter.log}",
            f"one all-gather of {8 * size * world_size} bytes",
            "gradients are averaged already; a single flat row needs a single message",
        )
