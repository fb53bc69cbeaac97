"""Every collective once: what each rank holds before and after, checked against the definition.

    torchrun --nproc-per-node=3 collectives/collective_ops.py                   # all of them: five seconds
    torchrun --nproc-per-node=4 collectives/collective_ops.py --only all_to_all
    torchrun --nproc-per-node=8 collectives/collective_ops.py                   # eight GPUs, if there are as many

A collective is a call that *all* ranks of a group make, in the same order, with tensors that fit together. Rank r
starts with numbers that begin with 10 r, so that one can see where each has come from. Every function below holds one
call; what it should give is worked out beside it by plain arithmetic, with no communication, and compared.
"""

import difflib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from bandwidth_operations import all_gather_single, reduce_scatter_single
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record

from common.config import parse
from common.ranks import Ranks, fail, join


@dataclass
class Picture:
    """What this rank held before and after, and what the definition says it holds after; None: not defined."""

    before: Any
    after: Any
    expected: Any


def numbers(rank: int, count: int) -> list[int]:
    """What `rank` starts with: 10 · rank, 10 · rank + 1, …; its elements by hand."""
    return [10 * rank + i for i in range(count)]


def tensor(values: list[int], ranks: Ranks) -> torch.Tensor:
    """The values on this rank's device, (count,) int64."""
    return torch.tensor(values, device=ranks.device)


def column_sums(members: list[int], count: int) -> list[int]:
    """The element-by-element sum of what `members` start with."""
    return [sum(numbers(rank, count)[i] for rank in members) for i in range(count)]


# --------------------------------------------------------------------------------- from one rank, or to one


def broadcast(ranks: Ranks) -> Picture:
    """one rank's tensor to all (here the last one's)"""
    source, mine = ranks.world_size - 1, numbers(ranks.rank, 2)
    buffer = tensor(mine, ranks)
    dist.broadcast(buffer, src=source)
    return Picture(mine, buffer.tolist(), numbers(source, 2))


def scatter(ranks: Ranks) -> Picture:
    """rank 0 cuts what it holds into parts: the r-th goes to rank r"""
    whole = numbers(0, 2 * ranks.world_size)
    parts = list(tensor(whole, ranks).split(2)) if ranks.is_main else None  # only the source has something to cut
    part = tensor([-1, -1], ranks)
    dist.scatter(part, parts, src=0)
    return Picture(whole if ranks.is_main else None, part.tolist(), whole[2 * ranks.rank :][:2])


def gather(ranks: Ranks) -> Picture:
    """the parts of all ranks, by rank, to rank 0"""
    n, mine = ranks.world_size, numbers(ranks.rank, 2)
    parts = [tensor([-1, -1], ranks) for _ in range(n)] if ranks.is_main else None
    dist.gather(tensor(mine, ranks), parts, dst=0)
    if parts is None:
        return Picture(mine, None, None)
    return Picture(mine, [part.tolist() for part in parts], [numbers(rank, 2) for rank in range(n)])


def reduce(ranks: Ranks) -> Picture:
    """the sum over all ranks, element by element, to rank 0; the others' buffers are then not defined"""
    mine = numbers(ranks.rank, 2)
    buffer = tensor(mine, ranks)
    dist.reduce(buffer, dst=0)
    if not ranks.is_main:
        return Picture(mine, None, None)  # Gloo leaves partial sums there, NCCL the input
    return Picture(mine, buffer.tolist(), column_sums(list(range(ranks.world_size)), 2))


# ------------------------------------------------------------------------------------------- from all to all


def all_reduce(ranks: Ranks) -> Picture:
    """the sum over all ranks, on all ranks: a reduce and a broadcast in one (DDP's gradients)"""
    mine = numbers(ranks.rank, 2)
    buffer = tensor(mine, ranks)
    dist.all_reduce(buffer)
    return Picture(mine, buffer.tolist(), column_sums(list(range(ranks.world_size)), 2))


def all_reduce_operations(ranks: Ranks) -> Picture:
    """what else than a sum: average, least, greatest, product"""
    held = [float(1 + rank % 2) for rank in range(ranks.world_size)]  # so that products of many stay exact
    after = {}
    for name in ("SUM", "AVG", "MIN", "MAX", "PRODUCT"):
        buffer = torch.tensor(held[ranks.rank], device=ranks.device)  # AVG is for floating point only
        dist.all_reduce(buffer, getattr(dist.ReduceOp, name))
        after[name] = round(buffer.item(), 5)  # NCCL divides before it adds, Gloo after: last bits may differ
    average = round(sum(held) / len(held), 5)
    expected = {"SUM": sum(held), "AVG": average, "MIN": min(held), "MAX": max(held), "PRODUCT": math.prod(held)}
    return Picture(held[ranks.rank], after, expected)


