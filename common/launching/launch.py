"""Who is this process, by the variables that its launcher has set? Knows nothing of torch.

`torchrun`, `srun` with one task a device, `mpirun` (Open MPI), `mpiexec` (MPICH, Intel MPI, Cray PALS: PMI) and plain
`python` all tell a process its rank, each through variables of its own. `read_environment` understands them, and
refuses an environment that is half set, or that says two things.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Local rank and local size by MPICH and Intel MPI; by Cray PALS, with its MPI and without.
PMI_LOCAL = (
    ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
    ("PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
)


def fail(message: str, code: int = 2) -> NoReturn:
    """End this rank with one line on stderr and no traceback; exit code 2 is for a mistake that the user can mend.

    Every rank that finds the mistake prints it, because a launcher stops the others as soon as the first has
    ended. Under torchrun the line also becomes the root cause in torchrun's own report.
    """
    message = " ".join(message.split())
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or os.environ.get("OMPI_COMM_WORLD_RANK")
    line = f"[rank {rank}] error: {message}\n" if rank else f"error: {message}\n"
    print(line, end="", file=sys.stderr, flush=True)  # in one write: the lines of two ranks must not mix
    if code == 2 and (mistake_file := os.environ.get("MISTAKE_FILE")):  # of a Slurm job, which is not restarted then
        with contextlib.suppress(OSError):
            open(mistake_file, "w").close()
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(error_file, "w") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)
    raise SystemExit(code)


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


def allocated_gpus(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that name GPUs given to this process. -1 hides all, and so does Slurm's NoDevFiles."""
    names = {name: environment.get(name, "").strip() for name in ("SLURM_JOB_GPUS", "CUDA_VISIBLE_DEVICES")}
    return {name: value for name, value in names.items() if re.match(r"\d|GPU-|MIG-", value)}


def unused_gpus(environment: Mapping[str, str], driver: Path = Path("/proc/driver/nvidia/gpus")) -> int:
    """Return how many GPUs the NVIDIA driver shows, 0 where they may be another's: in a Slurm job, or hidden by
    CUDA_VISIBLE_DEVICES."""
    hidden = {"CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID"} & environment.keys()
    return 0 if hidden or not driver.is_dir() else len(list(driver.iterdir()))


def _require(environment: Mapping[str, str], names: tuple[str, ...], launcher: str) -> list[str]:
    missing = [name for name in names if not environment.get(name)]
    if missing:
        have = ", ".join(f"{n}={environment[n]}" for n in names if environment.get(n)) or "nothing"
        empty = "".join(f" ({name} is empty)" for name in missing if name in environment)
        fail(
            f"half-set {launcher} environment: found {have}, missing {', '.join(missing)}{empty}; start with torchrun, "
            f"srun or mpirun, or unset these variables to run one process"
        )
    return [environment[name] for name in names]


def whole_number(environment: Mapping[str, str], name: str, launcher: str, least: int = 0) -> int:
    """Return the value of a launcher's variable.

    Raises:
        SystemExit: (exit code 2) it is no whole number from `least` on.
    """
    value = environment.get(name, "")
    if not re.fullmatch("[0-9]{1,9}", value) or int(value) < least:
        fail(
            f"{name}={value!r} in the environment is not a whole number from {least} on; the launcher ({launcher}) "
            f"should set it: unset it, and start with torchrun, srun or mpirun"
        )
    return int(value)


def _port(environment: Mapping[str, str], job: str) -> int:
    """MASTER_PORT; without it, a port that all ranks of one job compute alike and two jobs on one node hardly share."""
    value = environment.get("MASTER_PORT", "")
    if not value:
        return 20000 + zlib.crc32(job.encode()) % 12000  # below 32768, where Linux starts to hand out its own
    if not (re.fullmatch("[0-9]{1,5}", value) and 0 < int(value) < 65536):
        fail(
            f"MASTER_PORT={value!r} is not a port number; expected 1 to 65535 (Kubernetes sets tcp://… where a "
            f"service is called master): set it to a free port for all ranks, or unset it and use torchrun or srun"
        )
    return int(value)


def _address(environment: Mapping[str, str], otherwise: str) -> str:
    value = environment.get("MASTER_ADDR", "") or otherwise
    if not re.fullmatch(r"[\w.-]+|[\[\]\w.]*:[\[\]\w.]*:[\[\]\w.:%-]*", value):  # a name, an IPv4 or an IPv6 address
        fail(
            f"MASTER_ADDR={value!r} is not a host name or an address; set it to the first node's name, for all ranks, "
            f"and the port by MASTER_PORT"
        )
    return value


def _tasks_here(env: Mapping[str, str], tasks: int) -> int:
    """How many tasks of a Slurm step are on this node, from a list such as `2(x3),1` and the node's number."""
    per_node, name = env.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)), "SLURM_STEP_TASKS_PER_NODE"
    node = whole_number(env, "SLURM_NODEID", "srun") if "SLURM_NODEID" in env else 0
    nodes = 0
    for part in per_node.split(","):
        found = re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", part)
        if found is None:
            fail(f"{name}={per_node!r} in the environment is no list such as 2(x3),1; srun should set it: unset it")
        nodes += int(found[2] or 1)
        if node < nodes:
            return int(found[1])
    fail(f"SLURM_NODEID={node}, but {name}={per_node!r} has {nodes} node(s); srun should set both: unset them")


