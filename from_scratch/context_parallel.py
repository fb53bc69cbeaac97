"""Context parallelism: every rank holds a part of each sequence; keys and values travel around a ring.

Ring attention (https://arxiv.org/abs/2310.01889): queries stay; in n steps the keys and values of all ranks pass by,
and are sent on while the rank computes with them. Softmax is not a sum, but parts of it can be merged exactly when
each part keeps the logarithm of its sum of exponentials. Nobody ever holds the whole sequence.

Causal attention makes the plain split unfair: the first rank's queries see 1/n of the keys, the last one's all. The
balanced (zig-zag) split gives rank r the pieces r and 2n - 1 - r of 2n: equal work, in every step of the ring.

    model = parallelize_context(Transformer(config, seed), group)
    mine = positions(tokens.shape[1], group)                     # of this rank in the sequence
    model(tokens[:, mine], targets[:, mine]).backward()          # this rank's part of the loss sum
    sum_gradients(model, group)                                  # as in data parallelism
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from common.transformer import Transformer


def positions(sequence: int, group: ProcessGroup, balanced: bool = True) -> Tensor:
    """The positions, rising, that this rank holds of a sequence: (sequence / n,). ValueError: it does not divide."""
    rank, count = group.rank(), group.size() * (2 if balanced else 1)
    if sequence % count:
        raise ValueError(f"a sequence of {sequence} tokens does not divide into {count} pieces; choose a multiple")
    pieces = torch.arange(sequence).chunk(count)
    return torch.cat((pieces[rank], pieces[count - 1 - rank])) if balanced else pieces[rank]


def send_around(x: Tensor, group: ProcessGroup) -> Callable[[], Tensor]:
    """Start sending x to the next rank; the result is a function that waits for the previous one's x."""
    if group.size() == 1:
        return lambda: x
    received = torch.empty_like(x)
    sending = dist.P2POp(dist.isend, x, group=group, group_peer=(group.rank() + 1) % group.size())
    receiving = dist.P2POp(dist.irecv, received, group=group, group_peer=(group.rank() - 1) % group.size())
    requests = dist.batch_isend_irecv([receiving, sending])  # in this order: see collectives/ring_all_reduce.py

    def arrived() -> Tensor:
        for request in requests:
            request.wait()
        return received

    return arrived


