"""From one rank to another: send and receive, blocking and not, in batches, around a ring; and the deadlock.

    torchrun --nproc-per-node=3 collectives/point_to_point.py                   # ten seconds, the deadlock included
    torchrun --nproc-per-node=2 collectives/point_to_point.py --only both_send_first

Messages between two ranks have no names: the first `recv` from a rank gets what it sent first. What a pipeline, a ring
or a halo exchange needs is made of these, and so is every collective (ring_all_reduce.py). Each function prints what
every rank held before and after, and is checked against what it must be.
"""

import datetime
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from collective_ops import Picture, numbers, show, tensor
from torch.distributed.elastic.multiprocessing.errors import record

from common.config import parse
from common.ranks import Ranks, fail, join

PATIENCE_S = 2.0  # how long the ranks of the deadlock wait for each other: Gloo connects in milliseconds


def neighbours(ranks: Ranks) -> tuple[int, int]:
    """The rank before this one and the rank after it, around the ring."""
    return (ranks.rank - 1) % ranks.world_size, (ranks.rank + 1) % ranks.world_size


def blocking(ranks: Ranks) -> Picture:
    """send and recv along a chain: rank r waits for rank r − 1, adds its number, and sends on to rank r + 1"""
    total = tensor([0], ranks)
    if ranks.rank > 0:
        dist.recv(total, src=ranks.rank - 1)
    total += ranks.rank
    if ranks.rank < ranks.world_size - 1:
        dist.send(total, dst=ranks.rank + 1)  # the buffer may be used again when this returns
    return Picture(ranks.rank, total.item(), sum(range(ranks.rank + 1)))


def in_order(ranks: Ranks) -> Picture:
    """rank 0 sends two messages to each other rank: they arrive in the order in which they were sent"""
    if ranks.is_main:
        for peer in range(1, ranks.world_size):
            for value in (100 + peer, 200 + peer):
                dist.send(tensor([value], ranks), dst=peer)
        return Picture("100 + r, then 200 + r", None, None)
    first, second = tensor([-1], ranks), tensor([-1], ranks)
    dist.recv(first, src=0)
    dist.recv(second, src=0)
    return Picture(None, [first.item(), second.item()], [100 + ranks.rank, 200 + ranks.rank])


def nonblocking(ranks: Ranks) -> Picture:
    """isend to the next rank while irecv from the one before; both return at once, and wait() makes sure"""
    before, after = neighbours(ranks)
    mine, received = tensor(numbers(ranks.rank, 2), ranks), tensor([-1, -1], ranks)
    if ranks.device.type == "cuda":  # NCCL runs them one after the other in one stream: a circle must be one batch
        return batched(ranks)
    requests = [dist.isend(mine, dst=after), dist.irecv(received, src=before)]
    # Until wait() has returned, `mine` must not be written to, and `received` holds anything.
    for request in requests:
        request.wait()
    return Picture(mine.tolist(), received.tolist(), numbers(before, 2))


def batched(ranks: Ranks) -> Picture:
    """the same as a batch: nothing in it waits for anything else in it, in whatever order it was written (NCCL too)"""
    before, after = neighbours(ranks)
    mine, received = tensor(numbers(ranks.rank, 2), ranks), tensor([-1, -1], ranks)
    both = [dist.P2POp(dist.isend, mine, after), dist.P2POp(dist.irecv, received, before)]
    for request in dist.batch_isend_irecv(both):
        request.wait()
    return Picture(mine.tolist(), received.tolist(), numbers(before, 2))


def ring(ranks: Ranks) -> Picture:
    """world size − 1 steps around the ring: pass on what came last, and every rank has seen everything (all-gather)"""
    before, after = neighbours(ranks)
    seen, passing = {ranks.rank: numbers(ranks.rank, 2)}, tensor(numbers(ranks.rank, 2), ranks)
    for step in range(1, ranks.world_size):
        received = torch.empty_like(passing)
        both = [dist.P2POp(dist.isend, passing, after), dist.P2POp(dist.irecv, received, before)]
        for request in dist.batch_isend_irecv(both):
            request.wait()
        seen[(ranks.rank - step) % ranks.world_size] = received.tolist()
        passing = received
    expected = [numbers(rank, 2) for rank in range(ranks.world_size)]
    return Picture(numbers(ranks.rank, 2), [seen[rank] for rank in range(ranks.world_size)], expected)


