"""What a rank of a `group` runs for test_network.py."""

import dataclasses
import pickle

import torch
import torch.distributed as dist
from rank_worker import starts_its_own_group

from common.launching import network


@starts_its_own_group
def remembered_collectives(size: str, made: int) -> int:
    """Apply a profile whose flight recorder holds `size` collectives, make some, and count what it has kept."""
    recorder = dataclasses.replace(network.DIAGNOSTICS[0], value=size)
    kept = network.PROFILES["default"]
    network.PROFILES["default"] = (recorder, *network.DIAGNOSTICS[1:])
    try:
        network.apply()
    finally:
        network.PROFILES["default"] = kept
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for _ in range(made):
        dist.all_reduce(torch.ones(1))
    entries = pickle.loads(torch._C._distributed_c10d._dump_fr_trace())["entries"]
    dist.destroy_process_group()
    return len(entries)
