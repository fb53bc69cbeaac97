"""Do all ranks still hold the same weights? The guard against the silent bug of data parallelism.

A rank that misses one all-reduce goes on training, its loss goes on falling, and nothing complains. One integer per
tensor finds it: the sum of the tensor's bit patterns, equal on all ranks only if (for all practical purposes) every
bit is. All sums travel in one small all-reduce, cheap enough for every few dozen steps.
"""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from common.ranks import fail

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_sums(model: torch.nn.Module) -> tuple[list[str], torch.Tensor]:
    """Sum the bits of every parameter and buffer as integers, modulo 2^64.

    Returns:
        The tensors' names, and the sums, (number of tensors,) int64 on the model's device.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    sums = [t.detach().contiguous().view(_BITS[t.element_size()]).sum(dtype=torch.int64) for t in tensors.values()]
    return list(tensors), torch.stack(sums)


def _groups(model: torch.nn.Module, group: dist.ProcessGroup | None) -> dict[dist.ProcessGroup | None, list[int]]:
    """Which tensors, by their numbers, the ranks of which group must hold alike; in the same order on all ranks.

    A DTensor is replicated along some axes of its mesh, or none; `group` shares everything else.
    """
    found: dict[dist.ProcessGroup | None, list[int]] = {}
    for number, tensor in enumerate((*model.parameters(), *model.buffers())):
        holders = [group]
        if isinstance(tensor, DTensor):
            mesh = tensor.device_mesh
            holders = [mesh.get_group(axis) for axis, placed in enumerate(tensor.placements) if placed.is_replicate()]
        for each in holders:
            if dist.get_world_size(each) > 1:
                found.setdefault(each, []).append(number)
    return found


def differing_replicas(model: torch.nn.Module, group: dist.ProcessGroup | None = None) -> tuple[str, list[int]] | None:
    """Compare the model bit by bit on all ranks that must hold the same. All ranks must call it.

    Args:
        group: the ranks that hold the same plain tensors (by default: the world). Of a DTensor its mesh says it.

    Returns:
        None when all agree; otherwise the name of the first parameter that differs and the ranks that differ from the
        most common value. Both are the same on all ranks that hold that parameter.
    """
    if not dist.is_initialized():
        return None
    names, sums = bit_sums(model)
    found = None
    for holders, numbers in _groups(model, group).items():
        mine = sums[numbers]
        extremes = torch.cat([mine, ~mine])  # the maximum of ~x is ~minimum of x: one all-reduce finds both
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=holders)
        differs = extremes[: len(mine)] != ~extremes[len(mine) :]
        if not differs.any():
            continue
        first = int(differs.nonzero()[0])
        seen = [torch.zeros_like(mine[first]) for _ in range(dist.get_world_size(holders))]
        dist.all_gather(seen, mine[first].contiguous(), group=holders)
        values = [int(value) for value in seen]
        usual = max(values, key=values.count)
        ranks = [dist.get_global_rank(holders, i) if holders else i for i, v in enumerate(values) if v != usual]
        found = found or (names[numbers[first]], ranks)
    return found


def check_replicas(model: torch.nn.Module, step: int, group: dist.ProcessGroup | None = None) -> None:
    """End all ranks if some do not hold the weights that they should, naming the first parameter and the ranks."""
    found = differing_replicas(model, group)
    if dist.is_initialized() and any(holders is not None for holders in _groups(model, group)):  # the others must hear
        somewhere = torch.tensor(found is not None, device=next(model.parameters()).device, dtype=torch.int32)
        dist.all_reduce(somewhere, op=dist.ReduceOp.MAX)
        if somewhere and not found:
            fail(f"after step {step} other ranks hold different weights; their message says which")
    if found:
        name, ranks = found
        fail(
            f"after step {step} the ranks hold different weights: first in {name}, on rank(s) "
            f"{', '.join(map(str, ranks))}; a gradient was not reduced on all ranks (no_sync around the last "
            f"micro-batch?), or a parameter was changed by hand"
        )
