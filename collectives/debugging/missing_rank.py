"""One rank never comes to an all-reduce: what each tool says about who, and where it is instead.

    torchrun --nproc-per-node=2 collectives/debugging/missing_rank.py --tool timeout
    torchrun --nproc-per-node=2 collectives/debugging/missing_rank.py --tool monitored_barrier
    TORCH_FR_BUFFER_SIZE=2000 torchrun --nproc-per-node=2 collectives/debugging/missing_rank.py --tool flight_recorder
    torchrun --nproc-per-node=2 collectives/debugging/missing_rank.py --tool py_spy          # pip install py-spy

The usual cause: code that only one rank runs (`if rank == 0: evaluate()`) has a collective in it, or is so long that
the others give up. Here the last rank evaluates alone.
"""

import datetime
import os
import pickle
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from reporting import attempt, impatient_group, say
from torch.distributed.elastic.multiprocessing.errors import record

from common.config import parse
from common.ranks import Ranks, fail, join

PATIENCE_S = 3.0


@dataclass
class MissingConfig:
    tool: Literal["timeout", "monitored_barrier", "flight_recorder", "py_spy"] = "timeout"
    """How the others find out."""


def evaluate_alone() -> None:
    """What only one rank does."""
    time.sleep(PATIENCE_S + 4)


def monitored_barrier() -> None:
    """A barrier that knows who has come; Gloo only, so with NCCL make a second group with backend="gloo" for it."""
    dist.monitored_barrier(timeout=datetime.timedelta(seconds=PATIENCE_S), wait_all_ranks=True)


def recorded() -> list[dict[str, Any]]:
    """This rank's collectives, oldest first: the last TORCH_FR_BUFFER_SIZE of them."""
    # Private, as all access to the recorder is (torch 2.15). With NCCL, TORCH_FR_DUMP_ON_TIMEOUT=1 writes the same to
    # files by itself, and the command torchfrtrace compares them.
    from torch._C._distributed_c10d import _dump_fr_trace

    return pickle.loads(_dump_fr_trace())["entries"]


def tell_recorded(ranks: Ranks) -> None:
    """Print this rank's collectives, from the recorder."""
    for entry in recorded():
        caller = next(frame for frame in entry["frames"] if "/torch/" not in frame["filename"])
        place = f"{os.path.basename(caller['filename'])}:{caller['line']} in {caller['name']}"
        number, name, sizes = entry["collective_seq_id"], entry["profiling_name"], entry["input_sizes"]
        say(ranks.rank, f"collective {number}: {name} of {sizes}, called at {place}")


def tell_stack(rank: int, pid: int) -> None:
    """Print the Python stack of another process on this host, by py-spy."""
    dumped = subprocess.run(["py-spy", "dump", "--pid", str(pid)], capture_output=True, text=True, timeout=10)
    for line in (dumped.stdout + dumped.stderr).splitlines():
        sys.stdout.write(f"py-spy, rank {rank}: {line.strip()}\n")
    sys.stdout.flush()


@record
def main(config: MissingConfig) -> None:
    if config.tool == "flight_recorder" and not os.environ.get("TORCH_FR_BUFFER_SIZE", "0").strip("0"):
        fail("the flight recorder is off: TORCH_FR_BUFFER_SIZE is not set or 0; set it to 2000 before the start")
    if config.tool == "py_spy" and not shutil.which("py-spy"):
        fail("found no command py-spy; expected it in PATH; install it with pip install py-spy")
    ranks = join("cpu", timeout_s=60)
    if ranks.world_size < 2:
        fail("one process misses nobody; start several with torchrun --nproc-per-node=2")
    gradients, group = torch.ones(1000), impatient_group(PATIENCE_S)
    dist.all_reduce(gradients, group=group)  # all come to this one
    pids = ranks.all_gather(os.getpid())

    if ranks.rank == ranks.world_size - 1:
        if config.tool == "flight_recorder":
            time.sleep(1)
            tell_recorded(ranks)
        evaluate_alone()
        return
    if config.tool == "py_spy":
        # Asynchronous, so that this rank can look around while it waits.
        work = dist.all_reduce(gradients, group=group, async_op=True)
        time.sleep(0.5)
        if ranks.is_main:
            tell_stack(ranks.world_size - 1, pids[-1])
        attempt(ranks.rank, work.wait)
    elif config.tool == "monitored_barrier":
        attempt(ranks.rank, monitored_barrier)
    elif config.tool == "flight_recorder":
        try:
            dist.all_reduce(gradients, group=group)
        except RuntimeError:
            tell_recorded(ranks)
            attempt(ranks.rank, lambda: dist.all_reduce(gradients, group=group))
    else:
        attempt(ranks.rank, lambda: dist.all_reduce(gradients, group=group))


if __name__ == "__main__":
    main(parse(MissingConfig))
