"""How fast are the collectives here? Latency and bandwidth by message size, each result checked before it is timed.

    torchrun --nproc-per-node=2 collectives/bandwidth.py                        # a laptop: Gloo, about 15 seconds
    torchrun --nproc-per-node=8 collectives/bandwidth.py --sizes 1M,64M,1G --json nccl.json --plot nccl.png
    srun --ntasks-per-node=8 python collectives/bandwidth.py --within_nodes true    # across nodes, and inside each
    torchrun --nproc-per-node=8 collectives/bandwidth.py --collective all_reduce --minimum_gbytes_per_second 200

The last one is a gate to stand before a long training: all ranks end with exit code 3 when the fabric is slower than
that (and torchrun, as after any failure, with 1). In a Slurm job call slurm/bandwidth_gate.sh.

Times and bandwidths are those of nccl-tests (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md), so
that numbers can be compared. S is the size of the message: what a rank holds before (reduce-scatter, all-to-all), after
(all-gather), or both; n is the number of ranks, and GB are 10^9 bytes.

    time                   of one operation on the slowest rank, for many that follow one another without a pause
    algorithm bandwidth    S / time
    bus bandwidth          S / time × a factor: the traffic that each rank's link carries at least, whatever n is, so
                           that it can be held against what the hardware promises

At small sizes the time is the latency, and the bandwidth says nothing; at large ones it is the other way round. On one
machine without GPUs the ranks send by copying memory, so memory-copy bandwidth is measured beside: no transport through
shared memory can be faster.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from bandwidth_measure import measure, memory_copy, spans
from bandwidth_output import HEADER, check_outputs, line, plot
from bandwidth_settings import BandwidthConfig
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

from common.config import parse
from common.ranks import Ranks, fail, join

TOO_SLOW = 3  # exit code of the gate


def find_hosts(ranks: Ranks) -> dict[str, list[int]]:
    """The ranks on each host, in the order of their first ranks."""
    hosts: dict[str, list[int]] = {}
    for rank, host in enumerate(ranks.all_gather(socket.gethostname())):
        hosts.setdefault(host, []).append(rank)
    return hosts


def interface(backend: str) -> str:
    """The network interface between hosts: what the user set, or what the backend takes by itself."""
    variable = f"{backend.upper()}_SOCKET_IFNAME"
    if os.environ.get(variable):
        return f"{variable}={os.environ[variable]}"
    if backend == "nccl":
        return "chosen by NCCL"
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return "loopback, because the host name has no address"
    names = [n for n, have in psutil.net_if_addrs().items() if any(a.address == address for a in have)]
    return f"{', '.join(names) or address}, by the host name's address"


def make_groups(hosts: dict[str, list[int]], config: BandwidthConfig, ranks: Ranks) -> dict[str, dist.ProcessGroup]:
    """The groups to measure by their names: all ranks, and with `within_nodes` this host's.

    Raises:
        SystemExit: (exit code 2) hosts with one rank, or with different numbers of ranks.
    """
    groups = {"all ranks": dist.group.WORLD}
    if config.within_nodes and len(hosts) == 1 and ranks.is_main:
        print("note: all ranks are on one host, so within_nodes would measure the same again")
    if config.within_nodes and len(hosts) > 1:
        counts = {len(members) for members in hosts.values()}
        if len(counts) > 1 or counts == {1}:
            found = ", ".join(str(len(members)) for members in hosts.values())
            fail(f"within_nodes compares hosts with equally many ranks, two or more; found {found}; launch them so")
        groups["within nodes"], _ = dist.new_subgroups_by_enumeration(list(hosts.values()))
    return groups


@record
def main(config: BandwidthConfig) -> None:
    ranks = join(config.device, network_profile=config.network_profile)
    if ranks.world_size < 2:
        fail("one process has nobody to send to; start several with torchrun --nproc-per-node=2")
    check_outputs(ranks, json=config.json, plot=config.plot)
    backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    hosts = find_hosts(ranks)
    groups = make_groups(hosts, config, ranks)
    sizes = config.bytes_by_device(ranks.device.type)
    result: dict[str, Any] = {
        "benchmark": "bandwidth",
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "torch": torch.__version__,
        "backend": backend,
        "device": torch.cuda.get_device_name(ranks.device) if backend == "nccl" else "CPU",
        "cores_per_host": os.cpu_count(),
        "launcher": ranks.launcher,
        "dtype": config.dtype,
        "world_size": ranks.world_size,
        "hosts": list(hosts.values()),  # ranks by host; no names, so that the file can be shown to others
        "warmup": config.warmup,
        "repeats": config.repeats,
        "memory_copy": memory_copy(ranks),
        "missing": {},
        "rows": [],
    }
    if ranks.is_main:
        places = "; ".join(f"{host}: ranks {spans(members)}" for host, members in hosts.items())
        print(f"{ranks.world_size} ranks under {ranks.launcher}, {backend}, {result['device']}; {places}")
        print(f"between hosts: {interface(backend)}")
        copy = result["memory_copy"]
        print(
            f"memory copy by one thread a rank: {copy['alone_gbytes_per_second']:.2f} GB/s alone, "
            f"{copy['together_gbytes_per_second']:.2f} GB/s each with all ranks at once"
        )
        print(f"{HEADER}   (median of {config.repeats}; GB/s)")

    cases = [(name, group, c, size) for name, group in groups.items() for c in config.collectives for size in sizes]
    bar = tqdm(cases, unit="case", leave=False, disable=None if ranks.is_main else True)
    for name, group, collective, size in bar:
        if collective in result["missing"]:
            continue
        row = measure(collective, size, group, ranks, config)
        if isinstance(row, str):
            result["missing"][collective] = row
            text = f"{collective} is missing on {backend}: {row}"
        else:
            result["rows"].append({"group": name} | row)
            text = line(result["rows"][-1])
        if ranks.is_main:
            bar.write(text)

    if ranks.is_main and config.json:
        Path(config.json).write_text(json.dumps(result, indent=1) + "\n")
    if ranks.is_main and config.plot:
        plot(result, Path(config.plot))
    verdict = gate(result, config, interface(backend))
    if verdict and ranks.is_main:
        print(f"error: {verdict}", file=sys.stderr, flush=True)
    ranks.leave()
    if verdict:
        raise SystemExit(TOO_SLOW)


def gate(result: dict[str, Any], config: BandwidthConfig, interface_used: str) -> str | None:
    """Why the fabric is too slow, in one line; None if it is fast enough, or nobody asked.

    The same on all ranks, because all ranks hold the slowest rank's times.

    Raises:
        SystemExit: (exit code 2) the backend lacks the collective.
    """
    minimum = config.minimum_gbytes_per_second
    if minimum is None:
        return None
    if result["missing"]:
        fail(f"{config.collective} is missing on {result['backend']}; choose another collective for the gate")
    row = [row for row in result["rows"] if row["group"] == "all ranks"][-1]
    if row["bus_gbytes_per_second"] >= minimum:
        return None
    where = f"{result['world_size']} ranks on {len(result['hosts'])} host(s)"
    return (
        f"the fabric is too slow: {row['collective']} of {row['bytes']:,} bytes over {where}: found "
        f"{row['bus_gbytes_per_second']:.3g} GB/s of bus bandwidth, expected at least {minimum:g}; interface: "
        f"{interface_used}; run again with NCCL_DEBUG=INFO to see which transport was taken, and compare "
        f"python slurm/network.py --explain"
    )


if __name__ == "__main__":
    main(parse(BandwidthConfig))
