"""What several checks of this lesson use."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

EXACT = 1e-12  # fp64, numbers of order 1 to 100, sums of some dozens of them: errors stay below 1e-13


class Collectives(TorchDispatchMode):
    """Writes down (name, bytes) of what the running thread communicates, whichever function started it."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sizes = [sum(leaf.nbytes for leaf in tree_leaves(arg) if isinstance(leaf, Tensor)) for arg in args[:2]]
            self.log.append((str(func).split(".")[1].strip("_"), max(sizes)))  # the larger of input and output
        return func(*args, **(kwargs or {}))

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.log)

    def names(self) -> str:
        return ", ".join(name for name, _ in self.log) or "no communication"


def off(found: Tensor | None, expected: Tensor) -> float:
    """The largest difference; infinite for None, nan or another shape."""
    if found is None or found.shape != expected.shape:
        return math.inf
    difference = max((found - expected).abs().flatten().tolist(), default=0.0)
    return math.inf if (found - expected).isnan().any() else difference


def close(found: Tensor | None, expected: Tensor) -> bool:
    return off(found, expected) <= EXACT


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
