"""The settings of the Lightning lessons."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.config import Config
from common.ranks import fail


@dataclass
class FabricConfig(Config):
    """The common settings, and on how many devices."""

    devices: int | None = None
    """Processes on each node, one a device. null: as many as torchrun or srun started; with plain python, all GPUs, or
    one process on the CPU. With plain python Lightning starts the others itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_devices(self.devices)


def check_devices(devices: int | None) -> None:
    """Raises ValueError unless it is a number of processes, or None."""
    if devices is not None and devices < 1:
        raise ValueError(f"devices = {devices} cannot work; allowed: 1 or more, or null")


@dataclass
class LightningConfig(FabricConfig):
    """The same, and which of Lightning's strategies trains."""

    strategy: Literal["single_device", "ddp", "fsdp", "tensor_parallel", "deepspeed"] = "ddp"
    """How the training is distributed."""
    tp_dimensions: list[int] | None = None
    """Ranks along [rows, columns, depth] of a 3-D tensor parallelism, whose product is the number of ranks; null: all
    along the first. Rows cut the weights, depth cuts batch and weights as FSDP does, and columns must be 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tp_dimensions is None:
            return
        found = f"tp_dimensions = {self.tp_dimensions}"
        if self.strategy != "tensor_parallel":
            raise ValueError(
                f"{found} with strategy = {self.strategy}; set strategy to tensor_parallel, or leave it out"
            )
        if len(self.tp_dimensions) != 3 or min(self.tp_dimensions) < 1:
            raise ValueError(f"{found} cannot work; allowed: three whole numbers from 1 on, [rows, columns, depth]")
        if self.tp_dimensions[1] != 1:
            advice = "set the second to 1, and give its ranks to rows or depth"
            raise ValueError(f"{found} cuts weights both ways, which DTensor's plans cannot; {advice}")


def arguments_and_file() -> list[str]:
    """The command line; without `--config` in it, with the file that the variable CONFIG_FILE names."""
    arguments, file = sys.argv[1:], os.environ.get("CONFIG_FILE")
    if file and not any(argument.split("=")[0] == "--config" for argument in arguments):
        if not Path(file).is_file():
            there = ", ".join(sorted(path.name for path in (Path(__file__).parent / "configs").glob("*.*")))
            fail(f"CONFIG_FILE={file}: there is no such file (from {Path.cwd()}); lightning/configs/ has {there}")
        arguments = ["--config", file, *arguments]
    return arguments
