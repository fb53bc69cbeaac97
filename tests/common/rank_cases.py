"""What the ranks of a `group` run for the tests of common/."""

import torch
import torch.distributed as dist

from common.ranks import Ranks, rank0_first


def here() -> Ranks:
    """The Ranks of the group that the test started."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return Ranks(rank, size, rank, size, "test", torch.device("cpu"))


def rank0_first_order(path: str) -> list[str]:
    import time

    ranks = here()
    with rank0_first(ranks):
        if ranks.is_main:
            time.sleep(0.3)  # the others would be first if they did not wait
        with open(path, "a") as file:
            file.write(f"{ranks.rank}\n")
    dist.barrier()
    return open(path).read().split()
