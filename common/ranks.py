"""Who am I, and which device is mine? Joining and leaving the process group under every launcher.

`common.launching.launch` reads what the launcher says; `join` starts the process group; `Ranks.leave` ends it.
"""

import atexit
import datetime
import gc
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# torch.optim imports this module, and its default arguments (`group=group.WORLD`) capture the process group that exists
# then. Import it before the group exists, or the group outlives `leave`, and a finished process sometimes aborts
# ("terminate called without an active exception") when Python takes the group's threads away.
import torch.distributed.nn
from tqdm import tqdm

from common.launching import lost_ranks, network, same_start
from common.launching.launch import LaunchInfo, allocated_gpus, fail, read_environment, unused_gpus


@dataclass(frozen=True)
class Ranks:
    """This process among the others, and its device. Made by `join` or `single_process`."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on rank 0, which prints and writes for all."""
        return self.rank == 0

    @property
    def device_ids(self) -> list[int] | None:
        """What DistributedDataParallel wants as `device_ids`: one GPU, or None on the CPU."""
        return [self.device.index] if self.device.type == "cuda" else None

    def print(self, line: str) -> None:
        """Print a line on rank 0, above a progress bar."""
        if self.is_main:
            tqdm.write(line)
            sys.stdout.flush()  # a pipe holds it back otherwise

    def barrier(self) -> None:
        """Wait for all ranks; nothing to wait for without a process group."""
        if dist.is_initialized():
            dist.barrier(device_ids=self.device_ids)

    def broadcast(self, value: Any) -> Any:
        """Give every rank the picklable `value` of rank 0."""
        values = [value]
        if dist.is_initialized():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's picklable value, by rank, on all ranks."""
        values = [value] * self.world_size
        if dist.is_initialized():
            dist.all_gather_object(values, value)
        return values

    def fail_together(self, problem: str | None) -> None:
        """End all ranks if any has a problem, with the first one's words: no rank is left waiting for another."""
        if problems := [each for each in self.all_gather(problem) if each]:
            fail(problems[0])

    def meet(self, compare: bool = True) -> None:
        """Learn which processes the ranks are, and refuse ranks that were started differently. `join` calls it; call
        it yourself if a framework creates the process group."""
        lost_ranks.speak_for_backend(self.all_gather(lost_ranks.this_process()))
        if compare:
            self.compare_start(same_start.at_start(self.device))

    def compare_start(self, facts: same_start.Facts) -> None:
        """End all ranks, with a line about the first difference, unless all have the same facts."""
        if problem := same_start.difference(self, facts):
            fail(problem)

    def first_or_fail(self, function: Callable[[], Any]) -> Any:
        """Call `function` on rank 0 alone, and give every rank what it returns; a ValueError or OSError there
        ends every rank."""
        value, problem = None, None
        if self.is_main:
            try:
                value = function()
            except (ValueError, OSError) as error:
                problem = str(error)
        value, problem = self.broadcast((value, problem))
        if problem:
            fail(problem)
        return value

    def leave(self) -> None:
        """Wait for all ranks, then destroy the process group.

        Without the barrier a rank may take its sockets away while another still uses them, and a finished
        job ends in an abort now and then.
        """
        if dist.is_initialized():
            self.barrier()
            dist.destroy_process_group()


