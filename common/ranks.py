"""Who am I, and which device is mine? Joining and leaving the process group under every launcher.

`torchrun`, `srun` with one task a device, `mpirun` (Open MPI), `mpiexec` (MPICH, Intel MPI: PMI) and plain
`python` all tell a process its rank, each through variables of its own. `read_environment` understands them,
and refuses an environment that is only half set. `join` starts the process group; `Ranks.leave` ends it.
"""

import atexit
import contextlib
import datetime
import gc
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist

# torch.optim imports this module, and its default arguments (`group=group.WORLD`) capture the process group that exists
# then. Import it before the group exists, or the group outlives `leave`, and a finished process sometimes aborts
# ("terminate called without an active exception") when Python takes the group's threads away.
import torch.distributed.nn
from tqdm import tqdm

from common import network, same_start


def fail(message: str) -> NoReturn:
    """End this rank because of a mistake that the user can mend: one line on stderr, exit code 2, no traceback.

    Every rank that finds the mistake prints it, because a launcher stops the others as soon as the first has
    ended. Under torchrun the line also becomes the root cause in torchrun's own report.
    """
    message = " ".join(message.split())
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or os.environ.get("OMPI_COMM_WORLD_RANK")
    print(f"[rank {rank}] error: {message}" if rank else f"error: {message}", file=sys.stderr, flush=True)
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(error_file, "w") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)
    raise SystemExit(2)


