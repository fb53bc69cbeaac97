"""Copy a nested state dict, list its values by name, and compare two, bit by bit."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def copy_of(value: Any, fill: float | None = None) -> Any:
    """A nested state dict again, in new memory: with the same values, or every tensor full of `fill`."""
    if isinstance(value, Tensor):
        value = value.detach()
        return value.clone() if fill is None else torch.full_like(value, fill)
    if isinstance(value, dict):
        return {key: copy_of(entry, fill) for key, entry in value.items()}
    if isinstance(value, list):
        return [copy_of(entry, fill) for entry in value]
    return value


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """The values of a nested state dict by their dotted name; of a DTensor this rank's shard."""
    if isinstance(value, DTensor):
        return {name: value.to_local()}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {name: value}
    return {key: leaf for part, entry in items for key, leaf in leaves(entry, f"{name}.{part}").items()}


def differing(one: Any, other: Any) -> list[str]:
    """Names of what is not equal in two nested state dicts, bit by bit where tensors are; NaN equals nothing."""
    mine, theirs = leaves(one), leaves(other)

    def equal(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)

    names = mine.keys() | theirs.keys()
    return sorted(n for n in names if n not in mine or n not in theirs or not equal(mine[n], theirs[n]))
