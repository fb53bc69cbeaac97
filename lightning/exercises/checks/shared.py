"""What several checks of this lesson use."""

import logging
import os
import warnings
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

EXACT = 1e-12  # fp64, numbers of order 1, sums of some dozens of them: errors stay below 1e-14


def build_trainer(rank: int, world_size: int, **options: Any) -> Trainer:
    """A Trainer for ranks that have joined already, as they would under torchrun; it writes nothing."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world_size}
    place |= {"LOCAL_WORLD_SIZE": world_size, "TORCHELASTIC_RUN_ID": "exercise"}
    os.environ.update({name: str(value) for name, value in place.items()})
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # about loaders without workers
    fixed = {
        "accelerator": "cpu",
        "devices": world_size,
        "strategy": "ddp",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**(options | fixed))


def small_model() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
