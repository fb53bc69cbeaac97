"""The settings of expert parallelism, and what of them cannot work, said before anything is built."""

from dataclasses import dataclass, field

from mesh_settings import mesh_sizes
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from common.config import Config
from common.ranks import Ranks, fail
from common.transformer import ModelConfig


@dataclass
class MixtureConfig(ModelConfig):
    """The shape of a model, by default one with experts."""

    preset: str = "tiny_moe"
    """A named shape; tiny_moe has 4 experts in each layer."""


@dataclass
class ExpertMeshConfig:
    """Ranks along each axis of the mesh. All of them have different samples."""

    dp: int = 1
    """Groups that hold all experts; the ranks of other groups with the same experts share them as shards (FSDP)."""
    ep: int | None = None
    """Ranks of a group, each with its own experts; null: all ranks that dp leaves."""


@dataclass
class ExpertConfig(Config):
    """The common settings, and those of expert parallelism."""

    model: MixtureConfig = field(default_factory=MixtureConfig)
    mesh: ExpertMeshConfig = field(default_factory=ExpertMeshConfig)
    balance: float = 0.0
    """Weight of the load-balancing loss (summed over layers) beside the loss of a token; 0.01 is usual. The loss that
    is logged is without it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.balance < 0:
            raise ValueError(f"balance = {self.balance} cannot work; allowed: 0 (none) or more")


def expert_mesh(config: ExpertConfig, ranks: Ranks) -> DeviceMesh:
    """The mesh (dp, ep); neighbours exchange tokens, in every layer. SystemExit: something does not divide."""
    dp, ep = mesh_sizes(config.mesh, ranks.world_size)
    model = config.model
    if not model.experts:
        fail(f"model.experts = 0 in preset {model.preset}; expected a mixture of experts; try --model.preset tiny_moe")
    for name, size, parts, axis in (
        ("model.experts", model.experts, ep, "ep"),
        ("model.width", model.width, dp, "dp"),  # FSDP cuts each expert along its rows
        ("model.ffn_width", model.ffn_width, dp, "dp"),
    ):
        if size % parts:
            found = f"{name} = {size}, which does not divide among the {parts} ranks of mesh.{axis}"
            fail(f"{found}; expected a multiple of {parts}; change it, or mesh.{axis}")
    return init_device_mesh(ranks.device.type, (dp, ep), mesh_dim_names=("dp", "ep"))