def _first_host(nodelist: str) -> str:
    """The first host of a Slurm node list such as `gpu[03-05,9],login1`."""
    if scontrol := shutil.which("scontrol"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = [scontrol, "show", "hostnames", nodelist]
            hosts = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30)
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

    Looked for in this order: torchrun (RANK …), an `srun` step (SLURM_STEP_NUM_TASKS …), Open MPI, PMI (MPICH, Intel
    MPI, Cray PALS), and nothing at all, which is one process. Slurm is read from the *step*: inside `salloc` or an
    sbatch file, plain `python` is one process although the job has many tasks.

    Raises:
        SystemExit: (exit code 2) the environment is half set, contradicts itself, or has a value that is no number.
    """
    env = os.environ if environment is None else environment
    # In a Slurm job MPI starts its helpers on the other nodes by srun, whose step its ranks there inherit. MPI's
    # variables of a single process in a step of several tasks were left in the shell from which the job was submitted.
    of_mpi = "OMPI_COMM_WORLD_RANK" in env and env.get("OMPI_COMM_WORLD_SIZE") != "1"
    of_mpi = of_mpi or ({"PMI_RANK", "MPI_LOCALRANKID"} <= env.keys() and env.get("PMI_SIZE") != "1")
    in_step = env.get("SLURM_STEP_NUM_TASKS", "1") != "1" and "SLURM_PROCID" in env and not of_mpi
    by_torchrun = {name for name in TORCHRUN[:3] if name in env}
    if in_step:  # complete by itself: a variable of torchrun's that was left in the shell says nothing
        by_torchrun &= {"RANK"} if all(env.get(name) for name in TORCHRUN) else set()
    elif env.get("WORLD_SIZE") == "1" and not all(env.get(name) for name in TORCHRUN):
        by_torchrun = {name for name in ("RANK", "LOCAL_RANK") if env.get(name, "0") != "0"}  # WORLD_SIZE=1: no ranks

    if by_torchrun:
        _require(env, TORCHRUN, "torchrun")
        local_size = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "WORLD_SIZE"
        return _launch("torchrun", env, (*TORCHRUN[:3], local_size))
    if in_step:
        needed = ("SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        nodelist, job, *_ = _require(env, needed, "srun")
        size = whole_number(env, "SLURM_STEP_NUM_TASKS", "srun", 1)
        here = _tasks_here(env, size)
        if env.get("WORLD_SIZE") and whole_number(env, "WORLD_SIZE", "srun", 1) != size:
            fail(
                f"WORLD_SIZE={env['WORLD_SIZE']} but this srun step has {size} tasks (SLURM_STEP_NUM_TASKS); "
                f"do not export WORLD_SIZE"
            )
        host = "localhost" if here == size else _first_host(nodelist)
        # The list of all nodes' tasks stands for this node's part of it.
        mine = {**env, "SLURM_STEP_TASKS_PER_NODE": str(here)}
        step = f"{job}.{env.get('SLURM_STEP_ID', '0')}"
        return _launch("srun", mine, (*needed[2:], "SLURM_STEP_TASKS_PER_NODE"), host, step)
    if "OMPI_COMM_WORLD_RANK" in env or "OMPI_COMM_WORLD_SIZE" in env:
        names = tuple(f"OMPI_COMM_WORLD_{what}" for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
        job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid") or str(os.getppid())
        return _mpi_launch("mpirun", env, names, job)
    if "PMI_RANK" in env or "PMI_SIZE" in env:
        local = next((names for names in PMI_LOCAL if env.keys() & {*names}), ())
        if env.get("PMI_SIZE") == "1" and env.get("PMI_RANK", "0") == "0" and not local:
            return LaunchInfo(0, 1, 0, 1, "python")  # srun --ntasks=1 --mpi=pmi2 sets no more
        return _mpi_launch("mpiexec", env, ("PMI_RANK", "PMI_SIZE", *(local or PMI_LOCAL[0])), str(os.getppid()))
    return LaunchInfo(0, 1, 0, 1, "python")


def _launch(launcher: str, env: Mapping[str, str], names: tuple[str, ...], host: str = "", job: str = "") -> LaunchInfo:
    """Read rank, world size, local rank and local size from variables of these names; refuse contradictions."""
    values = [whole_number(env, name, launcher, least) for name, least in zip(names, (0, 1, 0, 1), strict=True)]
    rank, size, local_rank, local_size = values
    if not (rank < size and local_rank < local_size <= size):
        shown = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
        fail(
            f"the {launcher} environment contradicts itself: rank {rank} of {size}, local rank {local_rank} of "
            f"{local_size} ({shown}); each rank must be below its size: let {launcher} set them, and export none"
        )
    return LaunchInfo(rank, size, local_rank, local_size, launcher, _address(env, host), _port(env, job))


def _mpi_launch(launcher: str, env: Mapping[str, str], names: tuple[str, ...], job: str) -> LaunchInfo:
    _require(env, names, launcher)
    launch = _launch(launcher, env, names, "localhost", job)
    address, port = env.get("MASTER_ADDR", ""), env.get("MASTER_PORT", "")
    if launch.local_world_size != launch.world_size and not (address and port):
        fail(
            f"{launcher} started ranks on several nodes, and MPI does not tell them where rank 0 listens: found "
            f"MASTER_ADDR={address!r} and MASTER_PORT={port!r}; export both to all ranks (mpirun -x MASTER_ADDR …)"
        )
    return launch
