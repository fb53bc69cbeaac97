"""What ranks do together, called by test_doctor.py on every rank."""

import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "prerequisites"))

import doctor_together


def sums(lie: int) -> tuple[str, str]:
    """The all-reduce, in which rank 1 adds `lie` to what it should give."""
    rank = dist.get_rank()
    result = doctor_together.all_reduce(rank + lie * (rank == 1), dist.get_world_size(), "cpu")
    return result.status, result.found
