"""What several checks of this lesson use."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

EXACT = 1e-12  # fp64, numbers of order 1 to 10, sums of some dozens of them: errors stay below 1e-13


class Collectives(TorchDispatchMode):
    """Writes down (name, rows or numbers that this rank gives) of what the running thread communicates."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].strip("_")
        if func.namespace in ("c10d", "_c10d_functional") and not name.startswith(("wait", "wrap")):
            given = args[1] if name in ("alltoall_base", "allgather_base") else args[0]  # the other is the output
            tensors = given if isinstance(given, list | tuple) else [given]
            self.log.append((name, sum(len(t) if t.dim() else 1 for t in tensors if isinstance(t, Tensor))))
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> int:
        """Of a collective by the letters of its name: `allgather` is also all_gather_into_tensor."""
        return sum(entry.replace("_", "").startswith(name) for entry, _ in self.log)

    def names(self) -> str:
        return ", ".join(name for name, _ in self.log) or "no communication"


def off(found: Tensor | None, expected: Tensor) -> float:
    """The largest difference; infinite for None, nan or another shape."""
    if found is None or found.shape != expected.shape or (found - expected).isnan().any():
        return math.inf
    return max((found - expected).abs().flatten().tolist(), default=0.0)


def wrong(found: Tensor | None, expected: Tensor) -> str:
    """What is the matter with a gradient."""
    return "is missing" if found is None else f"is off by {off(found, expected):.1e}"


def close(found: Tensor | None, expected: Tensor) -> bool:
    return off(found, expected) <= EXACT


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
