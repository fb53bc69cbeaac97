"""ZeRO-1 and ZeRO-2: n ranks that all keep the same optimizer state keep it n times; here each keeps 1/n of it.

Stages 1 and 2 of ZeRO (https://arxiv.org/abs/1910.02054). Every parameter is cut, flat, into n pieces of equal size
(the last ones padded with zeros); a rank's optimizer knows only its piece of each.

    ZeRO-1      gradients averaged over the ranks, whole on each; step on the own pieces; all-gather the parameters
    ZeRO-2      each gradient reduce-scattered when it is ready, then freed: a rank keeps its piece of the mean; the
                rest as before

For N parameters of 4 bytes AdamW's state is 8 N / n bytes a rank instead of 8 N, and ZeRO-2's gradients 4 N / n instead
of 4 N. Bytes sent: all-reduce = reduce-scatter + all-gather, so ZeRO-2 sends as much as DDP, and ZeRO-1 on top of an
all-reduce half as much again. But ZeRO-2 reduces every micro-batch: waiting for the last would mean to keep gradients
whole.

    model = BucketedDataParallel(module)                           # ZeRO-1; for ZeRO-2 the bare module
    optimizer = Zero1Optimizer(module.parameters(), torch.optim.AdamW, lr=1e-3)
    for micro_batch ...: loss.backward(); model.finish()           # ZeRO-2: optimizer.finish()
    norm = optimizer.clip_grad_norm_(1.0)
    optimizer.step()
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from grad_norm import clip_grad_norm
from torch import Tensor, nn
from torch.distributed import ProcessGroup

# Renamed in torch 2.13; the old names, the only ones before that, are meant to go.
_new = hasattr(dist, "reduce_scatter_single")
all_gather = dist.all_gather_single if _new else dist.all_gather_into_tensor
reduce_scatter = dist.reduce_scatter_single if _new else dist.reduce_scatter_tensor

# They look at a parameter's shape or at all parameters at once, and a piece of one is not the same to them.
_NOT_ELEMENTWISE = ("Adafactor", "LBFGS", "Muon", "SparseAdam")


def piece_of(whole: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's piece of a tensor: (ceil(numel / n),), zeros where it reaches beyond the end."""
    size = -(-whole.numel() // group.size())
    start = group.rank() * size
    mine = whole.detach().flatten()[start : start + size]
    return F.pad(mine, (0, size - mine.numel()))


def clip_sharded_grad_norm_(shards: Iterable[nn.Parameter], max_norm: float, group: ProcessGroup) -> Tensor:
    """Scale the gradients of pieces to a global norm of at most max_norm; returns the norm before."""
    return clip_grad_norm(((shard.grad, 1) for shard in shards if shard.grad is not None), max_norm, group)


class Zero1Optimizer:
    """ZeRO-1 around any torch optimizer that treats every element alike (Adam and SGD with their families).

    Args:
        parameters: parameters or parameter groups, equal in shape on all ranks; values come from the group's first
            (buffers, which an optimizer does not see, do not). Frozen ones are left out.
        optimizer_class, defaults: such as torch.optim.AdamW and lr=1e-3.
        group: the ranks that share the work, by default all.

    Raises:
        ValueError: an optimizer that is not element-wise, or a parameter without dimensions.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        optimizer_class: type[torch.optim.Optimizer],
        group: ProcessGroup | None = None,
        **defaults: Any,
    ) -> None:
        if optimizer_class.__name__ in _NOT_ELEMENTWISE:
            found = f"{optimizer_class.__name__} needs whole parameters, and here it would see pieces"
            raise ValueError(f"{found}; expected an element-wise optimizer; use AdamW, SGD or the like")
        self.group = group or dist.group.WORLD
        given: list[Any] = list(parameters)
        groups = given if isinstance(given[0], dict) else [{"params": given}]
        groups = [{**g, "params": list(g["params"])} for g in groups]
        for parameter in (p for g in groups for p in g["params"]):  # frozen ones too: all ranks compute with them
            if parameter.dim() == 0:
                raise ValueError("a parameter of shape (); expected at least one dimension; give it the shape (1,)")
            dist.broadcast(parameter.detach(), group=self.group, group_src=0)
        groups = [{**g, "params": [p for p in g["params"] if p.requires_grad]} for g in groups]
        self.whole: list[nn.Parameter] = [p for g in groups for p in g["params"]]
        self.shards = [nn.Parameter(piece_of(p, self.group).clone()) for p in self.whole]
        shard_of = dict(zip(self.whole, self.shards, strict=True))
        shard_groups = [{**g, "params": [shard_of[p] for p in g["params"]]} for g in groups]
        self.inner = optimizer_class(shard_groups, **defaults)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Where learning rates are set. (Loading a state puts another list there.)"""
        return self.inner.param_groups

    def take_gradients(self) -> None:
        """Put this rank's pieces of the whole gradients into the shards' .grad, where `step` finds them."""
        for parameter, shard in zip(self.whole, self.shards, strict=True):
            if shard.grad is None and parameter.grad is not None:  # what is there already may have been clipped
                shard.grad = piece_of(parameter.grad, self.group).clone()

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale gradients to a global norm of at most max_norm; returns the norm before. All ranks must call it."""
        self.take_gradients()
        return clip_sharded_grad_norm_(self.shards, max_norm, self.group)

    @torch.no_grad()
    def step(self) -> None:
        """Step the own pieces, then all-gather the parameters: one message for each dtype. Uses the gradients up."""
        self.take_gradients()
        for parameter, shard in zip(self.whole, self.shards, strict=True):
            shard.copy_(piece_of(parameter, self.group))  # weights may have been loaded since
        self.inner.step()
        for shard in self.shards:
            shard.grad = None
        for dtype in dict.fromkeys(p.dtype for p in self.whole):
            pairs = [(p, s) for p, s in zip(self.whole, self.shards, strict=True) if p.dtype == dtype]
            mine = torch.cat([shard.detach() for _, shard in pairs])
            pieces = mine.new_empty(self.group.size(), mine.numel())  # row r: what rank r has of every parameter
            all_gather(pieces.view(-1), mine, group=self.group)
            columns = pieces.split([shard.numel() for _, shard in pairs], dim=1)
            for (parameter, _), column in zip(pairs, columns, strict=True):
                parameter.copy_(column.flatten()[: parameter.numel()].view_as(parameter))

    def zero_grad(self) -> None:
        for parameter in (*self.whole, *self.shards):
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """What the optimizer would hold over whole parameters, on every rank: it loads into a plain one, and back into
        this one at any number of ranks. All ranks must call it."""
        packed = self.inner.state_dict()
        state = {}
        for number, entries in packed["state"].items():
            whole, shard = self.whole[number], self.shards[number]
            state[number] = {k: self._whole(v, whole) if _same(v, shard) else v for k, v in entries.items()}
        return {"state": state, "param_groups": packed["param_groups"]}

    def load_state_dict(self, packed: dict[str, Any]) -> None:
        """Take the own pieces of a whole state, such as `state_dict` returns."""
        state = {}
        for number, entries in packed["state"].items():
            whole = self.whole[number]
            state[number] = {k: piece_of(v, self.group) if _same(v, whole) else v for k, v in entries.items()}
        self.inner.load_state_dict({"state": state, "param_groups": packed["param_groups"]})

    def _whole(self, piece: Tensor, parameter: nn.Parameter) -> Tensor:
        pieces = piece.new_empty(self.group.size() * piece.numel())
        all_gather(pieces, piece.contiguous(), group=self.group)
        return pieces[: parameter.numel()].view_as(parameter).clone()


def _same(value: Any, parameter: Tensor) -> bool:
    """Whether a state is one number for each element; a step counter is not."""
    return isinstance(value, Tensor) and value.shape == parameter.shape


class Zero2Optimizer(Zero1Optimizer):
    """ZeRO-2: whole gradients live only until they are sent, during backward. Call `finish` after every backward.

    As in data_parallel.py, what a rank did not use is sent as zeros, and all ranks send in the same order. One message
    is under way at a time: the next gradient is computed meanwhile, and memory stays small.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.collectives = 0  # reduce-scatters so far
        self.order = list(reversed(list(zip(self.whole, self.shards, strict=True))))
        self.sent = 0
        self.under_way: tuple[dist.Work, Tensor, nn.Parameter] | None = None
        me = weakref.ref(self)  # a parameter's hooks are where no garbage collector looks: self would stay forever
        for parameter in self.whole:
            parameter.register_post_accumulate_grad_hook(lambda ready: me()._on_gradient(ready))

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        if any(parameter is p for p, _ in self.order[: self.sent]):
            raise RuntimeError("a second backward before finish(); call finish() after every backward")
        while self.sent < len(self.order) and self.order[self.sent][0].grad is not None:
            self._send(*self.order[self.sent])

    def _send(self, parameter: nn.Parameter, shard: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        padding = shard.numel() * self.group.size() - gradient.numel()
        gradient = F.pad(gradient.flatten().div_(self.group.size()), (0, padding))
        mine = torch.empty_like(shard)
        self._settle()
        self.under_way = reduce_scatter(mine, gradient, group=self.group, async_op=True), mine, shard
        self.collectives += 1
        self.sent += 1

    def _settle(self) -> None:
        """Wait for the message under way, and add it to the piece's gradient."""
        if self.under_way:
            work, mine, shard = self.under_way
            work.wait()
            shard.grad = mine if shard.grad is None else shard.grad.add_(mine)
            self.under_way = None

    def finish(self) -> None:
        """After every backward: returns when all gradients are averaged, and only pieces of them are left."""
        for parameter, shard in self.order[self.sent :]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._send(parameter, shard)
        self._settle()
        self.sent = 0
