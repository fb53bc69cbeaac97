"""The check of the exercise recursive_doubling.py; run by tools/exercises.py."""

from types import ModuleType

import torch
from grading import expect
from shared import Messages, from_all
from torch import Tensor

WORLD_SIZES = (2, 3, 4)


def check(module: ModuleType, rank: int, world_size: int) -> None:
    everyone = [torch.randn(7, generator=torch.Generator().manual_seed(r)) for r in range(world_size)]
    mine = everyone[rank].clone()
    if world_size & (world_size - 1):
        expect_refusal(module, mine, world_size)
        return
    with Messages() as messages:
        module.all_reduce(mine)
    exact = torch.stack(everyone).double().sum(0)
    # Two additions in fp32 are off by 2^-24 of a partial sum each; the numbers are below 4.
    expect(
        torch.allclose(mine.double(), exact, rtol=0, atol=1e-6),
        f"on rank {rank} {mine[:3].tolist()} …",
        f"the sum {exact[:3].tolist()} …",
        "add what the partner sent, wait for both requests before you do, then swap the sum",
    )
    expect(
        all(other == mine.tolist() for other in from_all(mine.tolist())),
        "sums that differ between ranks in their last bits",
        "the same bits on all ranks",
        "partners add the same two numbers: keep to one partner at a time",
    )
    messages.expect_only_messages()
    count = world_size.bit_length() - 1
    sent = [size for size, _ in messages.sent]
    expect(
        sent == [mine.nbytes] * count,
        f"rank {rank} sent messages of {sent} bytes",
        f"log2 n of them, of the whole tensor: {[mine.nbytes] * count}",
        "the partner of round k is rank ^ 2**k, and rounds go on while 2**k < n",
    )


def expect_refusal(module: ModuleType, mine: Tensor, world_size: int) -> None:
    found, text = "no error", ""
    with Messages() as messages:
        try:
            module.all_reduce(mine)
        except Exception as error:  # whatever else comes of ranks without a partner
            found, text = f"{type(error).__name__}: {str(error).splitlines()[0]}", str(error)
    expect(
        found.startswith("ValueError") and str(world_size) in text,
        f"{found}, on {world_size} ranks",
        f"a ValueError that names the {world_size} ranks",
        "some of them have no partner; a power of two has a single bit: n & (n - 1) is 0",
    )
    expect(
        not messages.log,
        f"{len(messages.log)} messages before the error",
        "none",
        "look at the number of ranks first: nobody must wait for a rank that has given up",
    )
