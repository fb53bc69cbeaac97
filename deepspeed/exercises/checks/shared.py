"""What several checks of this lesson use."""

import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the lesson: as if this file stood beside its scripts

from environment import deepspeed
from settings import state_bytes  # noqa: F401  (for the checks)

# fp32, numbers of order 1, sums of some dozens of them: errors stay below 1e-6; the mistakes are off by 1e-2 and more.
CLOSE = 1e-5


def start(rank: int, world_size: int) -> None:
    """Tell DeepSpeed who this rank is, and that the process group is there."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    deepspeed.utils.logger.setLevel("ERROR")  # "untested optimizer" is no news to the learner
    deepspeed.init_distributed(verbose=False)


def engine_settings(stage: int, accumulation: int, world_size: int, low: bool = False) -> dict[str, Any]:
    """DeepSpeed's settings: no clipping, and in stage 3 no parameter stays whole."""
    return {
        "train_batch_size": accumulation * world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": low},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def engine_of(model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, whole also in stage 3."""
    found = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().clone()
    return found


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference; infinite for nan or another shape."""
    if found.shape != expected.shape or (found - expected).isnan().any():
        return math.inf
    return (found - expected).abs().max().item()
