"""Fully sharded data parallelism: a rank keeps 1/n of every parameter, and has a layer whole only while it computes it.

ZeRO stage 3 (https://arxiv.org/abs/1910.02054) in the form of FSDP (https://arxiv.org/abs/2304.11277). A *unit*, mostly
a transformer block, is gathered and freed as one:

    forward     all-gather its parameters, and start to gather the next unit's; compute; free them
    backward    all-gather again, and start to gather those of the unit before; compute; free; reduce-scatter gradients

    for block in model.blocks.values():
        fully_shard(block)
    fully_shard(model)                        # last: embedding, norm and head; puts the units in order
    optimizer = torch.optim.AdamW(model.parameters())                  # of shards: elementwise optimizers only
    loss(model, micro_batch).backward(); finish(model)                 # after every backward
    clip_sharded_grad_norm_(model.parameters(), 1.0, group); optimizer.step()

Between steps a rank holds 1/n of parameters, gradients and optimizer state; in a step, besides, the root and two other
units whole. Gradients come out as the mean over the group. Every unit must be used by all ranks in each forward and
backward; a parameter that nobody uses, in a unit that is used, gets a gradient of zeros.
"""

from typing import Any

import torch
import torch.distributed as dist
from sharded_optimizer import all_gather, piece_of, reduce_scatter
from torch import Tensor, nn
from torch.distributed import ProcessGroup


class FlatShard:
    """The parameters of a unit that are of one kind, laid end to end; this rank keeps one of n equal pieces.

    One kind: dtype, frozen or trained, matrices or vectors. The last because optimizers spare vectors from weight decay
    by their number of dimensions: the shard of matrices has shape (1, size), that of vectors (size,).
    """

    def __init__(self, parameters: dict[nn.Parameter, list[tuple[nn.Module, str]]], unit: "Unit") -> None:
        self.unit, self.group = unit, unit.group
        first = next(iter(parameters))
        self.places, self.shapes = list(parameters.values()), [p.shape for p in parameters]
        flat = torch.cat([p.detach().flatten() for p in parameters])
        dist.broadcast(flat, group=self.group, group_src=0)  # whatever each rank's seed was
        mine = piece_of(flat, self.group).clone()  # a copy: a view would keep the whole alive
        self.shard = nn.Parameter(mine.view(1, -1) if first.dim() > 1 else mine, requires_grad=first.requires_grad)
        padding = mine.numel() * self.group.size() - flat.numel()
        self.sizes = [*(shape.numel() for shape in self.shapes), padding]
        # The whole keeps its identity; only its memory comes and goes. So what autograd saved for backward, views of
        # it, is valid again when it has been gathered again.
        self.whole = mine.new_empty(mine.numel() * self.group.size(), dtype=unit.compute_dtype or mine.dtype)
        self.work: dist.Work | None = None
        self.is_whole = True
        self.free()

    def start_gathering(self) -> None:
        if not self.is_whole:
            self.is_whole = True
            self.whole.untyped_storage().resize_(self.whole.numel() * self.whole.element_size())
            low = self.shard.detach().flatten().to(self.whole.dtype)  # cast before sending: half the bytes
            # .data: autograd must not take the refilling for a change of what it saved
            self.work = all_gather(self.whole.data, low, group=self.group, async_op=True)

    def gather(self) -> None:
        self.start_gathering()
        if self.work:
            self.work.wait()
            self.work = None

    def free(self) -> None:
        if self.is_whole:
            self.gather()  # one that was fetched in vain may be under way
            self.whole.untyped_storage().resize_(0)
            self.is_whole = False

    def parts(self, whole: Tensor) -> list[tuple[list[tuple[nn.Module, str]], Tensor]]:
        """The parameters in a flat tensor, each with the places (module, name) where it belongs."""
        tensors = (part.view(shape) for part, shape in zip(whole.split(self.sizes)[:-1], self.shapes, strict=True))
        return list(zip(self.places, tensors, strict=True))


