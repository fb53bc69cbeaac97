"""Memory, cores and limits of this machine, as its cgroup grants them."""

from __future__ import annotations  # so that an old Python gets as far as being told that it is too old

import os
import resource
import shutil
from pathlib import Path

from doctor_results import GIB, Result, count, ok, problem, read, size, warning


def check_shared_memory(path: str = "/dev/shm") -> list[Result]:
    """Data loader workers and NCCL pass data through it; containers get 64 MB. NCCL's guide asks for 1 GB:
    https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting.html
    """
    if not os.path.isdir(path):
        return [ok("shared memory", f"{path} is not used on this system")]
    usage = shutil.disk_usage(path)
    found = f"{path} {usage.total / GIB:.1f} GiB, {usage.free / GIB:.1f} GiB free"
    if usage.free < 10**9:
        return [warning("shared memory", found, "docker run --ipc=host, or --shm-size=8g; remove files left there")]
    return [ok("shared memory", found)]


def check_limits() -> list[Result]:
    """What `ulimit` allows, as far as ranks need it."""

    def soft(name: str) -> float:
        value = resource.getrlimit(getattr(resource, name))[0] if hasattr(resource, name) else resource.RLIM_INFINITY
        return float("inf") if value == resource.RLIM_INFINITY else value

    files, processes, locked, stack = map(soft, ("RLIMIT_NOFILE", "RLIMIT_NPROC", "RLIMIT_MEMLOCK", "RLIMIT_STACK"))
    shown = f"files {files:g}, processes {processes:g}, locked memory {size(locked)}, stack {size(stack)}"
    low = []
    if files < 4096:
        low.append("ulimit -n 65536 (files: sockets of all ranks, tensors of data loader workers)")
    if processes < 4096:
        low.append("ulimit -u unlimited (processes: threads count too)")
    if locked < GIB and any(Path("/sys/class/infiniband").glob("*")):
        low.append("ulimit -l unlimited (locked memory: InfiniBand registers its buffers)")
    if GIB <= stack < float("inf"):
        low.append("ulimit -s 8192 (stack: every thread reserves as much)")
    return [warning("limits", shown, "; ".join(low))] if low else [ok("limits", shown)]


def cgroup_value(controller: str, file_v1: str, file_v2: str) -> list[str]:
    """What this process's cgroup and those above it set, version 1 or 2; nothing where there is no such file."""
    values = []
    for line in read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, name = Path("/sys/fs/cgroup"), file_v2
        elif controller in controllers.split(","):
            base, name = Path("/sys/fs/cgroup") / controllers, file_v1
        else:
            continue
        folder = base / path.strip("/")
        for place in (folder, *folder.parents):  # a limit holds for all that is below
            values += filter(None, [read(place / name).strip()])
            if place == base:
                break
    return values


def affinity() -> list[int]:
    """The cores on which this process may run."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def cores() -> tuple[int, float]:
    """(how many cores this process may run on, cores' worth of time that its cgroup grants: inf without a limit)."""
    granted = [float("inf")]
    for value in cgroup_value("cpu", "cpu.cfs_quota_us", "cpu.max"):  # "max 100000"; version 1: the quota alone
        quota, _, period = value.partition(" ")
        if quota.isdigit():
            granted.append(int(quota) / int(period or 100_000))
    return len(affinity()), min(granted)


def check_cores(ranks: int | None = None) -> list[Result]:
    """Cores against ranks × threads: too many threads are slower than too few. `ranks`: how many share these cores."""
    ranks = ranks or count(os.environ.get("LOCAL_WORLD_SIZE")) or 1
    usable, granted = cores()
    limit = f", of which the cgroup grants {granted:g}" if granted < usable else ""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    found = f"{usable} of the machine's {os.cpu_count()} usable{limit}; OMP_NUM_THREADS={threads or '(not set: all)'}"
    if threads and count(threads) < 1:
        return [problem("cores", found, "set it to cores divided by ranks, 1 or more")]
    if ranks > 1:
        found = f"{found}, for each of {ranks} ranks"
    if ranks * (count(threads) or usable) > min(usable, granted) and (threads or ranks > 1):
        each = max(1, int(min(usable, granted) // ranks))
        return [warning("cores", found, f"OMP_NUM_THREADS={each}, or fewer ranks, or more cores (--cpus-per-task)")]
    return [ok("cores", found)]


def check_memory() -> list[Result]:
    """Memory that is free, also as the cgroup sees it."""
    import psutil

    limits = cgroup_value("memory", "memory.limit_in_bytes", "memory.max")
    total = psutil.virtual_memory().total
    limit = min([int(value) for value in limits if value.isdigit()] + [total])
    free = min(psutil.virtual_memory().available, limit)
    found = f"{size(free)} available of {size(total)}" + (f", cgroup limit {size(limit)}" if limit < total else "")
    if free < 2 * GIB * (count(os.environ.get("LOCAL_WORLD_SIZE")) or 1):
        advice = "2 GiB a rank is little: end other programs, start fewer ranks, or ask Slurm for more (--mem)"
        return [warning("memory", found, advice)]
    return [ok("memory", found)]
