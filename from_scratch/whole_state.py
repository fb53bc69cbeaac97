"""What a rank holds, and how it is part of the whole: for checkpoints that any strategy can go on from.

A rank holds parameters of a shard, slice or stage, and optimizer state of the same shape. Each is described by one
`HeldTensor`: the names that its numbers have in the plain model. To save, every tensor is put together again, on the
CPU of every rank; to load, each rank takes its part. That needs the memory of the whole model on each host: right for
reading and for small models. Frameworks write shards instead, and reshard when they load.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import tensor_parallel
import torch
import torch.distributed as dist
from fully_sharded import FlatShard
from mesh import Mesh
from sharded_optimizer import Zero1Optimizer, all_gather, piece_of
from torch import Tensor, nn
from torch.distributed import ProcessGroup


@dataclass
class HeldTensor:
    """One tensor that this rank's optimizer steps, and the parameters of the plain model that lie in it, end to end."""

    tensor: nn.Parameter
    names: list[str]
    shapes: list[torch.Size]
    """As tensor parallelism left them: slices."""
    pieces_of: ProcessGroup | None = None
    """The ranks that have the other flat pieces; None: all of it is here."""
    whole: nn.Parameter | None = None
    """ZeRO's parameter, of which `tensor` is a piece: what the model computes with."""


def plain_name(name: str, tied: bool) -> str:
    """The name in the plain model: without a pipeline stage's number, and a tied head is the embedding."""
    name = name.partition(".")[2] if name[0].isdigit() else name
    return "embedding.weight" if tied and name == "head.weight" else name


def held_parameters(module: nn.Module, tied: bool) -> list[HeldTensor]:
    """Parameters as they are: data, tensor, pipeline and context parallelism."""
    return [HeldTensor(p, [plain_name(name, tied)], [p.shape]) for name, p in module.named_parameters()]


def held_pieces(module: nn.Module, tied: bool, optimizer: Zero1Optimizer) -> list[HeldTensor]:
    """ZeRO-1 and 2."""
    names = {p: plain_name(name, tied) for name, p in module.named_parameters()}
    pairs = zip(optimizer.whole, optimizer.shards, strict=True)
    return [HeldTensor(shard, [names[p]], [p.shape], optimizer.group, p) for p, shard in pairs]


def held_flat_shards(module: nn.Module) -> list[HeldTensor]:
    """FSDP: every unit's flat shards."""
    path = {inner: name for name, inner in module.named_modules()}

    def names(flat: FlatShard) -> list[str]:
        return [f"{path[places[0][0]]}.{places[0][1]}".lstrip(".") for places in flat.places]

    flats = [flat for unit in module.fully_sharded_unit.order.units for flat in unit.flats]
    return [HeldTensor(flat.shard, names(flat), flat.shapes, flat.group) for flat in flats]


