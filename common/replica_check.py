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


def differing_replicas(model: torch.nn.Module, group: dist.ProcessGroup | None = None) -> tuple[str, list[int]] | None:
    """Compare the model on all ranks of `group` (by default: the world), bit by bit. All of them must call it.

    Returns:
        None when all agree; otherwise the name of the first parameter that differs and the ranks that differ from the
        most common value. Both are the same on all ranks.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return None
    names, sums = bit_sums(model)
    extremes = torch.cat([sums, ~sums])  # the maximum of ~x is ~minimum of x: one all-reduce finds both
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    differs = extremes[: len(sums)] != ~extremes[len(sums) :]
    if not differs.any():
        return None
    first = int(differs.nonzero()[0])
    seen = [torch.zeros_like(sums[first]) for _ in range(dist.get_world_size(group))]
    dist.all_gather(seen, sums[first].contiguous(), group=group)
    values = [int(value) for value in seen]
    usual = max(values, key=values.count)
    return names[first], [dist.get_global_rank(group, i) if group else i for i, v in enumerate(values) if v != usual]


def check_replicas(model: torch.nn.Module, step: int, group: dist.ProcessGroup | None = None) -> None:
    """End all ranks if they do not hold the same weights, naming the first parameter and the ranks."""
    if found := differing_replicas(model, group):
        name, ranks = found
        fail(
            f"after step {step} the ranks hold different weights: first in {name}, on rank(s) "
            f"{', '.join(map(str, ranks))}; a gradient was not reduced on all ranks (no_sync around the last "
            f"micro-batch?), or a parameter was changed by hand"
        )
