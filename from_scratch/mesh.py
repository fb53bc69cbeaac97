"""The mesh: every rank has a place on each axis of a grid, and one process group along each.

    mesh = build_mesh(dp=2, tp=2)                     # sizes of the axes; those left out have size 1
    mesh.coordinates["tp"], mesh.groups["tp"]         # my place on that axis, and who shares all my other coordinates

`arange(world).view(dp, pp, cp, tp)` is the whole idea. The last axis has neighbouring ranks: tensor parallelism talks
most, so it gets them, inside a node (https://arxiv.org/abs/2104.04473, section 3); data parallelism talks once a step,
and may cross nodes.
"""

from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

AXES = ("dp", "pp", "cp", "tp")  # data, pipeline, context, tensor


@dataclass(frozen=True)
class Mesh:
    """This rank's view of the grid. `groups` has each axis, and "dp_cp": context-parallel ranks hold equal weights too,
    so gradients are averaged over both."""

    sizes: dict[str, int]
    coordinates: dict[str, int]
    groups: dict[str, ProcessGroup]


def make_grid(world_size: int, sizes: dict[str, int]) -> torch.Tensor:
    """The ranks 0 … world_size − 1 as a tensor of shape (dp, pp, cp, tp).

    Raises:
        ValueError: a size below 1, or sizes that do not multiply to the world size.
    """
    shown = " x ".join(f"{axis} {sizes[axis]}" for axis in AXES)
    if min(sizes.values()) < 1:
        raise ValueError(f"the mesh is {shown}; expected at least 1 on every axis; leave an axis out to have 1")
    if (product := prod(sizes.values())) != world_size:
        raise ValueError(
            f"the mesh {shown} has {product} places, but there are {world_size} ranks; expected as many; change an "
            f"axis, or start {product} ranks"
        )
    return torch.arange(world_size).view([sizes[axis] for axis in AXES])


def lines(grid: torch.Tensor, *axes: str) -> list[list[int]]:
    """All groups of ranks along the axes: `lines(grid, "tp")` of 2 x 1 x 1 x 2 is [[0, 1], [2, 3]]."""
    others = [number for number, axis in enumerate(AXES) if axis not in axes]
    length = prod(grid.shape[AXES.index(axis)] for axis in axes)
    return grid.permute(*others, *(AXES.index(axis) for axis in axes)).reshape(-1, length).tolist()


def build_mesh(dp: int = 1, pp: int = 1, cp: int = 1, tp: int = 1) -> Mesh:
    """Build the grid over the whole world; all ranks must call it. Raises ValueError as `make_grid` does."""
    sizes = {"dp": dp, "pp": pp, "cp": cp, "tp": tp}
    rank = dist.get_rank()
    grid = make_grid(dist.get_world_size(), sizes)
    place = (grid == rank).nonzero()[0].tolist()
    groups, created = {}, {}
    for axes in [(axis,) for axis in AXES] + [("dp", "cp")]:
        for ranks in lines(grid, *axes):
            # All ranks create all groups, in the same order, those without them too: `new_group` is a collective.
            # Axes of one rank, and dp with dp_cp where cp is 1, have the same groups: each is created once.
            if tuple(ranks) not in created:
                created[tuple(ranks)] = dist.new_group(ranks)
            if rank in ranks:
                groups["_".join(axes)] = created[tuple(ranks)]
    return Mesh(sizes, dict(zip(AXES, place, strict=True)), groups)
