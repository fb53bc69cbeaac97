"""The collectives of a script, step by step: which, of how many bytes, in which dtype, among how many ranks.

For the ranks of a `group`: `OnRanks("tests/support/traffic.py").of_steps` names the function.
"""

import scripts_on_ranks
import torch
import torch.distributed as dist
from rank_worker import starts_its_own_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

Message = tuple[str, int, str, int]  # operation, bytes of its input, dtype, ranks of its group

# Where the operations of c10d have their input; the others have it first.
INPUT = {"_allgather_base_": 1, "_reduce_scatter_base_": 1, "alltoall_base_": 1}


class Traffic(TorchDispatchMode):
    """Notes every collective, and every message from rank to rank, that is called meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Message] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor calls its collectives itself, and those are seen
        name = op.name().split("::")[-1].split(".")[0]
        if op.namespace in ("c10d", "_c10d_functional") and not name.startswith(("wait", "_wrap", "monitored")):
            tensor = args[INPUT.get(name, 0)] if args else None
            tensor = tensor[0] if isinstance(tensor, list) and tensor else tensor
            if isinstance(tensor, torch.Tensor):
                kind = str(tensor.dtype).removeprefix("torch.")
                self.messages.append((name.strip("_"), tensor.nbytes, kind, group_size(args)))
        return op(*args, **(kwargs or {}))


def group_size(args: tuple) -> int:
    """Return the number of ranks of the process group among the arguments of an operation."""
    for value in args:
        if isinstance(value, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(value).size()
            except (RuntimeError, TypeError):  # an operation's kind (sum, maximum) is such an object, too
                continue
        if isinstance(value, str) and value.isdigit():  # the name of a group
            return dist.distributed_c10d._resolve_process_group(value).size()
    return 0


@starts_its_own_group
def attentions(script: str, arguments: list[str]) -> int:
    """Run the script; how often an attention computed so that backward can follow, recomputations included."""
    from common.transformer import Attention

    forward, count = Attention.forward, 0

    def counted(self, *rest, **options):
        nonlocal count
        count += torch.is_grad_enabled()
        return forward(self, *rest, **options)

    Attention.forward = counted
    try:
        scripts_on_ranks.train(script, arguments)
    finally:
        Attention.forward = forward
    return count


@starts_its_own_group
def of_steps(script: str, arguments: list[str]) -> list[list[Message]]:
    """Run the script; the messages of each step on this rank, the sum of the logged loss included."""
    from common.run import Run

    steps, log, traffic = [], Run.log, Traffic()

    def log_and_cut(self, *rest):
        log(self, *rest)
        steps.append(list(traffic.messages))
        traffic.messages.clear()

    yield_steps = Run.steps

    def steps_from_here(self, *validate):
        for step in yield_steps(self, *validate):
            traffic.messages.clear()
            yield step

    Run.log, Run.steps = log_and_cut, steps_from_here
    try:
        with traffic:
            scripts_on_ranks.train(script, arguments)
    finally:
        Run.log, Run.steps = log, yield_steps
    return steps


@starts_its_own_group
def units(script: str, arguments: list[str]) -> set[tuple[str | None, str | None, bool, str]]:
    """Run the script; what each `fully_shard` is told: dtypes to gather and to add in, inputs cast or not, offload."""
    import torch.distributed.fsdp as fsdp

    seen, fully_shard = set(), fsdp.fully_shard

    def noted(module, *, mp_policy, offload_policy=None, **more):
        names = (str(t).removeprefix("torch.") if t else None for t in (mp_policy.param_dtype, mp_policy.reduce_dtype))
        kind = type(offload_policy).__name__ if offload_policy else "OffloadPolicy"
        seen.add((*names, mp_policy.cast_forward_inputs, kind))
        options = {"offload_policy": offload_policy} if offload_policy else {}
        return fully_shard(module, mp_policy=mp_policy, **options, **more)

    fsdp.fully_shard = noted
    try:
        scripts_on_ranks.train(script, arguments)
    finally:
        fsdp.fully_shard = fully_shard
    return seen
