"""The check of the exercise resume_exactly.py; run by tools/exercises.py."""

import copy
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from grading import expect
from torch import Tensor

WORLD_SIZES = (2,)  # bitwise is for 2 ranks: with more, DDP's rebuilt buckets add in another order


def check(module: ModuleType, rank: int, world_size: int) -> None:
    folder: list[Any] = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    place = Path(folder[0])
    trainer = module.Trainer(seed=0)
    for _ in range(7):
        trainer.train_step()
    module.save(trainer, place)
    saved = state_of(trainer)
    expected = [trainer.train_step() for _ in range(10)]

    resumed = module.Trainer(seed=99)
    module.restore(resumed, place)
    hints = {
        "step": "it decides which samples come next: without it the data starts from the beginning",
        "model": "load the weights into trainer.model, on every rank",
        "optimizer": "AdamW remembers two moments for each weight, and how many steps it has taken",
        "schedule": "the learning rate depends on the steps that the schedule has counted",
        "rng": "dropout draws from torch's generator, and every rank has its own: one file per rank",
    }
    now = state_of(resumed)
    for name, hint in hints.items():
        expect(
            same(saved[name], now[name]),
            f"on rank {rank} the {name} is not what it was when save was called",
            "the same state, bit for bit",
            hint,
        )
    found = [resumed.train_step() for _ in range(10)]
    different = [index for index in range(10) if found[index] != expected[index]]
    expect(
        not different,
        f"on rank {rank} {len(different)} of 10 losses differ (steps {[7 + index for index in different]})",
        "10 equal losses",
        "does save or restore draw random numbers, or train?",
    )


def state_of(trainer: Any) -> dict[str, Any]:
    """A copy of all that the next step depends on."""
    state = {name: getattr(trainer, name).state_dict() for name in ("model", "optimizer", "schedule")}
    return copy.deepcopy(state | {"step": trainer.step, "rng": torch.get_rng_state()})


def same(a: Any, b: Any) -> bool:
    """Equality of nested dicts and lists of tensors."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
