"""The check of the exercise tree_broadcast.py; run by tools/exercises.py."""

import math
from types import ModuleType

import torch
from grading import expect
from shared import Messages, from_all

WORLD_SIZES = (2, 3, 4)


def rounds(logs: list[list[tuple[str, int, int]]]) -> int:
    """The rounds that the messages of all ranks take, when a rank sends or receives one message in a round."""
    now, place = [0] * len(logs), [0] * len(logs)
    under_way: dict[tuple[int, int], list[int]] = {}  # (sender, receiver): the round of each message
    moved = True
    while moved:
        moved = False
        for rank, log in enumerate(logs):
            if place[rank] == len(log):
                continue
            name, _, peer = log[place[rank]]
            if name == "send":
                now[rank] += 1
                under_way.setdefault((rank, peer), []).append(now[rank])
            elif under_way.get((peer, rank)):
                now[rank] = max(now[rank] + 1, under_way[peer, rank].pop(0))
            else:
                continue
            place[rank] += 1
            moved = True
    return max(now)


def check(module: ModuleType, rank: int, world_size: int) -> None:
    values = [torch.randn(3, 5, generator=torch.Generator().manual_seed(r)) for r in range(world_size)]
    for root in range(world_size):
        mine = values[rank].clone()
        with Messages() as messages:
            module.tree_broadcast(mine, root)
        owner = [r for r in range(world_size) if torch.equal(mine, values[r])]
        where = f"tree_broadcast from rank {root} of {world_size}"
        expect(
            owner == [root],
            f"after {where}, rank {rank} holds {f'the tensor of rank {owner[0]}' if owner else 'something else'}",
            f"the tensor of rank {root}",
            "number the ranks from the root, (rank - root) % n, and turn numbers back into ranks to send",
        )
        messages.expect_only_messages()
        logs = from_all(messages.log)
        sent = [sum(name == "send" for name, _, _ in log) for log in logs]
        expect(
            sum(sent) == world_size - 1,
            f"{where}: the ranks sent {sent} messages",
            f"{world_size - 1} together: every rank but the root receives once",
            "who already has the tensor receives nothing more; use dist.send and dist.recv",
        )
        needed, least = rounds(logs), math.ceil(math.log2(world_size))
        expect(
            needed <= least,
            f"{where} takes {needed} rounds; messages sent by each rank: {sent}",
            f"{least} rounds",
            "in every round, all ranks that have the tensor send it on",
        )
