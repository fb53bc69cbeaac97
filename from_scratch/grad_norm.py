"""The global gradient norm: every number of the model's gradient counts once, wherever it lies and whoever holds it.

The rule for all strategies: a rank adds, for each gradient that it holds, its sum of squares divided by the number of
ranks that hold the same one, and the ranks add that up.

    data parallelism        all ranks hold the same: each adds 1/n
    ZeRO, FSDP              each rank has pieces that nobody else has; padding is zero and adds nothing
    tensor parallelism      so it is with slices; norms, which all ranks hold, add 1/n
    pipeline parallelism    so it is with stages; a tied weight, there on two of them, adds 1/2

A rank that clipped by the norm of its own part would scale that part by another factor than the others theirs.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def clip_grad_norm(gradients: Iterable[tuple[Tensor, int]], max_norm: float, group: ProcessGroup) -> Tensor:
    """Scale gradients, in place, to a global norm of at most max_norm; returns the norm before, float64.

    gradients: this rank's, each with the number of ranks of `group` that hold the same; at least one.
    """
    gradients = list(gradients)
    squares = torch.zeros((), dtype=torch.float64, device=gradients[0][0].device)
    for gradient, copies in gradients:
        squares += gradient.to(torch.promote_types(gradient.dtype, torch.float32)).pow(2).sum().double() / copies
    dist.all_reduce(squares, group=group)
    norm = squares.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ does
    for gradient, _ in gradients:
        gradient.mul_(scale)
    return norm
