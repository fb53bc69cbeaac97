"""The check of the exercise share_the_sequence.py; run by tools/exercises.py."""

import itertools
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from grading import expect
from shared import Collectives, close, off, random, wrong
from torch import Tensor


def check(module: ModuleType, rank: int, world_size: int) -> None:
    for n, size in itertools.product((2, 3, 4), (2, 6)):
        length = 2 * n * size
        shares = [torch.as_tensor(module.my_positions(length, r, n)).tolist() for r in range(n)]
        expect(
            sorted(position for share in shares for position in share) == list(range(length)),
            f"of {length} positions {n} ranks hold {shares}",
            "each position once",
            "2n pieces, two for each rank",
        )
        sees = [sum(position + 1 for position in share) for share in shares]
        expect(
            len(set(sees)) == 1,
            f"of {length} positions {n} ranks hold {shares}, which see {sees} keys",
            "the same number on all ranks",
            "the first piece sees least and the last one most: these two go together, then the next two inwards",
        )
        expect(
            all(share == sorted(share) and share[1] == share[0] + 1 for share in shares),
            f"of {length} positions {n} ranks hold {shares}",
            "two pieces, each of neighbours in order, the earlier one first",
            "torch.chunk cuts into pieces",
        )

    length, shape = 12 * world_size, (2, 3, 12 * world_size, 4)
    mine = module.my_positions(length, rank, world_size)
    whole = [random(*shape, seed=i).requires_grad_() for i in range(3)]
    probe = random(*shape, seed=4)
    expected = F.scaled_dot_product_attention(*whole, is_causal=True)
    (expected * probe).sum().backward()

    parts = [tensor.detach()[:, :, mine].clone().requires_grad_() for tensor in whole]
    honest, pairs = F.scaled_dot_product_attention, 0

    def counted(query: Tensor, key: Tensor, *more: Any, **named: Any) -> Tensor:
        nonlocal pairs
        pairs += query.shape[2] * key.shape[2]
        return honest(query, key, *more, **named)

    F.scaled_dot_product_attention = counted
    try:
        with Collectives() as counter:
            output = module.attend(*parts)
            forward = counter.count("allgather"), len(counter.log)
            right = expected.detach()[:, :, mine]
            hint = "keys in the order of the sequence: the early pieces of ranks 0 … n - 1, the late ones of n - 1 … 0"
            if close(output, honest(*(part.detach() for part in parts), is_causal=True)):
                hint = "these queries have seen the keys of their own rank only"
            expect(
                close(output, right),
                f"the output on rank {rank} is off by {off(output, right):.1e}",
                "that of one process at its positions, to 1e-12",
                hint,
            )
            (output * probe[:, :, mine]).sum().backward()
    finally:
        F.scaled_dot_product_attention = honest
    piece = length // (2 * world_size)
    fair = (2 * world_size + 1) * piece**2
    expect(
        pairs == fair,
        f"rank {rank} has computed {pairs} pairs of query and key",
        f"{fair}, as all ranks: half of {length * length // world_size}, and half a piece",
        "a piece is handed the keys up to its own end, and no more: what is masked has been computed",
    )
    for name, part, tensor in zip(("query", "key", "value"), parts, whole, strict=True):
        right = tensor.grad[:, :, mine]
        expect(
            close(part.grad, right),
            f"the gradient of {name} on rank {rank} {wrong(part.grad, right)}",
            "that of one process at its positions, to 1e-12",
            "other ranks' queries have looked at these keys: the gathering has to hand their gradients back",
        )
    back = counter.count("reducescatter"), len(counter.log) - forward[1]
    expect(
        forward == (1, 1) and back == (1, 1),
        f"communication: {counter.names()}",
        "one all-gather forward, one reduce-scatter backward",
        "keys and values can be stacked, and gathered together",
    )