def all_gather(ranks: Ranks) -> Picture:
    """the parts of all ranks, by rank, on all ranks (FSDP's weights before a layer computes)"""
    n, mine = ranks.world_size, numbers(ranks.rank, 2)
    whole = tensor([-1] * 2 * n, ranks)
    all_gather_single(whole, tensor(mine, ranks))
    return Picture(mine, whole.tolist(), [value for rank in range(n) for value in numbers(rank, 2)])


def reduce_scatter(ranks: Ranks) -> Picture:
    """the sum over all ranks, cut into parts: the r-th to rank r (FSDP's gradients)"""
    n, mine = ranks.world_size, numbers(ranks.rank, 2 * ranks.world_size)
    part = tensor([-1, -1], ranks)
    reduce_scatter_single(part, tensor(mine, ranks))
    return Picture(mine, part.tolist(), column_sums(list(range(n)), 2 * n)[2 * ranks.rank :][:2])


def all_to_all(ranks: Ranks) -> Picture:
    """every rank sends its j-th part to rank j: rows become columns"""
    n, mine = ranks.world_size, numbers(ranks.rank, ranks.world_size)
    received = tensor([-1] * n, ranks)
    dist.all_to_all_single(received, tensor(mine, ranks))
    return Picture(mine, received.tolist(), [numbers(rank, n)[ranks.rank] for rank in range(n)])


def all_to_all_uneven(ranks: Ranks) -> Picture:
    """the same with parts of different sizes, here j + 1 for rank j (tokens on their way to experts)"""
    n, me = ranks.world_size, ranks.rank
    sizes = [j + 1 for j in range(n)]
    mine = numbers(me, sum(sizes))
    received = tensor([-1] * n * sizes[me], ranks)
    # Both sides must know all sizes beforehand; where they depend on the data, an all-to-all of the sizes comes first.
    dist.all_to_all_single(received, tensor(mine, ranks), output_split_sizes=[sizes[me]] * n, input_split_sizes=sizes)
    start = sum(sizes[:me])
    expected = [value for rank in range(n) for value in numbers(rank, sum(sizes))[start : start + sizes[me]]]
    return Picture(mine, received.tolist(), expected)


# ------------------------------------------------------------------------------- waiting, and not waiting


def barrier(ranks: Ranks) -> Picture:
    """no rank goes on before all have come; nothing is sent (shown: how many had come, here before the late rank 0)"""
    # The count must not travel by a collective, which would be a barrier itself: it stands in a key-value store.
    address, port = os.environ["MASTER_ADDR"], 0
    store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False) if ranks.is_main else None
    port = ranks.broadcast(store.port if store else None)
    store = store or dist.TCPStore(address, port, is_master=False)
    if ranks.is_main:
        time.sleep(0.2)
    before = store.add("come", 1)
    ranks.barrier()
    after = store.add("come", 0)
    ranks.barrier()  # rank 0 serves the store, and must not take it away while another reads
    return Picture(f"number {before} to come" if ranks.is_main else "waits", after, ranks.world_size)


def asynchronous(ranks: Ranks) -> Picture:
    """async_op=True: the call returns at once, one computes meanwhile, and reads the result only after wait()"""
    mine = numbers(ranks.rank, 2)
    buffer = tensor(mine, ranks)
    work = dist.all_reduce(buffer, async_op=True)
    # Here one computes something else: anything that does not touch the buffer.
    work.wait()
    return Picture(mine, buffer.tolist(), column_sums(list(range(ranks.world_size)), 2))


# -------------------------------------------------------------------------- Python objects, by pickle


def broadcast_objects(ranks: Ranks) -> Picture:
    """any picklable values of rank 0 to all: convenient for settings, slow for tensors"""
    settings = [{"name": "run"}, 7]
    values = settings if ranks.is_main else [None, None]
    held = list(values)
    dist.broadcast_object_list(values, src=0, device=ranks.device)
    return Picture(held, values, settings)


def scatter_objects(ranks: Ranks) -> Picture:
    """the r-th object of rank 0's list to rank r"""
    files = [f"part{rank}" for rank in range(ranks.world_size)]
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, files if ranks.is_main else None, src=0)
    return Picture(files if ranks.is_main else None, mine[0], files[ranks.rank])


def all_gather_objects(ranks: Ranks) -> Picture:
    """every rank's object on all ranks; they may differ in size, which tensors may not"""
    held = [list(range(rank + 1)) for rank in range(ranks.world_size)]
    values: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(values, held[ranks.rank])
    return Picture(held[ranks.rank], values, held)


# ------------------------------------------------------------------------------------- parts of the world