@dataclass(frozen=True)
class LaunchInfo:
    """Rank and world size, globally and on this node, as the launcher set them."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str
    master_addr: str = ""
    master_port: int = 0


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


def _require(environment: Mapping[str, str], names: list[str], launcher: str) -> list[str]:
    missing = [name for name in names if not environment.get(name)]
    if missing:
        have = ", ".join(f"{n}={environment[n]}" for n in names if environment.get(n))
        fail(
            f"half-set {launcher} environment: found {have}, missing {', '.join(missing)}; start with torchrun, srun "
            f"or mpirun, or unset these variables to run one process"
        )
    return [environment[name] for name in names]


def _integers(environment: Mapping[str, str], names: list[str], launcher: str) -> list[int]:
    values = _require(environment, names, launcher)
    for name, value in zip(names, values, strict=True):
        if not value.isdigit():
            fail(f"{name}={value!r} in the environment is not a whole number; the launcher ({launcher}) should set it")
    return [int(value) for value in values]


def _port(key: str) -> int:
    """A port that all ranks of one job compute alike and two jobs on one node hardly ever share."""
    return 20000 + zlib.crc32(key.encode()) % 12000  # below 32768, where Linux starts to hand out its own


def _tasks_here(per_node: str, node: int) -> int:
    """How many tasks of a Slurm step are on its node number `node`, from a list such as `2(x3),1`."""
    counts: list[int] = []
    for count, _, times in (part.partition("(x") for part in per_node.split(",")):
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts[node]


def _first_host(nodelist: str) -> str:
    """The first host of a Slurm node list such as `gpu[03-05,9],login1`."""
    if scontrol := shutil.which("scontrol"):
        hosts = subprocess.run([scontrol, "show", "hostnames", nodelist], capture_output=True, text=True, timeout=30)
        if hosts.returncode == 0 and hosts.stdout.strip():
            return hosts.stdout.split()[0]
    prefix, bracket, rest = nodelist.partition("[")
    if not bracket:
        return nodelist.split(",")[0]
    if "," in prefix:
        return prefix.split(",")[0]
    return prefix + rest.split("]")[0].split(",")[0].split("-")[0]


def read_environment(environment: Mapping[str, str] | None = None) -> LaunchInfo:
    """Find out from the launcher's variables who this process is.

    Looked for in this order: torchrun (RANK …), an `srun` step (SLURM_STEP_NUM_TASKS …), Open MPI, PMI (MPICH and
    Intel MPI), and nothing at all, which is one process. Slurm is read from the *step*: inside `salloc` or an sbatch
    file, plain `python` is one process although the job has many tasks.

    Raises:
        SystemExit: (exit code 2) the environment is half set or contradicts itself.
    """
    env = os.environ if environment is None else environment
    address, port = env.get("MASTER_ADDR", ""), env.get("MASTER_PORT", "")
    if port and not port.isdigit():
        fail(f"MASTER_PORT={port!r} is not a port number")
    # In a Slurm job MPI starts its helpers on the other nodes by srun, whose step its ranks there inherit.
    of_mpi = "OMPI_COMM_WORLD_RANK" in env or {"PMI_RANK", "MPI_LOCALRANKID"} <= env.keys()
    in_step = env.get("SLURM_STEP_NUM_TASKS", "1") != "1" and "SLURM_PROCID" in env and not of_mpi

    if "RANK" in env or "LOCAL_RANK" in env or ("WORLD_SIZE" in env and not in_step):
        names = ["RANK", "WORLD_SIZE", "LOCAL_RANK"]
        _require(env, [*names, "MASTER_ADDR", "MASTER_PORT"], "torchrun")
        rank, size, local_rank = _integers(env, names, "torchrun")
        local_size = _integers(env, ["LOCAL_WORLD_SIZE"], "torchrun")[0] if "LOCAL_WORLD_SIZE" in env else size
        launch = LaunchInfo(rank, size, local_rank, local_size, "torchrun", address, int(port))
    elif in_step:
        names = ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"]
        rank, size, local_rank = _integers(env, names, "srun")
        nodelist, job = _require(env, ["SLURM_STEP_NODELIST", "SLURM_JOB_ID"], "srun")
        local_size = _tasks_here(env.get("SLURM_STEP_TASKS_PER_NODE", str(size)), int(env.get("SLURM_NODEID", "0")))
        address = address or ("localhost" if local_size == size else _first_host(nodelist))
        port = port or str(_port(f"{job}.{env.get('SLURM_STEP_ID', '0')}"))
        if int(env.get("WORLD_SIZE", size)) != size:
            fail(f"WORLD_SIZE={env['WORLD_SIZE']} but this srun step has {size} tasks; do not export WORLD_SIZE")
        launch = LaunchInfo(rank, size, local_rank, local_size, "srun", address, int(port))
    elif "OMPI_COMM_WORLD_RANK" in env or "OMPI_COMM_WORLD_SIZE" in env:
        names = [f"OMPI_COMM_WORLD_{what}" for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
        job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid") or str(os.getppid())
        launch = _mpi_launch("mpirun", env, names, address, port, job)
    elif "PMI_RANK" in env or "PMI_SIZE" in env:
        names = ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"]
        launch = _mpi_launch("mpiexec", env, names, address, port, str(os.getppid()))
    else:
        return LaunchInfo(0, 1, 0, 1, "python")

    if not (launch.rank < launch.world_size and launch.local_rank < launch.local_world_size <= launch.world_size):
        fail(
            f"the {launch.launcher} environment contradicts itself: rank {launch.rank} of {launch.world_size}, "
            f"local rank {launch.local_rank} of {launch.local_world_size}; each rank must be below its size"
        )
    return launch


def _mpi_launch(
    launcher: str, env: Mapping[str, str], names: list[str], address: str, port: str, job: str
) -> LaunchInfo:
    rank, size, local_rank, local_size = _integers(env, names, launcher)
    if local_size != size and not (address and port):
        fail(
            f"{launcher} started ranks on several nodes, and MPI does not tell them where rank 0 listens: found "
            f"MASTER_ADDR={address!r} and MASTER_PORT={port!r}; export both to all ranks (mpirun -x MASTER_ADDR …)"
        )
    return LaunchInfo(rank, size, local_rank, local_size, launcher, address or "localhost", int(port or _port(job)))


def choose_device(wanted: str, launch: LaunchInfo) -> torch.device:
    """Choose this rank's device: `cuda:local_rank`, or `cuda:0` where the launcher shows each task one GPU, or the CPU.

    Args:
        wanted: "auto", "cpu" or "cuda". Under "auto" the variable DEVICE, set by a cluster profile, decides first;
            otherwise CUDA where there is any.

    Raises:
        SystemExit: (exit code 2) there is no GPU for this rank, or GPUs were allocated that CUDA cannot use. A silent
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
        names = ("SLURM_JOB_GPUS", "CUDA_VISIBLE_DEVICES")  # -1 is the usual way to hide all GPUs
        allocated = {name: os.environ[name] for name in names if os.environ.get(name, "") not in ("", "-1")}
        if allocated:
            shown = " ".join(f"{name}={value}" for name, value in allocated.items())
            fail(
                f"GPUs are allocated ({shown}) but CUDA finds none; check the driver with nvidia-smi, or set DEVICE=cpu"
            )
        if wanted == "cuda":
            fail("device=cuda was asked for but CUDA finds no GPU; check nvidia-smi, or use --device cpu")
        return torch.device("cpu")
    if launch.local_rank < gpus:
        index = launch.local_rank
    elif gpus == 1 and launch.launcher != "torchrun":
        index = 0  # --gpus-per-task and its like: every task sees its own GPU as number 0
    else:
        fail(
            f"local rank {launch.local_rank} has no GPU: {launch.local_world_size} processes, {gpus} visible GPU(s) on "
            f"this node; start one process per GPU, or use --device cpu"
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


def prepare_process_group() -> None:
    """Prepare the process for a process group. `join` calls it; call it yourself if a framework creates the group.

    Raises:
        SystemExit: (exit code 2) torchrun has restarted the ranks, and they would not find each other.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        fail(
            f"torchrun has restarted the ranks (restart {restarts}), and its store still has the addresses of the dead "
            f"ones, which Gloo would try; export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun --max-restarts"
        )
    # A wrapped model and its hooks refer to each other and to the process group, whose threads must end before Python
    # does: collect such reference cycles while it is still whole.
    atexit.unregister(gc.collect)  # once is enough, however often a process joins
    atexit.register(gc.collect)


def join(device: str = "auto", timeout_s: float = 600.0, network_profile: str = "default") -> Ranks:
    """Join the process group with all other ranks: NCCL for tensors on GPUs, Gloo for tensors on the CPU.

    Args:
        device: "auto", "cpu" or "cuda"; see `choose_device`.
        timeout_s: seconds after which a collective that a rank did not enter becomes an error.
        network_profile: which variables `common.network` sets, unless the user did, before the group exists.

    Raises:
        SystemExit: (exit code 2) half-set environment, no device, port in use, a rank that never came, ranks that
            were started differently.
    """
    launch = read_environment()
    prepare_process_group()
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
        where, reason = f"{launch.master_addr}:{launch.master_port}", str(error).splitlines()[0].rstrip(".")
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            fail(f"port {where} is in use by another program; set MASTER_PORT to a free one for all ranks")
        fail(
            f"rank {launch.rank} of {launch.world_size} could not join the others at {where} within {timeout_s:g} s: "
            f"{reason}; check that all ranks were started and that this host and port are reachable"
        )
    ranks = Ranks(launch.rank, launch.world_size, launch.local_rank, launch.local_world_size, launch.launcher, chosen)
    ranks.compare_start(same_start.at_start(chosen))
    return ranks
