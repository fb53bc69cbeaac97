"""The settings of train.py, and which strategies cannot be combined."""

from dataclasses import dataclass, field
from math import prod
from typing import Literal

from common.config import Config

AXIS = {"tensor": "tp", "pipeline": "pp", "context": "cp"}  # all others: dp


@dataclass
class MeshConfig:
    """Ranks along each axis; null: 1, or on the strategy's own axis all that the others leave."""

    dp: int | None = None
    """Data parallel."""
    pp: int | None = None
    """Pipeline stages (each rank has one, or several if interleaved)."""
    cp: int | None = None
    """Parts of each sequence."""
    tp: int | None = None
    """Slices of each weight."""

    def sizes(self, world_size: int, own: str) -> dict[str, int]:
        """The size of every axis. Raises ValueError: the world does not divide."""
        given = {"dp": self.dp, "pp": self.pp, "cp": self.cp, "tp": self.tp}
        sizes = {axis: 1 if size is None else size for axis, size in given.items()}
        others = prod(size for axis, size in sizes.items() if axis != own)
        if given[own] is None and others > 0:  # wrong ones are for build_mesh to find
            if world_size % others:
                found = f"{world_size} ranks for mesh.{own} and other axes of together {others}"
                raise ValueError(f"{found}; expected a multiple of {others}; change mesh.*, or the number of ranks")
            sizes[own] = world_size // others
        return sizes


@dataclass
class ByHandConfig(Config):
    """The common settings, the strategy, and what a strategy can be told."""

    strategy: Literal[
        "naive", "accumulate", "overlap", "bucket", "zero1", "zero2", "fsdp", "tensor", "pipeline", "context"
    ] = "bucket"
    """What to do, from this folder's files."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    bucket_bytes: int = 25 * 2**20
    """bucket, zero1: when a bucket is full."""
    reshard_after_forward: bool = True
    """fsdp: free a block between its forward and its backward."""
    sequence_parallel: bool = False
    """mesh.tp: cut activations between the layers, too, along the sequence."""
    schedule: Literal["afab", "1f1b", "interleaved"] = "1f1b"
    """mesh.pp: the order of forwards and backwards."""
    stages_per_rank: int = 1
    """mesh.pp: 2 or more for interleaved."""
    balanced: bool = True
    """mesh.cp: give every rank an early and a late part of the sequence, so that causal attention is equal work."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train.precision == "fp16" or self.train.compile:
            found = f"train.precision = {self.train.precision}, train.compile = {self.train.compile}"
            raise ValueError(f"{found}; expected fp32, bf16 or fp64, not compiled; ddp/train.py has fp16 and compile")
        if self.bucket_bytes < 1:
            raise ValueError(f"bucket_bytes = {self.bucket_bytes} cannot work; allowed: at least 1")


def check_combination(config: ByHandConfig, sizes: dict[str, int]) -> None:
    """Raises ValueError: the parts do not work together."""
    if sizes["pp"] > 1 and config.strategy in ("zero2", "fsdp"):
        found = f"strategy = {config.strategy} with mesh.pp = {sizes['pp']}, where micro-batches overlap"
        raise ValueError(f"{found}; expected one that reduces gradients once a step; use bucket or zero1")
    if config.sequence_parallel and (sizes["pp"] > 1 or config.strategy == "fsdp"):
        found = f"sequence_parallel with mesh.pp = {sizes['pp']} and strategy = {config.strategy}"
        raise ValueError(f"{found}; expected neither a pipeline nor fsdp beside it; set it to false")
    if config.sequence_parallel and sizes["tp"] == 1:
        raise ValueError("sequence_parallel with mesh.tp = 1; expected tensor parallelism under it; set mesh.tp")
    if config.stages_per_rank > 1 and sizes["pp"] == 1:
        raise ValueError(
            f"stages_per_rank = {config.stages_per_rank} with mesh.pp = 1; expected a pipeline; set mesh.pp"
        )


def recorded_mesh(strategy: str, sizes: dict[str, int]) -> dict[str, int]:
    """The mesh as run.json has it: `dp` is there `dp_shard` when the strategy shards anything, else `dp_replicate`."""
    dp = "dp_shard" if strategy in ("zero1", "zero2", "fsdp") else "dp_replicate"
    return {dp if axis == "dp" else axis: size for axis, size in sizes.items()}