class _Gathered(torch.autograd.Function):
    """Autograd's side of it: forward the whole for the shard, backward a reduce-scatter.

    Autograd sums all uses of the whole, tied ones too, before it calls backward: once a unit, when its last gradient is
    there.
    """

    @staticmethod
    def forward(ctx, shard: Tensor, flat: FlatShard) -> Tensor:
        ctx.flat = flat
        return flat.whole.data

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, None]:
        ctx.flat.free()
        ctx.flat.unit.order.reduce(ctx.flat, gradient)
        return None, None  # added to the shard's .grad when the message has arrived


class UnitOrder:
    """The units of a model in their order of use, which tells what to fetch ahead, and the message under way."""

    def __init__(self, units: list["Unit"]) -> None:
        self.units = units
        self.under_way: tuple[dist.Work, Tensor, FlatShard] | None = None

    def reduce(self, flat: FlatShard, gradient: Tensor) -> None:
        gradient = gradient.to(flat.unit.reduce_dtype or flat.shard.dtype) / flat.group.size()
        mine = gradient.new_empty(flat.shard.numel())
        self.settle()  # one at a time: the next unit computes meanwhile, and only two whole gradients exist
        self.under_way = reduce_scatter(mine, gradient, group=flat.group, async_op=True), mine, flat

    def settle(self) -> None:
        if self.under_way:
            work, mine, flat = self.under_way
            work.wait()
            mine, shard = mine.to(flat.shard.dtype).view_as(flat.shard), flat.shard
            shard.grad = mine if shard.grad is None else shard.grad.add_(mine)  # micro-batches add up in shards
            self.under_way = None


