"""What a rank holds at named moments of a step, in bytes behind the tensors, and which collectives it enters."""

from collections import Counter
from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from common.transformer import Transformer

QUANTITIES = ("parameter shards", "whole parameters", "gradient shards", "whole gradients", "AdamW state")
IN_TRANSIT = "in transit"
# What torch.distributed calls underneath, and which of its arguments is the whole, flat end: an output, an input, none.
COLLECTIVES = {
    "c10d::_allgather_base_": ("all-gathers", 0),
    "c10d::_reduce_scatter_base_": ("reduce-scatters", 1),
    "c10d::allreduce_": ("all-reduces", None),
}

HeldBytes = dict[str, int]  # quantity -> bytes


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of memory behind the tensors; views of one storage count once, a freed storage has none."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Collectives(TorchDispatchMode):
    """Counts collectives, and knows how many bytes of their flat, whole ends are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.buffers: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if found := COLLECTIVES.get(function.name()):
            name, position = found
            self.counts[name] += 1
            if position is not None:
                storage = args[position].untyped_storage()
                self.buffers.append((StorageWeakRef(storage), storage.nbytes()))
        return function(*args, **(kwargs or {}))

    def bytes_in_transit(self) -> int:
        return sum(nbytes for storage, nbytes in self.buffers if not storage.expired())


class Meter:
    """Notes what this rank holds whenever it is told, or whenever a block of the model computes."""

    def __init__(self, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
        self.shards, self.optimizer = list(model.parameters()), optimizer
        self.collectives = Collectives()
        self.whole: set[torch.nn.Parameter] = set()  # as the units show them while they are gathered
        self.hooked: set[torch.nn.Parameter] = set()
        self.moments: dict[str, HeldBytes] = {}
        self.is_on = False
        numbers = list(model.blocks)
        self.watched = {model.blocks[n]: n for n in (numbers[0], numbers[-1])}
        # FSDP's own hooks gather before these are called: they see whole parameters.
        for unit in (model, *model.blocks.values()):
            unit.register_forward_pre_hook(self._unit_is_whole)

    def _unit_is_whole(self, unit: torch.nn.Module, _: object) -> None:
        self.whole |= {p for p in unit.parameters() if not isinstance(p, DTensor)}
        if unit in self.watched:
            name = self.watched[unit]
            self.note(f"forward, in block {name}")
            # Backward ends a block with its first norm: all of the block's gradients are there, and none is sent yet.
            if (last := unit.attention_norm.weight) not in self.hooked:
                self.hooked.add(last)
                last.register_post_accumulate_grad_hook(lambda _: self.note(f"backward, in block {name}"))

    def note(self, moment: str) -> None:
        if not self.is_on:
            return
        state = (value for entries in self.optimizer.state.values() for value in entries.values())
        self.moments[moment] = {
            "parameter shards": storage_bytes(local(p) for p in self.shards),
            "whole parameters": storage_bytes(self.whole),
            "gradient shards": storage_bytes(local(p.grad) for p in self.shards if p.grad is not None),
            "whole gradients": storage_bytes(p.grad for p in self.whole if p.grad is not None),
            "AdamW state": storage_bytes(local(value) for value in state if value.dim()),  # not the step counters
            IN_TRANSIT: self.collectives.bytes_in_transit(),
        }
