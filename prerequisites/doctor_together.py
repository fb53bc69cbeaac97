"""Ranks that a launcher has started examine themselves, and compare what they found."""

from __future__ import annotations  # so that an old Python gets as far as being told that it is too old

import argparse
import contextlib
import datetime
import io
import os
import platform
import re
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from doctor_checks import checks_of_host, checks_of_rank, examine
from doctor_folders import existing
from doctor_limits import affinity, cores
from doctor_network import route, source_address
from doctor_output import finish
from doctor_packages import MODULES, installed
from doctor_results import GIB, ROOT, Result, ok, output, problem, read

COMPARED = ("NCCL_", "GLOO_", "TORCH_", "CUDA_", "OMP_")  # variables that ranks should agree on
GATHER_MINUTES = 15  # the slowest node's file system decides how long the others wait


def facts(environment: dict[str, str]) -> dict[str, str]:
    """What all ranks should have alike, by name. `environment`: as the launcher left it. Imports torch."""
    import torch

    found = {name: installed(name) or "missing" for name in MODULES}
    found |= {"torch": torch.__version__, "CUDA of torch": str(torch.version.cuda)}
    found |= {"Python": platform.python_version(), "environment": sys.prefix, "kernel": platform.release()}
    found |= {"architecture": platform.machine(), "cores": str(cores()[0])}
    code, commit = output(["git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD"])
    found["commit"] = "unknown" if code else commit
    with contextlib.suppress(ImportError):
        import psutil

        found["memory, GiB"] = f"{psutil.virtual_memory().total / GIB:.0f}"
    if about := read(Path("/proc/driver/nvidia/version")):
        found["driver"] = (re.search(r"\s(\d+\.[\d.]+)\s", about) or ["", "unknown"])[1]
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["GPUs"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    variables = {name: value for name, value in environment.items() if name.startswith(COMPARED) or name == "DEVICE"}
    return found | variables


def all_reduce(rank: int, size: int, device: str, group=None) -> Result:
    """Sum one million numbers over the ranks, twice, and compare with the sum that arithmetic gives."""
    import torch
    import torch.distributed as dist

    name = f"all-reduce, {'NCCL' if device.startswith('cuda') else 'Gloo'}"
    places = torch.arange(2**20, dtype=torch.int64, device=device)
    expected = places * size + size * (size - 1) // 2  # rank r gives places + r
    for _ in range(2):  # the first also opens the connections
        start = time.perf_counter()
        values = places + rank
        dist.all_reduce(values, group=group)
        wrong = int((values != expected).sum())  # on a GPU this waits for the sum
        seconds = time.perf_counter() - start
    if wrong:
        found = f"{wrong:,} of {len(values):,} sums are wrong on rank {rank}"
        return problem(name, found, "trust no training here: examine network, driver and memory")
    if rank:
        return ok(name, "")  # rank 0 speaks for those that agree
    return ok(name, f"{size} ranks summed 8 MiB exactly, in {seconds * 1e3:.1f} ms")


def device_of_rank(ranks, place) -> tuple[str, list[Result]]:
    """("cuda:0", "cpu" or "", results): the device that the lessons would choose, by the lessons' own rules."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            device = str(ranks.choose_device("auto", place))
    except SystemExit:
        found, _, advice = said.getvalue().strip().partition("error: ")[2].rpartition("; ")
        return "", [problem("device", found, advice)]
    return device, [ok("device", device)]


def meet(me, hosts: list[str], master: str) -> list[Result]:
    """Every pair of hosts connects, first rank to first rank. All ranks call it; `master`: where rank 0 listens."""
    here, first = hosts[me.rank], hosts.index(hosts[me.rank]) == me.rank
    results = []
    with socket.create_server(("", 0), backlog=len(hosts)) as listener:
        mine = None
        if first:
            try:
                mine = (source_address(master), listener.getsockname()[1])
            except OSError as error:
                advice = "look at the line on network; MASTER_ADDR must be an address that all nodes reach"
                results.append(problem("routes", f"{here} has no route to {master}: {error.strerror or error}", advice))
        addresses = {host: there for host, there in zip(hosts, me.all_gather(mine), strict=True) if there}
        others = [(*there, host, here) for host, there in addresses.items() if host != here] if first else []
        with ThreadPoolExecutor(32) as pool:  # else a few silent hosts would use up the time that the others wait
            results += pool.map(lambda other: route(*other), others)
        me.barrier()  # all have called before anyone stops listening
    return results


def shared_folder(me, hosts: list[str], runs: Path) -> list[Result]:
    """Is the run folder the same one on all hosts? Rank 0 puts a file there, the others look for it."""
    mark = ""
    if me.is_main:
        place = existing(runs)
        mark = str(place / f".doctor-{os.getpid()}-{time.time_ns()}")
        with contextlib.suppress(OSError):  # the check of the folder says why
            Path(mark).touch()
    mark = me.broadcast(mark)
    deadline = time.monotonic() + 10  # network file systems remember for seconds what was not there
    while not (seen := os.path.exists(mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    blind = sorted({host for host, sees in zip(hosts, me.all_gather(seen), strict=True) if not sees})
    if me.is_main:
        Path(mark).unlink(missing_ok=True)
        if blind:
            found = f"what rank 0 writes to {Path(mark).parent} is not seen on {', '.join(blind)}"
            return [problem("shared folder", found, "put runs (RUNS_DIR) on a file system that all nodes mount")]
        return [ok("shared folder", f"{Path(mark).parent} is the same on all {len(set(hosts))} hosts")]
    return []


def together(options: argparse.Namespace, ranks) -> int:
    """All ranks of a launcher examine themselves; rank 0 prints. Returns the exit code, equal on all ranks."""
    import torch.distributed as dist

    environment, place = dict(os.environ), ranks.read_environment()
    me = ranks.join("cpu", options.timeout, compare=False)  # differences are shown below, all of them
    os.environ["LOCAL_WORLD_SIZE"] = str(me.local_world_size)  # only torchrun says it
    try:
        patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=GATHER_MINUTES))
        hosts = me.all_gather(socket.gethostname())
        results = [all_reduce(me.rank, me.world_size, "cpu")]
        if len(set(hosts)) > 1:
            results += meet(me, hosts, os.environ["MASTER_ADDR"]) + shared_folder(me, hosts, options.runs)
        device, found = device_of_rank(ranks, place)
        my_cores = (hosts[me.rank], affinity())  # srun may give each task cores of its own
        results += found + examine(checks_of_rank(me.all_gather(my_cores).count(my_cores)))
        if hosts.index(hosts[me.rank]) == me.rank:
            results += examine(checks_of_host(options))
        reports: list = [None] * me.world_size
        dist.all_gather_object(reports, (results, facts(environment), device), group=patient)
        if all(device.startswith("cuda") for _, _, device in reports):
            reports = over_nccl(me, device, options, hosts, reports, patient)
        code = finish(options, me, hosts, reports)
        me.leave()
    except RuntimeError as error:
        ranks.fail(f"rank {me.rank} lost the others: {str(error).splitlines()[0]}; see what the other ranks say")
    return code


def over_nccl(me, device: str, options: argparse.Namespace, hosts: list[str], reports: list, group) -> list:
    """The reports, with the all-reduce between GPUs. Where NCCL hangs, rank 0 prints what is known, and all end."""
    import torch.distributed as dist

    name = "all-reduce, NCCL"

    def give_up(found: str) -> None:
        late = problem(name, found, "NCCL_DEBUG=INFO shows where it waits; python slurm/network.py --explain")
        finish(options, me, hosts, [(old + [late], *rest) for old, *rest in reports])
        sys.stdout.flush()
        os._exit(1)  # this may be a thread, while the main one hangs in NCCL

    timer = threading.Timer(options.timeout, give_up, [f"no answer within {options.timeout:g} s"])
    timer.start()
    try:
        nccl = dist.new_group(backend="nccl", timeout=datetime.timedelta(minutes=GATHER_MINUTES))
        mine = all_reduce(me.rank, me.world_size, device, nccl)
    except (RuntimeError, ValueError) as error:
        mine = problem(name, str(error).splitlines()[0], "run again with NCCL_DEBUG=INFO")
    timer.cancel()
    every: list = [None] * me.world_size
    try:
        dist.all_gather_object(every, mine, group=group)
    except RuntimeError:
        give_up("another rank gave it up")
    return [(old + [new], *rest) for (old, *rest), new in zip(reports, every, strict=True)]
