"""What a step sends and holds: run any of the step scripts under a meter.

    torchrun --nproc-per-node=2 from_scratch/step_meter.py from_scratch/step_06_zero_2.py

Each rank prints, for its second optimizer step, the bytes it sends, as a ring would send them, and what it holds when
the optimizer steps (parameters, gradients, optimizer state), both in multiples of P, the bytes of all parameters.
"""

import inspect
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

from common.ranks import fail
from common.transformer import Transformer

# What torch.distributed calls underneath; how many bytes leave a rank of n in a ring (collectives/README.md).
SENDS = {
    "c10d::allreduce_": lambda n, args: 2 * (n - 1) * args[0][0].nbytes / n,
    "c10d::_allgather_base_": lambda n, args: (n - 1) * args[1].nbytes,
    "c10d::allgather_": lambda n, args: (n - 1) * args[1][0].nbytes,
    "c10d::_reduce_scatter_base_": lambda n, args: (n - 1) * args[0].nbytes,
    "c10d::send": lambda n, args: args[0][0].nbytes,
}
NAMES = dict(zip(SENDS, ("all-reduce", "all-gather", "all-gather", "reduce-scatter", "send"), strict=True))


class Meter(TorchDispatchMode):
    """Sees every operation of the threads that it is active in, those of torch.distributed too."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.messages = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (name := function.name()) in SENDS:
            self.bytes[NAMES[name]] += SENDS[name](dist.get_world_size(), args)
            self.messages[NAMES[name]] += 1
        return function(*args, **(kwargs or {}))


def storage_bytes(tensors) -> int:
    """Bytes of memory behind the tensors; views of one flat tensor count once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def held(optimizer: torch.optim.Optimizer, model: object) -> dict[str, int]:
    """Bytes of what this rank keeps; a ZeRO optimizer has pieces of its own beside the model's parameters."""
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parameters = {*own, *(model.parameters() if isinstance(model, nn.Module) else ())}
    states = (value for state in optimizer.state.values() for value in state.values())
    return {
        "parameters": storage_bytes(parameters),
        "gradients": storage_bytes(p.grad for p in parameters if p.grad is not None),
        "optimizer state": storage_bytes(value for value in states if value.dim()),  # not the step counters
    }


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        fail(f"found {sys.argv[1:]}; expected a step script, such as from_scratch/step_01_naive.py")
    script, meter, steps, metering = Path(sys.argv[1]), Meter(), [], ExitStack()

    def after_step(optimizer: torch.optim.Optimizer, *_) -> None:
        frame = inspect.currentframe()
        while frame.f_globals is not script_globals:  # the script's main(), which called optimizer.step()
            frame = frame.f_back
        now = held(optimizer, frame.f_locals["model"])
        rank = dist.get_rank() if dist.is_initialized() else 0  # step 0 has no group
        steps.append((meter.bytes.copy(), meter.messages.copy(), now, rank))
        if len(steps) == 2:
            metering.close()  # the rest at full speed

    script_globals = {"__name__": "__main__"}
    hook = register_optimizer_step_post_hook(after_step)
    try:
        with metering:
            metering.enter_context(meter)
            exec(compile(script.read_text(), script, "exec"), script_globals)
    finally:
        hook.remove()
    model = Transformer(script_globals["MODEL"], seed=None)
    whole = 8 * sum(parameter.numel() for parameter in model.parameters())  # fp64
    (bytes_before, messages_before, *_), (bytes_after, messages_after, now, rank) = steps[:2]  # between two updates
    sent, messages = bytes_after - bytes_before, messages_after - messages_before
    parts = ", ".join(f"{name} {sent[name] / whole:.3f} in {messages[name]}" for name in sorted(messages))
    kept = ", ".join(f"{what} {count / whole:.3f}" for what, count in now.items())
    line = f"rank {rank}  sent {sent.total() / whole:.3f} P ({parts})  held, in P: {kept}"
    print(line + "\n", end="", flush=True)  # one write: ranks share the terminal


if __name__ == "__main__":
    main()