def new_group(ranks: Ranks) -> Picture:
    """an all-reduce among the even ranks, and one among the odd ranks, at the same time"""
    mine = numbers(ranks.rank, 2)
    buffer = tensor(mine, ranks)
    for parity in range(min(2, ranks.world_size)):
        members = list(range(parity, ranks.world_size, 2))
        group = dist.new_group(members)  # all ranks make this call for every group, members or not: else it hangs
        if ranks.rank in members:
            dist.all_reduce(buffer, group=group)
    return Picture(mine, buffer.tolist(), column_sums(list(range(ranks.rank % 2, ranks.world_size, 2)), 2))


def subgroups(ranks: Ranks) -> Picture:
    """the ranks in two blocks of neighbours, made in one call; the first of each block broadcasts"""
    half = math.ceil(ranks.world_size / 2)
    blocks = [list(range(half)), list(range(half, ranks.world_size))]
    group, _ = dist.new_subgroups_by_enumeration(blocks)
    mine = numbers(ranks.rank, 2)
    buffer = tensor(mine, ranks)
    # `src` counts in the world, `group_src` within the group: rank 2 of 4 is number 0 of its block.
    dist.broadcast(buffer, group_src=0, group=group)
    return Picture(mine, buffer.tolist(), numbers(0 if ranks.rank < half else half, 2))


def device_mesh(ranks: Ranks) -> Picture:
    """ranks in rows and columns, a group for each: the sum along this rank's row, and along its column"""
    n = ranks.world_size
    rows = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
    columns = n // rows
    mesh = init_device_mesh(ranks.device.type, (rows, columns), mesh_dim_names=("data", "model"))
    sums = {}
    for axis in ("model", "data"):  # the group that varies along "model" is this rank's row
        buffer = tensor([10 * ranks.rank], ranks)
        dist.all_reduce(buffer, group=mesh.get_group(axis))
        sums[axis] = buffer.item()
    row, column = divmod(ranks.rank, columns)
    expected = {
        "model": sum(10 * (row * columns + c) for c in range(columns)),
        "data": sum(10 * (r * columns + column) for r in range(rows)),
    }
    return Picture(f"{10 * ranks.rank} at ({row}, {column}) of {rows} × {columns}", sums, expected)


OPERATIONS: dict[str, Callable[[Ranks], Picture]] = {
    function.__name__: function
    for function in (
        broadcast, scatter, gather, reduce, all_reduce, all_reduce_operations, all_gather, reduce_scatter, all_to_all,
        all_to_all_uneven, barrier, asynchronous, broadcast_objects, scatter_objects, all_gather_objects, new_group,
        subgroups, device_mesh,
    )
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- output


def show(operation: Callable[[Ranks], Picture], ranks: Ranks) -> None:
    """Run one operation; rank 0 prints a row for each rank, gathered so that lines do not get among each other.

    Raises:
        SystemExit: (exit code 2) some rank holds something else than the definition says.
    """
    pictures: list[Picture] = ranks.all_gather(operation(ranks))
    name = operation.__name__
    if ranks.is_main:
        held = ["–" if picture.before is None else str(picture.before) for picture in pictures]
        print(f"\n{name}: {operation.__doc__}")
        for rank, (before, picture) in enumerate(zip(held, pictures, strict=True)):
            after = "–" if picture.after is None else picture.after
            print(f"  rank {rank}  {before:{max(map(len, held))}}  →  {after}", flush=True)
    wrong = [rank for rank, picture in enumerate(pictures) if picture.after != picture.expected]
    if wrong:
        first = pictures[wrong[0]]
        fail(
            f"{name}: rank(s) {', '.join(map(str, wrong))} hold something wrong; rank {wrong[0]} has {first.after}, "
            f"expected {first.expected}; repeat with TORCH_DISTRIBUTED_DEBUG=DETAIL"
        )


@dataclass
class OperationsConfig:
    """What to show."""

    only: str = "all"
    """One operation by its name, several with commas, or all."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: every GPU if there is one, else the CPU."""

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in OPERATIONS:
                near = difflib.get_close_matches(name, OPERATIONS, 1, 0.5)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ValueError(f"only = {name!r} is no operation; {hint}allowed: all, {', '.join(OPERATIONS)}")

    @property
    def names(self) -> list[str]:
        """The names, each once."""
        wanted = self.only.replace(" ", "")
        return list(OPERATIONS) if wanted == "all" else list(dict.fromkeys(wanted.split(",")))


@record
def main(config: OperationsConfig) -> None:
    ranks = join(config.device, timeout_s=60)
    if ranks.world_size < 2:
        fail("one process has nobody to talk to; start several with torchrun --nproc-per-node=3")
    for name in config.names:
        show(OPERATIONS[name], ranks)
    if ranks.is_main:
        print(f"\n{len(config.names)} operations on {ranks.world_size} ranks: each as its definition says")
    ranks.leave()


if __name__ == "__main__":
    main(parse(OperationsConfig))
