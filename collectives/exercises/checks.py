"""What is expected of the exercises; run by tools/exercises.py on the number of ranks given here."""

import copy
import math
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from grading import expect
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WORLD_SIZES = {
    "tree_broadcast": (2, 3, 4),
    "ring_reduce_scatter": (2, 3, 4),
    "recursive_doubling": (2, 3, 4),
    "lab_deadlock": (2, 3),
    "lab_wrong_mean": (2, 3),
}


class Messages(TorchDispatchMode):
    """Writes down what the running thread communicates, whichever function started it."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, int, int]] = []  # (send, recv or a collective's name, bytes, the other rank or -1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = str(func).split(".")[1].strip("_")
            size = sum(leaf.nbytes for leaf in tree_leaves(args[0]) if isinstance(leaf, Tensor))
            peer = args[2] if name in ("send", "recv") else -1
            if peer >= dist.get_world_size():  # Gloo does not notice, and waits or dies
                raise IndexError(f"{name} with rank {peer} among {dist.get_world_size()} ranks")
            self.log.append((name, size, peer))
        return func(*args, **(kwargs or {}))

    @property
    def sent(self) -> list[tuple[int, int]]:
        """(bytes, receiver) of each message."""
        return [(size, peer) for name, size, peer in self.log if name == "send"]

    def expect_only_messages(self) -> None:
        collectives = sorted({name for name, _, _ in self.log} - {"send", "recv"})
        expect(
            not collectives,
            f"a call of {', '.join(collectives)}",
            "sends and receives alone",
            "a collective that does it all is what you are to write",
        )


def from_all(mine: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


# ------------------------------------------------------------------------------------------ exercise 1


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


def check_tree_broadcast(module: ModuleType, rank: int, world_size: int) -> None:
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


# ------------------------------------------------------------------------------------------ exercise 2


def check_ring_reduce_scatter(module: ModuleType, rank: int, world_size: int) -> None:
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


# ------------------------------------------------------------------------------------------ exercise 3


def check_recursive_doubling(module: ModuleType, rank: int, world_size: int) -> None:
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


# ------------------------------------------------------------------------------------------------ labs


def one_process(module: ModuleType, steps: int, target: float, world_size: int) -> tuple[nn.Module, list[list[float]]]:
    """The training of lab_deadlock by one process: the model, and the losses of every rank's share."""
    model = module.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses: list[list[float]] = [[] for _ in range(world_size)]
    for step in range(steps):
        optimizer.zero_grad()
        for rank in range(world_size):
            inputs, kinds = module.my_share(step, rank)
            loss = F.cross_entropy(model(inputs), kinds)
            (loss / world_size).backward()
            losses[rank].append(loss.item())
        optimizer.step()
        if max(share[-1] for share in losses) < target:
            break
    return model, losses


def check_lab_deadlock(module: ModuleType, rank: int, world_size: int) -> None:
    _, losses = one_process(module, 40, 0.0, world_size)
    # Between the largest and the smallest loss of step 10: some ranks are below it before others are.
    shares = [share[10] for share in losses]
    for target in (0.0, (min(shares) + max(shares)) / 2):
        where = f"train(steps=40, target={target:.4f})"
        expected, losses = one_process(module, 40, target, world_size)
        model, found = module.train(steps=40, target=target)
        expect(
            len(found) == len(losses[rank]),
            f"{where}: rank {rank} made {len(found)} steps",
            f"{len(losses[rank])} steps: up to the first in which every rank's loss is below the target",
            "all ranks stop together; ask them all in every step",
        )
        apart = max((p - q).abs().max().item() for p, q in zip(model.parameters(), expected.parameters(), strict=True))
        # Both are sums of n gradients in fp64; what differs is the order.
        expect(
            apart <= 1e-12,
            f"{where}: on rank {rank} the weights are {apart:.1e} away from those of one process",
            "the same weights, to 1e-12",
            "sum_over_ranks returns the sum of the tensors of all ranks, and leaves its argument alone",
        )


def check_lab_wrong_mean(module: ModuleType, rank: int, world_size: int) -> None:
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
