"""The check of the exercise ring_reduce_scatter.py; run by tools/exercises.py."""

from types import ModuleType

import torch
from grading import expect
from shared import Messages
from torch import Tensor

WORLD_SIZES = (2, 3, 4)


def check(module: ModuleType, rank: int, world_size: int) -> None:
    for elements in (12, 13, 2):  # 2, 3 and 4 divide the first, none of them the second
        everyone = [
            torch.randint(0, 100, (elements,), generator=torch.Generator().manual_seed(r)) for r in range(world_size)
        ]
        exact = torch.stack(everyone).sum(0).tensor_split(world_size)
        chunks = list(everyone[rank].clone().tensor_split(world_size))
        where = f"{elements} elements on {world_size} ranks"
        with Messages() as messages:
            module.ring_reduce_scatter(chunks)
        if not torch.equal(chunks[rank], exact[rank]):
            complete = [r for r in range(world_size) if exact[r].numel() and torch.equal(chunks[r], exact[r])]
            hint = "what leaves in a step is what was added to in the step before; follow one chunk around"
            if complete:
                hint = f"here chunk {complete[0]} is the complete one: let every chunk start at another rank"
            expect(
                False,
                f"{where}: after ring_reduce_scatter rank {rank} has chunk {rank} = {chunks[rank].tolist()}",
                f"the sum {exact[rank].tolist()}",
                hint,
            )
        expect_ring(messages, chunks, f"{where}, ring_reduce_scatter", rank, world_size)

        chunks = [chunk.clone() if r == rank else torch.full_like(chunk, -1) for r, chunk in enumerate(exact)]
        with Messages() as messages:
            module.ring_all_gather(chunks)
        wrong = [r for r in range(world_size) if not torch.equal(chunks[r], exact[r])]
        expect(
            not wrong,
            f"{where}: after ring_all_gather rank {rank} has a wrong chunk {', '.join(map(str, wrong))}",
            "chunk r of rank r, for every r",
            "at first a rank has only its own chunk to send, and then what has just arrived",
        )
        expect_ring(messages, chunks, f"{where}, ring_all_gather", rank, world_size)


def expect_ring(messages: Messages, chunks: list[Tensor], where: str, rank: int, world_size: int) -> None:
    """n - 1 messages of a chunk each, to the next rank."""
    messages.expect_only_messages()
    peers = sorted({peer for _, peer in messages.sent})
    expect(
        set(peers) <= {(rank + 1) % world_size},
        f"{where}: rank {rank} sent to {peers}",
        f"messages to rank {(rank + 1) % world_size} alone",
        "use pass_on: a ring has one link from each rank",
    )
    sizes = sorted(chunk.nbytes for chunk in chunks)
    count, sent = len(messages.sent), sum(size for size, _ in messages.sent)
    expect(
        count <= world_size - 1 and sent <= sum(sizes[1:]),
        f"{where}: rank {rank} sent {count} messages, {sent} of the tensor's {sum(sizes)} bytes",
        f"{world_size - 1} messages, (n - 1) / n of the bytes: {sum(sizes[1:])} at most",
        "one chunk in a step, and n - 1 steps: the last chunk to arrive need not go on",
    )
