"""Ranks that end by a mistake leave together: one that leaves early breaks what another is still connecting."""

import time

import torch.distributed as dist

PATIENCE_S = 20.0  # a rank that does not come has not ended by the same mistake: its test says so


def wait_for_all() -> None:
    """Return when all ranks are here; the first rank serves the store, and returns last."""
    store, ranks = dist.distributed_c10d._get_default_store(), dist.get_world_size()
    deadline = time.monotonic() + PATIENCE_S

    def wait(name: str) -> None:
        store.add(name, 1)
        while store.add(name, 0) < ranks and time.monotonic() < deadline:
            time.sleep(0.01)

    wait("ended")
    if dist.get_rank() == 0:
        wait("seen")
    else:
        store.add("seen", 1)


def leave_together() -> None:
    """Destroy the process group that a script which ended by a mistake has left behind, if there is one."""
    if dist.is_initialized():
        wait_for_all()
        dist.destroy_process_group()
