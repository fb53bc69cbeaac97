"""The settings of context parallelism, and what of them cannot work, said before anything is built."""

from dataclasses import dataclass, field
from typing import Literal

from mesh_settings import mesh_sizes
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from common.config import Config
from common.ranks import Ranks, fail


@dataclass
class ContextMeshConfig:
    """Ranks along each axis of the mesh."""

    dp: int = 1
    """Data parallel: different samples."""
    cp: int | None = None
    """Context parallel: the same samples, each rank a part of every sequence; null: all ranks that dp leaves."""


@dataclass
class ContextConfig(Config):
    """The common settings, and those of context parallelism."""

    mesh: ContextMeshConfig = field(default_factory=ContextMeshConfig)
    attention: Literal["auto", "ring", "all_gather"] = "auto"
    """How queries meet the keys of other ranks. ring: keys and values travel from rank to rank (GPUs only);
    all_gather: every rank gathers all of them; auto: ring on GPUs (but not in fp64), all_gather otherwise."""


def context_mesh(config: ContextConfig, ranks: Ranks) -> DeviceMesh:
    """The mesh (dp, cp); neighbours are context ranks, which talk in every layer. SystemExit: it does not divide."""
    dp, cp = mesh_sizes(config.mesh, ranks.world_size)
    if (length := config.data.sequence_length) % (2 * cp):
        found = f"data.sequence_length = {length}, which does not divide into {2 * cp} pieces, 2 for each context rank"
        fail(f"{found}; expected a multiple of {2 * cp}; change it, or mesh.cp")
    return init_device_mesh(ranks.device.type, (dp, cp), mesh_dim_names=("dp", "cp"))


def choose_attention(config: ContextConfig, ranks: Ranks) -> Literal["ring", "all_gather"]:
    """What `attention` stands for on this device. SystemExit: torch has no ring attention for it."""
    on_gpu, fp64 = ranks.device.type == "cuda", config.train.precision == "fp64"
    if config.attention == "auto":
        return "ring" if on_gpu and not fp64 else "all_gather"
    if config.attention == "ring" and (fp64 or not on_gpu):
        found = f"attention = ring on a {ranks.device.type} device in {config.train.precision}"
        fail(f"{found}; expected a GPU and not fp64, because torch's ring needs its fused kernels; use all_gather")
    return config.attention
