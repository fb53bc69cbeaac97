"""What a rank of a `group` runs for test_network.py."""

import dataclasses
import os
import pickle
from pathlib import Path

import torch
import torch.distributed as dist
from rank_worker import starts_its_own_group

from common.launching import network


@starts_its_own_group
def remembered_collectives(size: str, made: int, runs_dir: str) -> int:
    """Apply a profile whose flight recorder holds `size` collectives, make some, and count what it has written."""
    os.environ["RUNS_DIR"] = runs_dir
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
    torch._C._distributed_c10d._dump_fr_trace_file(0)  # what NCCL's watchdog calls after a timeout
    entries = pickle.loads((Path(runs_dir) / "flight_recorder_rank0").read_bytes())["entries"]
    dist.destroy_process_group()
    return len(entries)
