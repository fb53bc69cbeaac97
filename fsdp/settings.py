"""FSDP's settings, what of them cannot work, and a line that describes a sharded model."""

from dataclasses import dataclass, field

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from common.config import Config
from common.ranks import Ranks, fail


@dataclass
class FsdpConfig:
    """Who keeps which part, and when a block is whole."""

    replicate: int = 1
    """Copies of the model; ranks / replicate share one (above 1: HYBRID_SHARD)."""
    reshard_after_forward: bool = True
    """true: a block is freed after its forward, and gathered again for backward (FULL_SHARD); false: SHARD_GRAD_OP."""
    prefetch: int = 0
    """How many blocks ahead to gather, in forward and backward; 0 leaves it to torch (1 in backward)."""
    cpu_offload: bool = False
    """Keep shards, gradients and optimizer state in host memory; a block comes to the GPU to compute."""

    def __post_init__(self) -> None:
        if self.prefetch < 0:
            raise ValueError(f"fsdp.prefetch = {self.prefetch} cannot work; allowed: 0 (torch's choice) or more")


@dataclass
class ShardedConfig(Config):
    """The common settings, and FSDP's."""

    fsdp: FsdpConfig = field(default_factory=FsdpConfig)


def mesh_shape(config: FsdpConfig, ranks: Ranks) -> tuple[int, int]:
    """Return the copies of the model, and the ranks that share each. SystemExit: the ranks do not divide."""
    copies = config.replicate
    if copies < 1 or ranks.world_size % copies:
        fail(f"fsdp.replicate = {copies} with {ranks.world_size} ranks; expected a divisor of the ranks; change one")
    return copies, ranks.world_size // copies


def set_prefetch(blocks: list[FSDPModule], ahead: int) -> None:
    """Gather so many blocks before they are needed; each costs the memory of a whole block. 0: torch's own choice."""
    for number, block in enumerate(blocks if ahead else []):
        block.set_modules_to_forward_prefetch(blocks[number + 1 : number + 1 + ahead])
        block.set_modules_to_backward_prefetch(blocks[max(0, number - ahead) : number][::-1])


def describe(model: torch.nn.Module, policy: MixedPrecisionPolicy | None = None) -> str:
    """One line: how many units, of what, and how much of the model is on this rank."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    parameters = list(model.parameters())
    whole, mine = sum(p.nbytes for p in parameters), sum(p.to_local().nbytes for p in parameters)
    kinds = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
    if policy and policy.param_dtype:
        low, sums = (str(dtype).removeprefix("torch.") for dtype in (policy.param_dtype, policy.reduce_dtype))
        kinds += f", gathered and computed with in {low}, gradients summed in {sums}"
    return f"{len(units)} FSDP units in {kinds}: this rank keeps {mine:,} of {whole:,} bytes of parameters"
