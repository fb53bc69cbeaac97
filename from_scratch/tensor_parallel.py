"""Tensor parallelism: every large weight is cut among the ranks, and each rank computes with its piece of each layer.

Megatron-LM's scheme (https://arxiv.org/abs/1909.08053): the first linear layer of a pair is cut so that each rank
has some of its outputs (column-parallel), the second so that each has some of its inputs (row-parallel). What lies
between, heads or neurons, then belongs to one rank, and a pair costs one all-reduce forward (*g*) and one backward
(*f*). With sequence parallelism (https://arxiv.org/abs/2205.05198) the norms and the residual stream between the
pairs are cut along the sequence: all-gather and reduce-scatter take the place of each all-reduce. They move the same
bytes, but a rank keeps 1/n of those activations.

    model = parallelize(Transformer(config, seed).double(), group)        # the same seed on all ranks
    model(tokens, targets).backward()                                     # the same tokens on all ranks
    norm = clip_grad_norm(model, 1.0, group)
"""

from collections.abc import Callable

import grad_norm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from common.transformer import ModelConfig, Transformer

# Renamed in torch 2.13; the old name, the only one before that, is meant to go.
_reduce_scatter = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor

# ---------------------------------------------------------------- communication: new tensors, nothing in place


def all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of all ranks' x, on all ranks."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def all_gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """All ranks' x in the order of ranks, joined along dim."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim)