class Unit:
    """What `fully_shard` puts on a module: its flat shards, and the hooks that gather and free them."""

    def __init__(self, module: nn.Module, group: ProcessGroup, reshard: bool, compute, reduce) -> None:
        self.module, self.group, self.reshard_after_forward = module, group, reshard
        self.compute_dtype, self.reduce_dtype = compute, reduce
        self.in_backward = False
        self.order = UnitOrder([self])
        self.flats: list[FlatShard] = []
        kinds: dict[tuple, dict[nn.Parameter, list[tuple[nn.Module, str]]]] = {}
        for inner in module.modules():
            for name, parameter in list(inner._parameters.items()):
                if parameter is None or getattr(parameter, "is_shard", False):
                    continue
                if hasattr(parameter, "taken_by") and parameter.taken_by is not self:
                    raise ValueError(
                        f"parameter {name} of {type(inner).__name__} is tied to one that another unit has cut up; "
                        f"expected all its uses in one unit; call fully_shard on a module that holds them all"
                    )
                parameter.taken_by = self
                kind = (parameter.dtype, parameter.requires_grad, parameter.dim() > 1)
                kinds.setdefault(kind, {}).setdefault(parameter, []).append((inner, name))
        for number, parameters in enumerate(kinds.values()):
            self.flats.append(FlatShard(parameters, self))
            for places in parameters.values():
                for inner, name in places:
                    del inner._parameters[name]
            self.flats[-1].shard.is_shard = True
            module.register_parameter(f"flat_shard_{number}", self.flats[-1].shard)
        module.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        module.register_forward_hook(self._after_forward)

    def start_gathering(self) -> None:
        for flat in self.flats:
            flat.start_gathering()

    def free(self) -> None:
        for flat in self.flats:
            flat.free()

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        for flat in self.flats:
            flat.gather()
            for places, tensor in flat.parts(_Gathered.apply(flat.shard, flat)):
                for inner, name in places:
                    setattr(inner, name, tensor)  # where the nn.Parameter was
        for tensor in args:  # its gradient is complete when this unit's backward is done
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(self._free_frozen)
        later = self.order.units[self.order.units.index(self) + 1 :]
        if later and not self.in_backward:  # in backward this is activation checkpointing computing again
            later[0].start_gathering()
        if self.compute_dtype is None:
            return args, kwargs

        def cast(x: Any) -> Any:
            return x.to(self.compute_dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        return tuple(map(cast, args)), {key: cast(value) for key, value in kwargs.items()}

    def _after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        for flat in self.flats:
            for inner, name in (place for places in flat.places for place in places):
                inner.__dict__.pop(name, None)  # its memory goes: better no attribute than one that must not be read
        trains = torch.is_grad_enabled()
        if (self.reshard_after_forward or not trains) and not self.in_backward:
            self.free()
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if trains and isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(self._before_backward)  # the unit's backward begins with its output's gradient

    def _before_backward(self, gradient: Tensor) -> None:
        self.in_backward = True
        for flat in self.flats:
            flat.gather()
        # Backward takes the reverse order, but begins with the root, whose output is the model's; then comes units[-1].
        earlier = self.order.units[self.order.units.index(self) - 1]
        if not earlier.in_backward:  # else it has been gathered already, and perhaps freed in part
            earlier.start_gathering()

    def _free_frozen(self, gradient: Tensor) -> None:
        for flat in self.flats:  # the trained ones are freed when their gradient is sent
            if not flat.shard.requires_grad:
                flat.free()


def fully_shard(
    module: nn.Module,
    group: ProcessGroup | None = None,
    reshard_after_forward: bool = True,
    compute_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Turn a module into a unit, in place: the parameters in it that no unit has yet. Inner modules first.

    Args:
        module: on its device, in the dtype that shards and optimizer keep; values come from the group's first rank.
        group: the ranks to cut among, by default all.
        reshard_after_forward: free the unit between forward and backward. False saves an all-gather, and suits the
            root, whose backward begins at once.
        compute_dtype: in which parameters are gathered, and floating-point inputs cast; by default as they are kept.
        reduce_dtype: in which gradients are summed over the ranks; by default that of the shards.

    Raises:
        ValueError: a parameter is tied to one of another unit.
    """
    inner = [m.fully_sharded_unit for m in module.modules() if hasattr(m, "fully_sharded_unit")]
    for buffer in module.buffers():
        dist.broadcast(buffer, group=group or dist.group.WORLD, group_src=0)
    unit = Unit(module, group or dist.group.WORLD, reshard_after_forward, compute_dtype, reduce_dtype)
    module.fully_sharded_unit = unit
    unit.order.units += inner  # in the order of registration; where use differs, a fetch is useless, but never wrong
    for each in inner:
        each.order = unit.order
    return module


def finish(model: nn.Module) -> None:
    """After every backward: returns when all gradients have arrived, and frees what is still whole."""
    order = model.fully_sharded_unit.order
    order.settle()
    for unit in order.units:
        unit.in_backward = False
        unit.free()


def bytes_held(model: nn.Module) -> dict[str, int]:
    """Bytes on this rank now: of shards, of their gradients, and of what is gathered."""
    flats = [flat for unit in model.fully_sharded_unit.order.units for flat in unit.flats]
    return {
        "shards": sum(flat.shard.nbytes for flat in flats),
        "gradients": sum(flat.shard.grad.nbytes for flat in flats if flat.shard.grad is not None),
        "gathered": sum(flat.whole.untyped_storage().nbytes() for flat in flats),
    }


@torch.no_grad()
def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The whole parameters and buffers under the names they had, on every rank. All ranks must call it.

    In the precision of the shards, not of the computation; one unit at a time.
    """
    names, state = {module: name for name, module in model.named_modules()}, dict(model.named_buffers())
    for unit in model.fully_sharded_unit.order.units:
        for flat in unit.flats:
            whole = flat.shard.new_empty(flat.whole.numel())
            all_gather(whole, flat.shard.detach().flatten(), group=flat.group)
            for places, tensor in flat.parts(whole):
                value = tensor.clone()  # not a view: it would keep the unit's flat tensor with it
                state |= {f"{names[inner]}.{name}".lstrip("."): value for inner, name in places}
    return state


@torch.no_grad()
def load_full_state_dict(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Take this rank's pieces of a whole state dict: the other direction, at any number of ranks, without messages."""
    names = {module: name for name, module in model.named_modules()}
    for name, buffer in model.named_buffers():
        buffer.copy_(state[name])
    for unit in model.fully_sharded_unit.order.units:
        for flat in unit.flats:
            first_places = (places[0] for places in flat.places)
            wholes = [state[f"{names[inner]}.{name}".lstrip(".")].flatten() for inner, name in first_places]
            flat.shard.copy_(piece_of(torch.cat(wholes), flat.group).view_as(flat.shard))