class WholeTraining:
    """Model and optimizer as `common.checkpoint` wants them (its `WholeState`): whole, under the plain model's names.

    Args:
        module: what this rank has of the model.
        held: what is in it, with all parameters that train.
        optimizer: torch's, over the held tensors (of ZeRO the inner one).
    """

    def __init__(self, module: nn.Module, held: list[HeldTensor], optimizer: torch.optim.Optimizer, mesh: Mesh) -> None:
        self.module, self.held, self.optimizer, self.mesh = module, held, optimizer, mesh

    def copies(self, held: HeldTensor) -> int:
        """How many ranks of the world hold the same numbers: replicas, tensor ranks for a norm, 2 for a tied weight."""
        replicas = 1 if held.pieces_of else self.mesh.groups["dp_cp"].size()
        sizes, is_slice = self.mesh.sizes, tensor_parallel.sharded_dimension(held.names[0]) is not None
        on_stages = sum(held.names[0] in names for names in self.names_of_stages()) if sizes["pp"] > 1 else 1
        return replicas * (1 if is_slice else sizes["tp"]) * on_stages

    def names_of_stages(self) -> list[set[str]]:
        """The parameters of each pipeline rank; asked for once."""
        if not hasattr(self, "_names_of_stages"):
            own_names, group = {name for held in self.held for name in held.names}, self.mesh.groups["pp"]
            self._names_of_stages: list[Any] = [None] * group.size()
            dist.all_gather_object(self._names_of_stages, own_names, group=group)
        return self._names_of_stages

    @torch.no_grad()
    def whole_state(self) -> dict[str, Any]:
        """All ranks must call it, and all get everything."""
        self._make_optimizer_state()
        model: dict[str, Tensor] = {}
        state: dict[str, dict[str, Any]] = {}
        for held in self.held:
            model |= self._join(held, held.tensor)
            entries = self.optimizer.state[held.tensor]
            joined = {key: self._join(held, entry) for key, entry in entries.items()}
            for name in held.names:
                state[name] = {key: joined[key][name] for key in entries}
        if self.mesh.sizes["pp"] > 1:
            stages: list[Any] = [None] * self.mesh.sizes["pp"]
            dist.all_gather_object(stages, (model, state), group=self.mesh.groups["pp"])
            for of_model, of_state in stages:
                model, state = model | of_model, state | of_state
        vectors = {name for name, tensor in model.items() if tensor.dim() < 2}
        groups = []  # as `build_optimizer` makes them: matrices, vectors
        for number, group in enumerate(self.optimizer.param_groups):
            names = sorted(name for name in model if (name in vectors) == number)
            groups.append({key: value for key, value in group.items() if key != "params"} | {"params": names})
        return {"model": model, "optimizer": {"state": state, "param_groups": groups}}

    @torch.no_grad()
    def load_whole_state(self, state: dict[str, Any]) -> None:
        """Take this rank's parts of such a state, which may come from any strategy and number of ranks."""
        self._make_optimizer_state()
        of_parameters = state["optimizer"]["state"]
        for held in self.held:
            held.tensor.copy_(self._part(held, state["model"]))
            if held.whole is not None:
                held.whole.copy_(self._slices(held, state["model"])[0])
            for key, entry in self.optimizer.state[held.tensor].items():
                saved = {name: of_parameters[name][key] for name in held.names}
                entry.copy_(self._part(held, saved) if entry.shape == held.tensor.shape else saved[held.names[0]])

    def _join(self, held: HeldTensor, tensor: Any) -> dict[str, Any]:
        """From what is like `held.tensor`, the whole of each parameter in it; of AdamW's step counter, copies."""
        if tensor.shape != held.tensor.shape:
            return {name: tensor.cpu().clone() for name in held.names}
        flat = tensor.detach().flatten()
        if held.pieces_of:
            pieces = flat.new_empty(held.pieces_of.size() * flat.numel())
            all_gather(pieces, flat, group=held.pieces_of)
            flat = pieces
        sizes = [shape.numel() for shape in held.shapes]
        slices = flat[: sum(sizes)].split(sizes)
        slices = (part.view(shape) for part, shape in zip(slices, held.shapes, strict=True))
        return dict(zip(held.names, self._uncut(held, slices), strict=True))

    def _uncut(self, held: HeldTensor, slices: Iterable[Tensor]) -> Iterator[Tensor]:
        for name, part in zip(held.names, slices, strict=True):
            dim = tensor_parallel.sharded_dimension(name)
            if self.mesh.sizes["tp"] > 1 and dim is not None:
                part = tensor_parallel.all_gather(part, dim, self.mesh.groups["tp"])
            yield part.cpu().clone()  # not a view: it would keep the flat tensor with it

    def _slices(self, held: HeldTensor, whole: dict[str, Tensor]) -> list[Tensor]:
        """This rank's slices of the parameters in `held`, for tensor parallelism."""
        named = [(whole[name], tensor_parallel.sharded_dimension(name)) for name in held.names]
        tp = self.mesh.groups["tp"]
        return [tensor if dim is None else tensor_parallel.cut(tensor, dim, tp) for tensor, dim in named]

    def _part(self, held: HeldTensor, whole: dict[str, Tensor]) -> Tensor:
        flat = torch.cat([part.flatten() for part in self._slices(held, whole)])
        return (piece_of(flat, held.pieces_of) if held.pieces_of else flat).view_as(held.tensor)

    def _make_optimizer_state(self) -> None:
        """A fresh optimizer has none: one step at a learning rate of 0 makes it, and changes nothing else."""
        if any(held.tensor in self.optimizer.state for held in self.held):
            return
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for held in self.held:
            held.tensor.grad = torch.zeros_like(held.tensor)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.optimizer.step()
        self.optimizer.zero_grad()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