def swap(ranks: Ranks, receives_first: tuple[int, ...]) -> str:
    """Ranks 0 and 1 exchange a number by blocking calls; what became of it, on this rank.

    Args:
        receives_first: which of the two receive before they send.
    """
    # Always Gloo, on the CPU: NCCL's watchdog would end the process in place of an error that one can catch. Broken
    # connections stay broken, so each try has a group of its own, with a timeout of its own.
    group = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=PATIENCE_S), backend="gloo")
    if ranks.rank > 1:
        return "looks on"
    peer, received = 1 - ranks.rank, torch.tensor([-1])
    calls = [
        lambda: dist.send(torch.tensor([10 * ranks.rank]), dst=peer, group=group),
        lambda: dist.recv(received, src=peer, group=group),
    ]
    if ranks.rank in receives_first:
        calls.reverse()
    try:
        for call in calls:
            call()
    except RuntimeError as error:
        return str(error).splitlines()[0].rpartition("] ")[2]  # without the place in Gloo's source
    return f"got {received.item()}"


def deadlock_picture(ranks: Ranks, receives_first: tuple[int, ...], waits_for: str) -> Picture:
    """The picture of a way to swap that must end in a timeout of `waits_for`: on one rank at least."""
    if ranks.rank > 1:
        return Picture(None, swap(ranks, receives_first), "looks on")
    after, timeout = (
        swap(ranks, receives_first),
        f"Timed out waiting {PATIENCE_S * 1000:.0f}ms for {waits_for} operation",
    )
    # Whoever gives up first closes the connection, and if the other has not given up in the same moment, it sees that.
    expected = after if after.startswith((timeout, "Connection closed by peer")) else timeout
    return Picture(10 * ranks.rank, after, expected)


def both_send_first(ranks: Ranks) -> Picture:
    """ranks 0 and 1 swap numbers by blocking calls, and both send before they receive: a deadlock"""
    return deadlock_picture(ranks, (), "send")


def both_receive_first(ranks: Ranks) -> Picture:
    """the same, and both receive before they send: a deadlock everywhere"""
    return deadlock_picture(ranks, (0, 1), "recv")


def one_receives_first(ranks: Ranks) -> Picture:
    """the same, and rank 1 receives before it sends: this works"""
    expected = f"got {10 * (1 - ranks.rank)}" if ranks.rank < 2 else "looks on"
    return Picture(10 * ranks.rank if ranks.rank < 2 else None, swap(ranks, (1,)), expected)


AFTERWORD = """\
Why: a blocking send returns when its buffer may be used again. Gloo hands data over only to a receive that has been
posted, whatever the size; so two ranks that both send first wait for each other for ever, or until the group's
timeout. MPI and some transports copy small messages away and let the send return ("eager"): there the same program
works on small tensors and hangs on large ones. Both receiving first hangs everywhere. To be safe: let one side receive
first, or use batch_isend_irecv, where there is no first."""

OPERATIONS: dict[str, Callable[[Ranks], Picture]] = {
    function.__name__: function
    for function in (
        blocking, in_order, nonblocking, batched, ring, both_send_first, both_receive_first, one_receives_first,
    )
}  # fmt: skip


@dataclass
class PointToPointConfig:
    """What to show."""

    only: str = "all"
    """all, or one of blocking, in_order, nonblocking, batched, ring, both_send_first, both_receive_first and
    one_receives_first."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: every GPU if there is one, else the CPU."""

    def __post_init__(self) -> None:
        if self.only != "all" and self.only not in OPERATIONS:
            near = difflib.get_close_matches(self.only, OPERATIONS, 1, 0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"only = {self.only!r} is no operation; {hint}allowed: all, {', '.join(OPERATIONS)}")


@record
def main(config: PointToPointConfig) -> None:
    ranks = join(config.device, timeout_s=60)
    if ranks.world_size < 2:
        fail("one process has nobody to send to; start several with torchrun --nproc-per-node=2")
    names = list(OPERATIONS) if config.only == "all" else [config.only]
    for name in names:
        show(OPERATIONS[name], ranks)
        if name == "both_send_first" and ranks.is_main:
            print(AFTERWORD)
    if ranks.is_main:
        print(f"\n{len(names)} operations on {ranks.world_size} ranks: each as its definition says")
    ranks.leave()


if __name__ == "__main__":
    main(parse(PointToPointConfig))
