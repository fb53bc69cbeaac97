"""Token loss as a sum, computed in chunks so that the logits of a whole batch never exist.

At a vocabulary of 128 256, the fp32 logits of 8 192 tokens take 4.2 GB and their gradient as much again.
A chunk of tokens at a time takes a chunk's share of that.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint


def count_valid(targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Number of targets that count in the loss: an int64 scalar on their device, without a host sync."""
    return (targets != ignore_index).sum()


def chunked_cross_entropy(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, chunk_size: int = 1024, ignore_index: int = -100
) -> Tensor:
    """Sum (not mean) of the cross-entropy of `softmax(hidden @ head_weight.T)` against the targets, in nats.

    hidden: (batch, sequence, width), any float dtype; head_weight: (vocabulary, width); targets: (batch,
    sequence) int64, `ignore_index` where a token does not count. Returns a scalar: fp32, or fp64 for fp64
    input. Under autocast the matmuls run in the low precision; softmax and sums are always fp32 or better.

    Tokens are taken `chunk_size` at a time, so the largest tensor is (chunk_size, vocabulary). The gradient of the
    logits is softmax minus one at the target: it needs nothing of backward, so `FusedLoss` computes it, and both
    gradients that follow from it, while the chunk's logits are there. A head cut by tensor parallelism takes
    `checkpointed_cross_entropy`.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; expected at least 1 token a chunk; raise it")
    if isinstance(head_weight, DTensor):
        return checkpointed_cross_entropy(hidden, head_weight, targets, chunk_size, ignore_index)
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or head_weight.requires_grad)
        flat = hidden.flatten(0, -2), head_weight, targets.flatten()
        return FusedLoss.apply(*flat, chunk_size, ignore_index, dtype, needs_gradient)


class FusedLoss(torch.autograd.Function):
    """Head and cross-entropy in one, with the gradients computed in the forward, as Liger Kernel does (2410.10989).

    Three matmuls with the head weight instead of the four of recomputation. The weight's gradient is summed over
    the chunks in fp32, whatever the precision of the matmuls.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        targets: Tensor,
        chunk_size: int,
        ignore_index: int,
        dtype: torch.dtype,
        needs_gradient: bool,
    ) -> Tensor:
        """hidden (tokens, width), head_weight (vocabulary, width), targets (tokens,); `dtype` of the matmuls."""
        sums = torch.promote_types(dtype, torch.float32)
        weight = head_weight.to(dtype)
        total = torch.zeros((), dtype=sums, device=hidden.device)
        if needs_gradient:
            hidden_gradient = torch.empty_like(hidden, dtype=dtype)
            weight_gradient = torch.zeros_like(weight, dtype=sums)
        for start in range(0, len(targets), chunk_size):
            part, target = hidden[start : start + chunk_size].to(dtype), targets[start : start + chunk_size]
            counts = target != ignore_index
            column = target.where(counts, 0)[:, None]
            logits = F.linear(part, weight).to(sums)
            log_total = logits.logsumexp(-1, keepdim=True)
            losses = (log_total - logits.gather(1, column)).squeeze(1)
            total = total + losses.where(counts, 0).sum()
            if needs_gradient:
                gradient = logits.sub_(log_total).exp_()
                gradient.scatter_add_(1, column, torch.full_like(log_total, -1))
                gradient = gradient.masked_fill_(~counts[:, None], 0).to(dtype)
                hidden_gradient[start : start + chunk_size] = gradient @ weight
                _add_product(weight_gradient, gradient.T, part)
        if needs_gradient:
            ctx.dtypes = hidden.dtype, head_weight.dtype
            ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply what the forward kept by `scale`, in its precision: a gradient scaler's 65 536 is none of fp16."""
        gradients = (kept.to(scale.dtype) * scale for kept in ctx.saved_tensors)
        return *(gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)), *[None] * 5


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in the precision of `total` (fp32 for 16-bit factors)."""
    if left.dtype != total.dtype and left.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:  # elsewhere torch has no matmul with a result wider than its factors
        torch.addmm(total, left.to(total.dtype), right.to(total.dtype), out=total)


def checkpointed_cross_entropy(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, chunk_size: int = 1024, ignore_index: int = -100
) -> Tensor:
    """The same sum with operations that autograd knows: it takes DTensors, and torch's `loss_parallel`.

    The logits of a chunk are computed again in backward (activation checkpointing, arXiv 1604.06174). That costs
    one more head matmul, except where one chunk holds everything.
    """
    flat_hidden, flat_targets = hidden.flatten(0, -2), targets.flatten()
    if flat_targets.numel() <= chunk_size:
        return _sum_of_losses(flat_hidden, head_weight, flat_targets, ignore_index)
    total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    chunks = zip(flat_hidden.split(chunk_size), flat_targets.split(chunk_size), strict=True)
    for chunk_hidden, chunk_targets in chunks:
        total = total + checkpoint(
            _sum_of_losses, chunk_hidden, head_weight, chunk_targets, ignore_index,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
    return total


def _sum_of_losses(hidden: Tensor, head_weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Loss sum of one chunk: hidden (tokens, width), targets (tokens,)."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        # Cast by hand: autocast casts a weight once and keeps it, so its gradients would be summed over the
        # chunks in 16 bits. With one cast a chunk they are summed in the precision of the weight itself.
        dtype = torch.get_autocast_dtype(device)
        hidden, head_weight = hidden.to(dtype), head_weight.to(dtype)
    with torch.autocast(device, enabled=False):
        logits = F.linear(hidden, head_weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
