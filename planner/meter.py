"""The meter of a dry run: sees every operation, and so which memory there is, what it is for, and what is sent."""

import contextlib
import gc
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # makes collectives known to fake tensors
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAIT = torch.ops._c10d_functional.wait_tensor.default
# What a collective is called in torch, the name it has here, and which argument is its whole, flat end.
COLLECTIVES = {
    "c10d::_allgather_base_": ("all-gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::send": ("send", 0),
    "c10d::recv_": ("receive", 0),
    "_c10d_functional::all_gather_into_tensor": ("all-gather", "result"),
    "_c10d_functional::reduce_scatter_tensor": ("reduce-scatter", 0),
    "_c10d_functional::all_reduce": ("all-reduce", 0),
}
NO_DATA = "::barrier", "::monitored_barrier_", "::wait_tensor", "::wait_tensors"
PARAMETERS, GRADIENTS, STATE = "parameters", "gradients", "optimizer state"
WHOLE, WHOLE_GRADIENTS, BUFFERS = "whole parameters", "whole gradients", "buffers of collectives"
ACTIVATIONS, TEMPORARY, OTHER = "activations", "temporary", "other"


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Storage:
    """The memory behind one or more tensors: what it is for."""

    __slots__ = ("kind", "reference")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.reference: Any = None


class Meter(TorchDispatchMode):
    """Sees every operation: which memory appears and disappears, and which collectives there are.

    What memory is for is told by what it is found in (a parameter, a gradient, the optimizer's state), otherwise by
    when it appeared: in a forward it is an activation, later it is temporary, recomputed activations included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[Storage, int] = {}  # bytes
        self.storages: dict[int, Storage] = {}  # by address
        self.total = 0
        self.place, self.was_backward = "before the first step", False
        self.in_step, self.is_paused = False, False
        self.start_step()

    def start_step(self) -> None:
        gc.collect()  # what earlier steps left in circles is not this step's
        self.collectives: Counter[tuple[str, str, int]] = Counter()  # kind, axis, ranks
        self.collective_bytes: Counter[tuple[str, str, int]] = Counter()
        self.peak, self.peak_place = self.total, self.place
        self.at_peak: dict[Storage, int] = {}
        self.is_at_peak = True
        self.activations = 0
        self.bytes: dict[str, int] = {}

    def finish_step(self) -> None:
        if self.is_at_peak:
            self.at_peak = self.live.copy()
        self.held_at_peak = self.held(self.at_peak)

    # ---- memory

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) or kind.__name__ == "AsyncCollectiveTensor" for kind in types):
            return NotImplemented  # they turn into operations on local tensors, which come here again
        if self.is_paused:
            return function(*args, **(kwargs or {}))
        is_backward = torch._C._current_graph_task_id() != -1
        if is_backward != self.was_backward:
            self.was_backward = is_backward
            self.place = "backward, loss and head" if is_backward else "after the backward: gradient norm"
            if is_backward:
                self.activations = max(self.activations, self.held()[ACTIVATIONS])
        # In reality waiting gives the same tensor, not a copy of it.
        result = args[0] if function is WAIT else function(*args, **(kwargs or {}))
        name = function.name().partition(".")[0]
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor)
        if function.namespace in ("c10d", "_c10d_functional") and not name.endswith(NO_DATA):
            self.count(name, args, result)
        return result

    def see(self, tensor: torch.Tensor) -> Storage:
        """Take note of the memory behind a tensor."""
        memory = tensor.untyped_storage()
        address = memory._cdata
        if (known := self.storages.get(address)) is not None:
            return known
        in_forward = self.place.startswith("forward") and not self.was_backward
        storage = Storage(ACTIVATIONS if in_forward else TEMPORARY if self.in_step else OTHER)
        storage.reference = weakref.ref(memory, lambda _: self.forget(address))
        self.storages[address] = storage
        self.live[storage] = 0
        self.resize(storage, memory.nbytes())
        return storage

    def resize(self, storage: Storage, nbytes: int) -> None:
        """A storage has `nbytes` from now on: FSDP frees and refills parameters without making new ones."""
        change = nbytes - self.live[storage]
        if change < 0 and self.is_at_peak:  # only the last moment before a fall can be a peak
            self.at_peak, self.is_at_peak = self.live.copy(), False
        self.live[storage] = nbytes
        self.total += change
        if self.total > self.peak:
            self.peak, self.peak_place, self.is_at_peak = self.total, self.place, True

    def forget(self, address: int) -> None:
        storage = self.storages.pop(address)
        self.resize(storage, 0)
        del self.live[storage]

    def held(self, when: dict[Storage, int] | None = None) -> Counter[str]:
        """Bytes by kind, now or at another moment."""
        sums: Counter[str] = Counter()
        for storage, nbytes in (self.live if when is None else when).items():
            sums[storage.kind] += nbytes
        return sums

    def mark(self, tensors: Iterable[torch.Tensor], kind: str) -> int:
        """Say what tensors are for; returns the bytes behind them."""
        storages = {self.see(local(tensor)) for tensor in tensors}
        for storage in storages:
            storage.kind = kind
        return sum(self.live[storage] for storage in storages)

    # ---- collectives

    def count(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        kind, end = COLLECTIVES.get(name, (name, 0))
        flat = [t for t in tree_leaves(result if end == "result" else args[end]) if isinstance(t, torch.Tensor)]
        key = kind, *axis_of(args)
        self.collectives[key] += 1
        self.collective_bytes[key] += sum(t.nbytes for t in flat)
        if name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
            for tensor in (t for t in tree_leaves(args[:2]) if isinstance(t, torch.Tensor)):
                if (storage := self.see(tensor)).kind in (ACTIVATIONS, TEMPORARY):
                    storage.kind = BUFFERS

    # ---- when, and what for

    def watch(self, model: torch.nn.Module, parts: list[torch.nn.Module]) -> None:
        """Learn from a built model which memory is parameters, and from hooks where a step is.

        parts: what forwards go through; a pipeline's stages, which the model joins, or the model itself.
        """
        self.mark(model.parameters(), PARAMETERS)
        self.shards = {self.see(local(p)) for p in model.parameters()}
        for part in parts:
            for unit in part.modules():
                if isinstance(unit, FSDPModule):  # FSDP's own hooks gather before these are called
                    unit.register_forward_pre_hook(lambda unit, _: self.unit_is_whole(unit))
            has_embedding, has_head = (getattr(part, name, None) is not None for name in ("embedding", "head"))
            if has_embedding:
                part.register_forward_pre_hook(lambda *_: self.arrive("forward, embedding"))
            blocks = list(getattr(part, "blocks", {}).items())
            for position, (number, block) in enumerate(blocks):
                block.register_forward_pre_hook(self.entering(number, has_embedding and position == 0))
                block.register_forward_hook(self.leaving(number, has_head and position == len(blocks) - 1))

    def arrive(self, place: str) -> None:
        if torch._C._current_graph_task_id() == -1:
            self.place, self.was_backward = place, False
        elif place.startswith("forward, block"):
            self.place = place.replace("forward", "backward") + ", computed again"
        elif place.startswith("backward"):
            self.place = place

    def entering(self, number: str, is_first: bool) -> Any:
        def hook(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            self.arrive(f"forward, block {number}")
            if is_first and inputs[0].requires_grad and not self.was_backward:
                inputs[0].register_hook(lambda _: self.arrive("backward, embedding"))

        return hook

    def leaving(self, number: str, is_last: bool) -> Any:
        def hook(_: torch.nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            if output.requires_grad and not self.was_backward:
                output.register_hook(lambda _: self.arrive(f"backward, block {number}"))
            if is_last:
                self.arrive("forward, head and loss")

        return hook

    def unit_is_whole(self, unit: torch.nn.Module) -> None:
        for parameter in unit.parameters():
            storage = self.see(local(parameter))
            if storage not in self.shards and storage.kind != WHOLE:
                storage.kind = WHOLE
                parameter.register_post_accumulate_grad_hook(self.gradient_is_whole)

    def gradient_is_whole(self, parameter: torch.Tensor) -> None:
        self.mark([parameter.grad], WHOLE_GRADIENTS)

    def before_optimizer(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.place, self.was_backward = "optimizer step", False
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.bytes[PARAMETERS] = self.mark(parameters, PARAMETERS)
        self.bytes[GRADIENTS] = self.mark((p.grad for p in parameters if p.grad is not None), GRADIENTS)

    def after_optimizer(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        entries = (value for entry in optimizer.state.values() for value in entry.values())
        state = [value for value in entries if isinstance(value, torch.Tensor) and value.dim()]  # not the step counters
        self.bytes[STATE] = self.mark(state, STATE)

    @contextlib.contextmanager
    def watching_storages(self) -> Iterator[None]:
        """Optimizers announce themselves; `resize_` of a storage is no operation that a mode sees."""
        handles = [
            register_optimizer_step_pre_hook(self.before_optimizer),
            register_optimizer_step_post_hook(self.after_optimizer),
        ]
        original = torch.UntypedStorage.resize_

        def resize_(memory: torch.UntypedStorage, size: int) -> Any:
            answer = original(memory, size)
            if (storage := self.storages.get(memory._cdata)) is not None:
                self.resize(storage, memory.nbytes())
            return answer

        try:
            with replaced(torch.UntypedStorage, "resize_", resize_):
                yield
        finally:
            for handle in handles:
                handle.remove()


def axis_of(args: tuple[Any, ...]) -> tuple[str, int]:
    """Axis of the mesh ("world": all ranks) and number of ranks of the group among a collective's arguments."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in argument._type().name():
            group = dist.ProcessGroup.unbox(argument)
            break
    else:
        group = _resolve_process_group(next(a for a in reversed(args) if isinstance(a, str)))
    name = group.group_desc.removeprefix("mesh_")
    return "world" if name == "default_pg" else name, group.size()


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute another value for a while."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
