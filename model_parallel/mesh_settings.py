"""The settings of tensor, pipeline and hybrid parallelism, and refusals of those that cannot work."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from common.config import Config
from common.ranks import Ranks, fail


@dataclass
class MeshConfig:
    """Ranks along each axis of the mesh."""

    dp: int = 1
    """Data parallel: different samples, and shards of each slice (FSDP)."""
    tp: int | None = None
    """Tensor parallel: the same samples, and slices of each weight; null: all ranks that dp leaves."""


@dataclass
class TensorConfig(Config):
    """The common settings, and those of tensor parallelism."""

    mesh: MeshConfig = field(default_factory=MeshConfig)
    sequence_parallel: bool = True
    """Cut activations between the layers, too, along the sequence; false: every tensor rank has them whole."""


@dataclass
class PipelineConfig(Config):
    """The common settings, and those of pipeline parallelism. The micro-batches are batch.micro_size samples each."""

    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = "1f1b"
    """The order of forwards and backwards; zero_bubble computes gradients of inputs and of weights apart."""
    stages_per_rank: int | None = None
    """null: 1 for gpipe and 1f1b, which know no other, and 2 for interleaved and zero_bubble."""

    def __post_init__(self) -> None:
        super().__post_init__()
        looped = self.schedule in ("interleaved", "zero_bubble")
        if self.stages_per_rank is None:
            self.stages_per_rank = 2 if looped else 1
        if self.stages_per_rank < 1 or (not looped and self.stages_per_rank > 1):
            found = f"stages_per_rank = {self.stages_per_rank} with schedule = {self.schedule}"
            raise ValueError(f"{found}; expected 1, or more with interleaved and zero_bubble; leave it out")
        if self.train.precision == "fp16" or self.train.compile:
            found = f"train.precision = {self.train.precision}, train.compile = {self.train.compile}"
            raise ValueError(f"{found}; expected fp32, bf16 or fp64, not compiled; ddp/train.py has fp16 and compile")


@dataclass
class HybridMeshConfig:
    """Ranks along each axis of the mesh."""

    pp: int = 2
    """Pipeline parallel: other layers; 2 or more."""
    dp: int | None = None
    """Data parallel: different samples, and shards of each slice (FSDP); null: all ranks that pp and tp leave."""
    tp: int = 2
    """Tensor parallel: the same samples, and slices of each weight."""


@dataclass
class HybridConfig(PipelineConfig):
    """The settings of a pipeline, and those of tensor parallelism."""

    mesh: HybridMeshConfig = field(default_factory=HybridMeshConfig)
    sequence_parallel: bool = True
    """Cut activations between the layers, too, along the sequence; false: every tensor rank has them whole."""


def mesh_sizes(mesh: Any, world: int) -> tuple[int, ...]:
    """Ranks along each axis; what is null takes all that the others leave. SystemExit: it is not the world's number."""
    axes = asdict(mesh)
    given = math.prod(size for size in axes.values() if size is not None)
    sizes = tuple(world // max(given, 1) if size is None else size for size in axes.values())
    if min(sizes) < 1 or math.prod(sizes) != world:
        found = ", ".join(f"mesh.{name} = {size}" for name, size in axes.items())
        fail(f"{found} with {world} ranks; expected a product of {world}; change one of them")
    return sizes


def tensor_mesh(config: TensorConfig, ranks: Ranks) -> DeviceMesh:
    """The mesh (dp, tp); neighbours are tensor ranks, which talk most. SystemExit: something does not divide."""
    dp, tp = mesh_sizes(config.mesh, ranks.world_size)
    require_divisible(config, tp)
    return _with_flat_sums(init_device_mesh(ranks.device.type, (dp, tp), mesh_dim_names=("dp", "tp")))


def hybrid_mesh(config: HybridConfig, ranks: Ranks) -> DeviceMesh:
    """The mesh (pp, dp, tp): who talks most is nearest, so that tensor ranks share a node, and stages need not.

    SystemExit: something does not divide.
    """
    pp, dp, tp = mesh_sizes(config.mesh, ranks.world_size)
    if pp < 2:
        fail(f"mesh.pp = {pp}; expected 2 or more stages; model_parallel/tensor_parallel.py is for one")
    require_divisible(config, tp)
    return _with_flat_sums(init_device_mesh(ranks.device.type, (pp, dp, tp), mesh_dim_names=("pp", "dp", "tp")))


def _with_flat_sums(mesh: DeviceMesh) -> DeviceMesh:
    """Let sums over dp and tp, as the gradient norm's, be one all-reduce in place of one for each axis."""
    mesh["dp", "tp"]._flatten()  # private, and yet what torch's warning asks for; the mesh keeps the group
    return mesh


def require_divisible(config: TensorConfig | HybridConfig, tp: int) -> None:
    """SystemExit, in one line: `tp` tensor ranks cannot cut this model."""
    model = config.model
    if model.experts:
        fail(f"model.experts = {model.experts}; expected dense layers for this tensor parallelism; set it to 0")
    sizes = {f"model.{name}": getattr(model, name) for name in ("heads", "kv_heads", "ffn_width", "vocabulary")}
    if config.sequence_parallel:
        sizes["data.sequence_length"] = config.data.sequence_length
    for name, size in sizes.items():
        if size % tp:
            found = f"{name} = {size}, which does not divide among {tp} tensor ranks"
            fail(f"{found}; expected a multiple of {tp}; change it, or mesh.tp")


def describe(model: torch.nn.Module) -> str:
    """One line: how much of the model is on this rank."""
    parameters = list(model.parameters())
    whole, mine = sum(p.nbytes for p in parameters), sum(p.to_local().nbytes for p in parameters)
    return f"this rank keeps {mine:,} of {whole:,} bytes of parameters"
