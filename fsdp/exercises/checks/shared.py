"""What several checks of this lesson use."""

import math
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

EXACT = 1e-12  # fp64, numbers of order 1 to 10, sums of some dozens of them: errors stay below 1e-13


# The name of what torch.distributed calls underneath, and which of its arguments is the whole: an output, an input.
COLLECTIVES = {
    "_allgather_base_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "allreduce_": ("all-reduce", None),
}


class Collectives(TorchDispatchMode):
    """Writes down (name, bytes of the whole, ranks) of what the running thread communicates, backward included.

    An all-reduce does not tell among how many ranks; that is 0 here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            short = func.name().split("::")[1]
            name, position = COLLECTIVES.get(short, (short.strip("_"), None))
            if position is None:
                tensors = args[0] if isinstance(args[0], list) else [args[0]]
                self.log.append((name, sum(t.nbytes for t in tensors if isinstance(t, Tensor)), 0))
            else:
                whole, part = args[position], args[1 - position]
                self.log.append((name, whole.nbytes, whole.numel() // part.numel()))
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> int:
        return sum(entry[0] == name for entry in self.log)

    def names(self) -> str:
        return ", ".join(sorted({name for name, _, _ in self.log})) or "no communication"


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference; infinite for nan or another shape."""
    if found.shape != expected.shape or (found - expected).isnan().any():
        return math.inf
    return max((found - expected).abs().flatten().tolist(), default=0.0)


def plural(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