def visible_pieces(length: int, mine: int, owner: int, ranks: int, balanced: bool) -> list[tuple[slice, slice, bool]]:
    """Which of rank `mine`'s queries see which of `owner`'s keys: (queries, keys, is_diagonal), by contiguous pieces.

    length: tokens a rank. Pieces that see nothing are left out, not masked: that is where the balance comes from.
    """
    places, size = (2, length // 2) if balanced else (1, length)
    number = {rank: (rank, 2 * ranks - 1 - rank)[:places] for rank in (mine, owner)}
    pieces = [slice(place * size, (place + 1) * size) for place in range(places)]
    pairs = [(q, k) for q in range(places) for k in range(places) if number[owner][k] <= number[mine][q]]
    return [(pieces[q], pieces[k], number[mine][q] == number[owner][k]) for q, k in pairs]


def _scores(query: Tensor, key: Tensor, is_diagonal: bool) -> Tensor:
    """(batch, kv_heads, groups, queries, keys); -inf where a key lies after the query."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    later = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -math.inf) if is_diagonal else scores


class _RingAttention(torch.autograd.Function):
    # Queries: (batch, kv_heads, groups, …), keys and values: (batch, kv_heads, 1, …); all sums at least fp32.
    @staticmethod
    def forward(ctx, query, key, value, group, balanced):
        rank, ranks, length = group.rank(), group.size(), query.shape[2]
        travelling = torch.stack((key, value)).unsqueeze(3)
        wide = torch.promote_types(query.dtype, torch.float32)
        queries = query.unflatten(1, (key.shape[1], -1)).to(wide)
        output, log_sum = torch.zeros_like(queries), torch.full_like(queries[..., 0], -math.inf)
        for step in range(ranks):
            arrived = send_around(travelling, group) if step < ranks - 1 else None  # while we compute
            keys, values = travelling.to(wide)
            for q, k, is_diagonal in visible_pieces(length, rank, (rank - step) % ranks, ranks, balanced):
                scores = _scores(queries[..., q, :], keys[..., k, :], is_diagonal)
                new_log_sum = torch.logaddexp(log_sum[..., q], scores.logsumexp(-1))
                # What was summed so far was divided by a smaller sum: rescale it, then add the new part.
                output[..., q, :] *= (log_sum[..., q] - new_log_sum).exp().unsqueeze(-1)
                output[..., q, :] += (scores - new_log_sum.unsqueeze(-1)).exp() @ values[..., k, :]
                log_sum[..., q] = new_log_sum
            travelling = arrived() if arrived else travelling
        ctx.save_for_backward(query, key, value, output, log_sum)
        ctx.group, ctx.balanced = group, balanced
        return output.flatten(1, 2).to(query.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        query, key, value, output, log_sum = ctx.saved_tensors
        group, rank, ranks, length = ctx.group, ctx.group.rank(), ctx.group.size(), query.shape[2]
        queries, grad_output = (
            query.view_as(output).to(output.dtype),
            grad_output.reshape(output.shape).to(output.dtype),
        )
        # Softmax's backward subtracts sum(weights * d weights), which is sum(output * d output): known here, whole.
        correction, scale = (grad_output * output).sum(-1, keepdim=True), math.sqrt(query.shape[-1])
        travelling, grad_query = torch.stack((key, value)).unsqueeze(3), torch.zeros_like(queries)
        grads = torch.zeros_like(travelling, dtype=output.dtype)  # they travel with the keys and values they belong to
        for step in range(ranks):
            arrived = send_around(travelling, group) if step < ranks - 1 else None
            keys, values = travelling.to(output.dtype)
            for q, k, is_diagonal in visible_pieces(length, rank, (rank - step) % ranks, ranks, ctx.balanced):
                weights = (_scores(queries[..., q, :], keys[..., k, :], is_diagonal) - log_sum[..., q, None]).exp()
                grad_weights = grad_output[..., q, :] @ values[..., k, :].transpose(-1, -2)
                grad_scores = weights * (grad_weights - correction[..., q, :]) / scale
                grad_query[..., q, :] += grad_scores @ keys[..., k, :]
                grads[0][..., k, :] += (grad_scores.transpose(-1, -2) @ queries[..., q, :]).sum(2, keepdim=True)
                grads[1][..., k, :] += (weights.transpose(-1, -2) @ grad_output[..., q, :]).sum(2, keepdim=True)
            grads = send_around(grads, group)()  # n times: the last one brings each rank its own
            travelling = arrived() if arrived else travelling
        return grad_query.flatten(1, 2).to(query.dtype), *grads.squeeze(3).to(key.dtype), None, None


def ring_attention(group: ProcessGroup, balanced: bool = True) -> Callable[..., Tensor]:
    """A causal attention for `Attention.attend`: (batch, heads, sequence / n, head_size) in and out, on every rank."""

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            raise ValueError("ring attention is causal and takes no mask; expected mask=None; train without a KV cache")
        return _RingAttention.apply(query, key, value, group, balanced)

    return attend


def parallelize_context(model: Transformer, group: ProcessGroup, balanced: bool = True) -> Transformer:
    """Let the model, in place, take this rank's part of each sequence: ring attention, and the right positions."""

    def with_positions(_, inputs: tuple, named: dict) -> tuple[tuple, dict]:
        here = positions(inputs[0].shape[1] * group.size(), group, balanced).to(inputs[0].device)
        return inputs, {"positions": here} | named  # by default they would count from 0 on every rank

    for block in model.blocks.values():
        block.attention.attend = ring_attention(group, balanced)
    model.register_forward_pre_hook(with_positions, with_kwargs=True)
    return model


def sum_gradients(model: nn.Module, group: ProcessGroup) -> None:
    """Add up the gradients over the group: each rank's are those of its own tokens' losses."""
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad, group=group)
