"""The collectives that bandwidth.py times, what each must give, and the traffic that each link carries at least."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# Renamed in torch 2.13; the old names, the only ones before that, are meant to go.
all_gather_single = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
reduce_scatter_single = (
    dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
)


@dataclass
class Message:
    """One message size on this rank: `send` and `receive`, (n × chunk,) each, and who takes part.

    Collectives that work in place do so in `receive`.
    """

    send: torch.Tensor
    receive: torch.Tensor
    group: dist.ProcessGroup
    rank: int  # within the group, as everywhere below
    n: int

    @property
    def chunk(self) -> int:
        """Elements of each rank's part."""
        return self.send.numel() // self.n

    @property
    def mine(self) -> slice:
        """This rank's part."""
        return slice(self.rank * self.chunk, (self.rank + 1) * self.chunk)


def send_to_next(m: Message) -> None:
    """Around the ring: every rank sends to the next one while it receives from the one before."""
    requests = [
        dist.P2POp(dist.irecv, m.receive, group=m.group, group_peer=(m.rank - 1) % m.n),  # first: ring_all_reduce.py
        dist.P2POp(dist.isend, m.send, group=m.group, group_peer=(m.rank + 1) % m.n),
    ]
    for request in dist.batch_isend_irecv(requests):
        request.wait()


RUN: dict[str, Callable[[Message], Any]] = {
    "all_reduce": lambda m: dist.all_reduce(m.receive, group=m.group),
    "all_gather": lambda m: all_gather_single(m.receive, m.send[m.mine], group=m.group),
    "reduce_scatter": lambda m: reduce_scatter_single(m.receive[m.mine], m.send, group=m.group),
    "all_to_all": lambda m: dist.all_to_all_single(m.receive, m.send, group=m.group),
    "broadcast": lambda m: dist.broadcast(m.receive, group_src=0, group=m.group),
    "reduce": lambda m: dist.reduce(m.receive, group_dst=0, group=m.group),
    "send_recv": send_to_next,
}


REDUCING = ("all_reduce", "reduce_scatter", "reduce")


def bus_factor(collective: str, n: int) -> float:
    """Bus bandwidth / algorithm bandwidth on `n` ranks, by nccl-tests' doc/PERFORMANCE.md."""
    if collective == "all_reduce":
        return 2 * (n - 1) / n  # a reduce-scatter and an all-gather
    if collective in ("all_gather", "reduce_scatter", "all_to_all"):
        return (n - 1) / n  # every rank has its own part already
    return 1.0


def pattern(collective: str, rank: int, like: torch.Tensor) -> torch.Tensor:
    """What `rank` sends, in the shape of `like`: small whole numbers, which every dtype here holds exactly.

    A sum of as many as 128 ranks stays exact even in bf16 (8 bits). What is only moved has more different values,
    so that a part in the wrong place is seen.
    """
    period = 3 if collective in REDUCING else 251
    values = (torch.arange(period, device=like.device) + 97 * rank) % period
    return values.to(like.dtype).repeat(math.ceil(like.numel() / period))[: like.numel()]


def expected(collective: str, m: Message) -> tuple[slice, torch.Tensor]:
    """Which part of `receive` this rank must have filled, and with what."""
    everything, nothing = slice(0, m.send.numel()), slice(0, 0)
    if collective in REDUCING:
        if collective == "reduce" and m.rank != 0:
            return nothing, m.send[nothing]  # what stands in the others' buffers is not defined
        total = torch.zeros_like(m.send)
        for rank in range(m.n):
            total += pattern(collective, rank, m.send)
        part = m.mine if collective == "reduce_scatter" else everything
        return part, total[part]
    if collective in ("all_gather", "all_to_all"):
        whole = torch.empty_like(m.send)
        for rank, place in enumerate(whole.split(m.chunk)):
            sent = pattern(collective, rank, m.send)
            place.copy_(sent[rank * m.chunk :][: m.chunk] if collective == "all_gather" else sent[m.mine])
        return everything, whole
    source = 0 if collective == "broadcast" else (m.rank - 1) % m.n
    return everything, pattern(collective, source, m.send)


def is_right(collective: str, m: Message) -> bool:
    """Run the collective once on known numbers; True when this rank has received what it must."""
    m.send.copy_(pattern(collective, m.rank, m.send))
    m.receive.copy_(m.send)
    RUN[collective](m)
    part, values = expected(collective, m)
    # Sums round in bf16 beyond 128 ranks (fp16: 1024); a lost or doubled part of the data is off by more than 5 %.
    exact = collective not in REDUCING or m.n * torch.finfo(m.send.dtype).eps <= 1
    found = m.receive[part]
    return torch.equal(found, values) if exact else torch.allclose(found, values, rtol=0.05)
