"""Token loss as a sum, computed in chunks so that the logits of a whole batch never exist.

At a vocabulary of 128 256, the fp32 logits of 8 192 tokens take 4.2 GB and their gradient as much again.
A chunk of tokens at a time takes a chunk's share of that.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
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
    input. Under autocast the matmul runs in the low precision; softmax and sum are always fp32 or better.

    Tokens are taken `chunk_size` at a time and the logits of a chunk are computed again in backward
    (activation checkpointing, arXiv 1604.06174), so the largest tensor is (chunk_size, vocabulary).
    That costs one more head matmul, except where one chunk holds everything.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; expected at least 1 token a chunk; raise it")
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
