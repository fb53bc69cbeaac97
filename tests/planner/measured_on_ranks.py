"""What real ranks measure of a lesson's second step, without any of the planner's code."""

import contextlib
import runpy
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from own_folder import own_folder
from rank_worker import starts_its_own_group
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent.parent
# The whole, flat end of each operation, and where its group stands among the arguments.
WHOLE_ENDS = {
    "c10d::_allgather_base_": ("all-gather", lambda args, result: args[0], 2),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", lambda args, result: args[1], 2),
    "c10d::allreduce_": ("all-reduce", lambda args, result: args[0][0], 1),
    "c10d::send": ("send", lambda args, result: args[0][0], 1),
    "c10d::recv_": ("receive", lambda args, result: args[0][0], 1),
    "_c10d_functional::all_gather_into_tensor": ("all-gather", lambda args, result: result, 2),
    "_c10d_functional::reduce_scatter_tensor": ("reduce-scatter", lambda args, result: args[0], 3),
    "_c10d_functional::all_reduce": ("all-reduce", lambda args, result: args[0], 2),
}


class Sent(TorchDispatchMode):
    """(collective, ranks of its group) -> how many, and their bytes."""

    def __init__(self):
        super().__init__()
        self.count, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        result = function(*args, **(kwargs or {}))
        if function.name() in WHOLE_ENDS:
            kind, end, position = WHOLE_ENDS[function.name()]
            group = args[position]
            group = _resolve_process_group(group) if isinstance(group, str) else dist.ProcessGroup.unbox(group)
            self.count[kind, group.size()] += 1
            self.bytes[kind, group.size()] += end(args, result).nbytes
        return result


def behind(tensors) -> dict[int, int]:
    """The storages of tensors' local parts, by address: bytes."""
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return {part.untyped_storage()._cdata: part.untyped_storage().nbytes() for part in parts}


@starts_its_own_group
def measured(script: str, arguments: list[str], memory: bool) -> dict:
    """Train three steps; what this rank held and sent in the second. (After the last one, scripts evaluate.)

    memory: its peak by torch's MemTracker, and what autograd keeps, too; not where a module runs twice in a step.
    """
    from common.run import Run

    found: dict = {}
    restore, steps = Run.restore, Run.steps

    def keep(self, model, optimizer, *rest):
        found["model"], found["optimizer"] = getattr(model, "module", model), optimizer
        restore(self, model, optimizer, *rest)

    def watched_steps(self, validate=None):
        inner = steps(self, validate)
        yield next(inner)
        model, optimizer = found["model"], found["optimizer"]
        sizes = {}
        parameters = list(model.parameters())

        def before(*_):
            sizes["parameters"] = sum(behind(parameters).values())
            sizes["gradients"] = sum(behind(p.grad for p in parameters).values())

        handle = optimizer.register_step_pre_hook(before)
        saved: dict[int, int] = {}

        def pack(tensor):
            origin = tensor if tensor._base is None else tensor._base
            if tensor.is_floating_point() and not isinstance(origin, torch.nn.Parameter):
                saved.update(behind([tensor]))
            return tensor

        tracker, sent = MemTracker(), Sent()
        with contextlib.ExitStack() as stack:
            if memory:
                tracker.track_external(model, optimizer)
                stack.enter_context(tracker)
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
            stack.enter_context(sent)
            yield next(inner)
        handle.remove()
        state = [v for entry in optimizer.state.values() for v in entry.values() if v.dim()]
        sizes["optimizer state"] = sum(behind(state).values())
        found["answer"] = {
            **sizes,
            "sent": {key: (count, sent.bytes[key]) for key, count in sent.count.items()},
            "peak": sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values()),
            "saved": sum(saved.values()),
        }
        yield from inner

    Run.restore, Run.steps = keep, watched_steps
    sys.argv = [str(ROOT / script), *arguments, "--train.steps", "3", "--train.check_replicas_every", "0"]
    try:
        with own_folder(ROOT / script):
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        Run.restore, Run.steps = restore, steps
    return found["answer"]