def reduce_scatter(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """This rank's part, along dim, of the sum of all ranks' x."""
    parts = _parts(x, dim, group)
    mine = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
    _reduce_scatter(mine, torch.cat(parts), group=group)  # the collective cuts along the first dimension
    return mine


def cut(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """This rank's part of x along dim, a copy: a view would keep the whole alive. Nothing is sent."""
    return _parts(x, dim, group)[group.rank()].clone(memory_format=torch.contiguous_format)


def _parts(x: Tensor, dim: int, group: ProcessGroup) -> tuple[Tensor, ...]:
    if x.shape[dim] % group.size():
        raise ValueError(f"dimension {dim} of {tuple(x.shape)} does not divide among {group.size()} ranks; change it")
    return x.chunk(group.size(), dim)


# ---------------------------------------------------------------- the same with their conjugates in backward
# A tensor that all ranks hold equal is one tensor, and its gradient is the sum of what each rank's use of it gives.
# A tensor that is cut has a gradient that is cut the same way. All that follows is these two sentences.


class _Conjugate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward_function = backward
        return forward(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.backward_function(gradient), None, None


def copy_to_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """*f*: identity forward, all-reduce backward: each rank uses x for its piece, and the gradients add up."""
    return _Conjugate.apply(x, lambda t: t.view_as(t), lambda g: all_reduce(g, group))


def reduce_from_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """*g*: all-reduce forward, identity backward. The sum's gradient is already whole on every rank: an all-reduce
    here too would make gradients n times too large, under an unchanged first loss."""
    return _Conjugate.apply(x, lambda t: all_reduce(t, group), lambda g: g)


def gather_from_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """Join the last dimension; backward keeps the own part, because all ranks go on alike with the whole."""
    return _Conjugate.apply(x, lambda t: all_gather(t, -1, group), lambda g: cut(g, -1, group))


def scatter_to_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """Keep the own part of the last dimension; backward joins the parts' gradients."""
    return _Conjugate.apply(x, lambda t: cut(t, -1, group), lambda g: all_gather(g, -1, group))


def gather_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """*g* of sequence parallelism: all-gather forward, reduce-scatter backward; x (batch, sequence / n, …)."""
    return _Conjugate.apply(x, lambda t: all_gather(t, 1, group), lambda g: reduce_scatter(g, 1, group))


def scatter_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """*ḡ* of sequence parallelism: reduce-scatter forward, all-gather backward; x (batch, sequence, …)."""
    return _Conjugate.apply(x, lambda t: reduce_scatter(t, 1, group), lambda g: all_gather(g, 1, group))


# ---------------------------------------------------------------- layers
# Each is made from the whole weight and keeps its slice. If ranks drew their slices, the slice's shape would set the
# scale, and another number of ranks would start from another model.


class ColumnParallelLinear(nn.Module):
    """x (…, in) → this rank's outputs (…, out / n). torch stores weights as (out, in): the slice is one of rows.

    enter: what brings x here, `copy_to_ranks` or `gather_sequence`; None where it was brought in for several layers.
    """

    def __init__(self, weight: Tensor, group: ProcessGroup, enter: Callable | None = copy_to_ranks) -> None:
        super().__init__()
        self.weight, self.group, self.enter = nn.Parameter(cut(weight.detach(), 0, group)), group, enter

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x if self.enter is None else self.enter(x, self.group), self.weight)


class RowParallelLinear(nn.Module):
    """This rank's inputs (…, in / n) → the whole sum (…, out), or with `scatter_sequence` its part of the sequence."""

    def __init__(self, weight: Tensor, group: ProcessGroup, leave: Callable = reduce_from_ranks) -> None:
        super().__init__()
        self.weight, self.group, self.leave = nn.Parameter(cut(weight.detach(), 1, group)), group, leave

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(F.linear(x, self.weight), self.group)


class ParallelEmbedding(nn.Module):
    """(batch, sequence) → (batch, sequence, width): each rank looks up its part of the vocabulary, zeros for the rest;
    the sum over the ranks is the embedding."""

    def __init__(self, weight: Tensor, group: ProcessGroup, leave: Callable = reduce_from_ranks) -> None:
        super().__init__()
        self.weight, self.group, self.leave = nn.Parameter(cut(weight.detach(), 0, group)), group, leave

    def forward(self, tokens: Tensor) -> Tensor:
        row, is_mine = _own_rows(tokens, self.weight.shape[0], self.group)
        return self.leave(F.embedding(row, self.weight) * is_mine.unsqueeze(-1), self.group)


class ParallelHead(nn.Module):
    """The sum of token losses from logits that stay cut along the vocabulary; without targets, the whole logits."""

    def __init__(self, weight: Tensor | None, group: ProcessGroup, enter: Callable = copy_to_ranks) -> None:
        super().__init__()
        self.weight = None if weight is None else nn.Parameter(cut(weight.detach(), 0, group))  # None: tied
        self.group, self.enter = group, enter

    def forward(self, hidden: Tensor, targets: Tensor | None, tied_weight: Tensor | None) -> Tensor:
        weight = self.weight if tied_weight is None else tied_weight
        logits = F.linear(self.enter(hidden, self.group), weight)
        if targets is None:
            return gather_from_ranks(logits, self.group)
        return vocabulary_parallel_cross_entropy(logits, targets, self.group)


def vocabulary_parallel_cross_entropy(logits: Tensor, targets: Tensor, group: ProcessGroup) -> Tensor:
    """Sum of the token losses, as `common.loss` gives it (-100 is ignored), without gathering the logits.

    logits: (batch, sequence, vocabulary / n), targets: (batch, sequence). Three all-reduces of one number a token: the
    maximum (against overflow; it needs no gradient), the sum of exponentials, and the target's logit, which one has.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = logits.detach().amax(-1)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    shifted = logits - largest.unsqueeze(-1)
    total = reduce_from_ranks(shifted.exp().sum(-1), group)
    column, is_mine = _own_rows(targets, logits.shape[-1], group)
    of_target = reduce_from_ranks(shifted.gather(-1, column.unsqueeze(-1)).squeeze(-1) * is_mine, group)
    return ((total.log() - of_target) * (targets != -100)).sum()


def _own_rows(tokens: Tensor, rows: int, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Where each token stands in this rank's part of the vocabulary (0 if it does not), and whether it does."""
    row = tokens - group.rank() * rows
    is_mine = (row >= 0) & (row < rows)
    return row * is_mine, is_mine


# ---------------------------------------------------------------- the whole model
CUT_ALONG = {"query": 0, "key": 0, "value": 0, "output": 1, "gate": 0, "up": 0, "down": 1, "embedding": 0, "head": 0}


def sharded_dimension(name: str) -> int | None:
    """Along which dimension the parameter is cut; None: all ranks hold the whole (norms)."""
    return CUT_ALONG.get(name.split(".")[-2])


def parallelize(model: Transformer, group: ProcessGroup, sequence_parallel: bool = False) -> Transformer:
    """Turn the model, equal on all ranks, into its tensor-parallel form: in place, names of parameters unchanged.

    Call it when the model is on its device and in its dtype. Attention needs no change: it counts its heads from the
    weights, and contiguous slices keep query heads with their key-value head. Raises ValueError where key-value heads,
    neurons or vocabulary do not divide by the ranks, or the model has experts.
    """
    _check(model.config, group.size())
    enter, leave = (gather_sequence, scatter_sequence) if sequence_parallel else (copy_to_ranks, reduce_from_ranks)
    if model.embedding is not None:
        model.embedding = ParallelEmbedding(model.embedding.weight, group, leave)
    for block in model.blocks.values():
        attention, ffn = (block.attention, ("query", "key", "value"), "output"), (block.ffn, ("gate", "up"), "down")
        for layer, columns, row in (attention, ffn):
            for name in columns:
                setattr(layer, name, ColumnParallelLinear(getattr(layer, name).weight, group, None))
            setattr(layer, row, RowParallelLinear(getattr(layer, row).weight, group, leave))
            # *f* once for the projections that share an input: three would send three times as much.
            layer.register_forward_pre_hook(lambda _, inputs: (enter(inputs[0], group), *inputs[1:]))
    if model.head is not None:
        model.head = ParallelHead(model.head.weight, group, enter)
    if sequence_parallel:  # a norm saw a part of the sequence: its gradient is a part of the sum
        for name, parameter in model.named_parameters():
            if sharded_dimension(name) is None:
                parameter.register_hook(lambda gradient: all_reduce(gradient, group))
    return model


def _check(config: ModelConfig, ranks: int) -> None:
    if config.experts:
        raise ValueError(f"model.experts is {config.experts}; this tensor parallelism is for dense layers; set it to 0")
    for field in ("kv_heads", "ffn_width", "vocabulary"):
        if getattr(config, field) % ranks:
            found = f"model.{field} is {getattr(config, field)}, which does not divide among {ranks} tensor ranks"
            raise ValueError(f"{found}; expected a multiple of {ranks}; change it or the number of ranks")


def clip_grad_norm(model: nn.Module, max_norm: float, group: ProcessGroup) -> Tensor:
    """Scale gradients to a global norm of at most max_norm; returns the norm before. Norms' weights count once."""
    named = [(name, parameter.grad) for name, parameter in model.named_parameters()]
    held_by = ((gradient, group.size() if sharded_dimension(name) is None else 1) for name, gradient in named)
    return grad_norm.clip_grad_norm(held_by, max_norm, group)
