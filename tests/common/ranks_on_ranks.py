"""What the ranks of a `group` run for the tests of common/."""

import torch
import torch.distributed as dist

from common.ranks import Ranks


def here() -> Ranks:
    """The Ranks of the group that the test started."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return Ranks(rank, size, rank, size, "test", torch.device("cpu"))