def choose_device(wanted: str, launch: LaunchInfo) -> torch.device:
    """Choose this rank's device: `cuda:local_rank`, or `cuda:0` where the launcher shows each task one GPU, or the CPU.
    With NCCL_MULTI_RANK_GPU_ENABLE=1 ranks share GPUs: NCCL 2.30 and newer allow it when that variable is set.

    Args:
        wanted: "auto", "cpu" or "cuda". Under "auto" the variable DEVICE, set by a cluster profile, decides first;
            otherwise CUDA where there is any.

    Raises:
        SystemExit: (exit code 2) there is no GPU for this rank, or there are GPUs that CUDA cannot use. A silent
            fall-back to the CPU would hide the fault.
    """
    if wanted == "auto":
        wanted = os.environ.get("DEVICE") or "auto"
    if wanted not in ("auto", "cpu", "cuda"):
        fail(f"device {wanted!r} is none of auto, cpu, cuda")
    if wanted == "cpu":
        return torch.device("cpu")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == 0:
        if allocated := allocated_gpus(os.environ):
            shown = " ".join(f"{name}={value}" for name, value in allocated.items())
            fail(
                f"GPUs are allocated ({shown}) but CUDA finds none; check the driver with nvidia-smi, or set DEVICE=cpu"
            )
        if wanted == "cuda":
            fail("device=cuda was asked for but CUDA finds no GPU; check nvidia-smi, or use --device cpu")
        if idle := unused_gpus(os.environ):
            fail(
                f"the driver shows {idle} GPU(s) but CUDA finds none: a driver too old for CUDA {torch.version.cuda} "
                "or a container without its GPUs; run make doctor, or set DEVICE=cpu to compute on the CPU"
            )
        return torch.device("cpu")
    if launch.local_rank < gpus or os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE", "0") != "0":
        index = launch.local_rank % gpus
    elif gpus == 1 and launch.launcher != "torchrun":
        index = 0  # --gpus-per-task and its like: every task sees its own GPU as number 0
    else:
        fail(
            f"local rank {launch.local_rank} has no GPU: {launch.local_world_size} processes, {gpus} visible GPU(s) on "
            f"this node; start one process per GPU, or set DEVICE=cpu, or let ranks share a GPU: "
            f"NCCL_MULTI_RANK_GPU_ENABLE=1, with NCCL 2.30 or newer"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def single_process(device: str = "auto") -> Ranks:
    """The only rank of a script that is not distributed; no process group.

    Raises:
        SystemExit: (exit code 2) a launcher started several processes: each would train the same model in vain.
    """
    launch = read_environment()
    if launch.world_size > 1:
        fail(
            f"{sys.argv[0]} is a script for one process, but {launch.launcher} started {launch.world_size}; start it "
            f"with plain python, or use ddp/train.py"
        )
    return Ranks(0, 1, 0, 1, launch.launcher, choose_device(device, launch))


def prepare_process_group(timeout_s: float) -> None:
    """Prepare the process for a process group. `join` calls it; call it yourself if a framework creates the group.

    Args:
        timeout_s: of the groups that are made later without a timeout, a mesh's for example.

    Raises:
        SystemExit: (exit code 2) torchrun has restarted the ranks, and they would not find each other.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        fail(
            f"torchrun has restarted the ranks (restart {restarts}), and its store still has the addresses of the dead "
            f"ones, which Gloo would try; export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun --max-restarts"
        )
    lost_ranks.limit_groups(timeout_s)
    # A wrapped model and its hooks refer to each other and to the process group, whose threads must end before Python
    # does: collect such reference cycles while it is still whole.
    atexit.unregister(gc.collect)  # once is enough, however often a process joins
    atexit.register(gc.collect)


def why_not_joined(launch: LaunchInfo, error: str, timeout_s: float) -> str:
    """Return the line for the `error` of a process group that did not start."""
    where, rank = f"{launch.master_addr}:{launch.master_port}", f"rank {launch.rank} of {launch.world_size}"
    if "EADDRINUSE" in error or "address already in use" in error.lower():
        return f"port {where} is in use by another program; set MASTER_PORT to a free one for all ranks"
    if "last error" in error.lower():  # NCCL's own, which names the cause in a later line
        cause = error.split("Exception raised from")[0].strip()
        return f"{rank}: NCCL could not start: {cause}; check nvidia-smi on this node; NCCL_DEBUG=INFO says more"
    return (
        f"{rank} could not join the others at {where} within {timeout_s:g} s: {error.splitlines()[0].rstrip('.')}; "
        "check that all ranks were started and that this host and port are reachable"
    )


def join(
    device: str = "auto", timeout_s: float = 600.0, network_profile: str = "default", compare: bool = True
) -> Ranks:
    """Join the process group with all other ranks: NCCL for tensors on GPUs, Gloo for tensors on the CPU.

    Args:
        device: "auto", "cpu" or "cuda"; see `choose_device`.
        timeout_s: seconds after which a collective that a rank did not enter becomes an error.
        network_profile: which variables `common.launching.network` sets, unless the user did, before the group exists.
        compare: refuse ranks that were started differently.

    Raises:
        SystemExit: (exit code 2) half-set environment, no device, port in use, a rank that never came, ranks that
            were started differently.
    """
    launch = read_environment()
    prepare_process_group(timeout_s)
    try:
        network.apply(network_profile)
    except ValueError as error:
        fail(str(error))
    chosen = choose_device(device, launch)
    timeout = datetime.timedelta(seconds=timeout_s)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    device_id = chosen if chosen.type == "cuda" else None
    try:
        if launch.launcher == "python":  # one process needs neither port nor host
            dist.init_process_group(
                backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout, device_id=device_id
            )
        else:
            os.environ.update(
                RANK=str(launch.rank),
                WORLD_SIZE=str(launch.world_size),
                LOCAL_RANK=str(launch.local_rank),
                LOCAL_WORLD_SIZE=str(launch.local_world_size),
                MASTER_ADDR=launch.master_addr,
                MASTER_PORT=str(launch.master_port),
            )
            dist.init_process_group(backend, timeout=timeout, device_id=device_id)
    except RuntimeError as error:  # torch.distributed's own errors among them
        fail(why_not_joined(launch, str(error), timeout_s))
    ranks = Ranks(launch.rank, launch.world_size, launch.local_rank, launch.local_world_size, launch.launcher, chosen)
    ranks.meet(compare)
    return ranks
