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

import difflib
import json
import math
import os
import re
import socket
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

from common.config import parse
from common.ranks import Ranks, fail, join

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
BATCH_SECONDS = 0.01  # operations are timed in batches of about so long: one alone may end before a clock can tell
COPY_BYTES = 64 * 2**20  # larger than a core's share of any cache
TOO_SLOW = 3  # exit code of the gate

# Renamed in torch 2.13; the old names, the only ones before that, are meant to go.
all_gather_single = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
reduce_scatter_single = (
    dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
)


# --------------------------------------------------------------------------------------------- the collectives


@dataclass
class Message:
    """One message size on this rank: `send` and `receive`, (n × chunk,) each, and who takes part.

    Collectives that work in place do so in `receive`.
    """

    send: torch.Tensor
    receive: torch.Tensor
    group: dist.ProcessGroup
    rank: int  # within the group, as everywhere below
    n: int

    @property
    def chunk(self) -> int:
        """Elements of each rank's part."""
        return self.send.numel() // self.n

    @property
    def mine(self) -> slice:
        """This rank's part."""
        return slice(self.rank * self.chunk, (self.rank + 1) * self.chunk)


def send_to_next(m: Message) -> None:
    """Around the ring: every rank sends to the next one while it receives from the one before."""
    requests = [
        dist.P2POp(dist.irecv, m.receive, group=m.group, group_peer=(m.rank - 1) % m.n),  # first: ring_all_reduce.py
        dist.P2POp(dist.isend, m.send, group=m.group, group_peer=(m.rank + 1) % m.n),
    ]
    for request in dist.batch_isend_irecv(requests):
        request.wait()


RUN: dict[str, Callable[[Message], Any]] = {
    "all_reduce": lambda m: dist.all_reduce(m.receive, group=m.group),
    "all_gather": lambda m: all_gather_single(m.receive, m.send[m.mine], group=m.group),
    "reduce_scatter": lambda m: reduce_scatter_single(m.receive[m.mine], m.send, group=m.group),
    "all_to_all": lambda m: dist.all_to_all_single(m.receive, m.send, group=m.group),
    "broadcast": lambda m: dist.broadcast(m.receive, group_src=0, group=m.group),
    "reduce": lambda m: dist.reduce(m.receive, group_dst=0, group=m.group),
    "send_recv": send_to_next,
}
REDUCING = ("all_reduce", "reduce_scatter", "reduce")


def bus_factor(collective: str, n: int) -> float:
    """Bus bandwidth / algorithm bandwidth on `n` ranks, by nccl-tests' doc/PERFORMANCE.md."""
    if collective == "all_reduce":
        return 2 * (n - 1) / n  # a reduce-scatter and an all-gather
    if collective in ("all_gather", "reduce_scatter", "all_to_all"):
        return (n - 1) / n  # every rank has its own part already
    return 1.0


def pattern(collective: str, rank: int, like: torch.Tensor) -> torch.Tensor:
    """What `rank` sends, in the shape of `like`: small whole numbers, which every dtype here holds exactly.

    A sum of as many as 128 ranks stays exact even in bf16 (8 bits). What is only moved has more different values,
    so that a part in the wrong place is seen.
    """
    period = 3 if collective in REDUCING else 251
    values = (torch.arange(period, device=like.device) + 97 * rank) % period
    return values.to(like.dtype).repeat(math.ceil(like.numel() / period))[: like.numel()]


def expected(collective: str, m: Message) -> tuple[slice, torch.Tensor]:
    """Which part of `receive` this rank must have filled, and with what."""
    everything, nothing = slice(0, m.send.numel()), slice(0, 0)
    if collective in REDUCING:
        if collective == "reduce" and m.rank != 0:
            return nothing, m.send[nothing]  # what stands in the others' buffers is not defined
        total = torch.zeros_like(m.send)
        for rank in range(m.n):
            total += pattern(collective, rank, m.send)
        part = m.mine if collective == "reduce_scatter" else everything
        return part, total[part]
    if collective in ("all_gather", "all_to_all"):
        whole = torch.empty_like(m.send)
        for rank, place in enumerate(whole.split(m.chunk)):
            sent = pattern(collective, rank, m.send)
            place.copy_(sent[rank * m.chunk :][: m.chunk] if collective == "all_gather" else sent[m.mine])
        return everything, whole
    source = 0 if collective == "broadcast" else (m.rank - 1) % m.n
    return everything, pattern(collective, source, m.send)


def is_right(collective: str, m: Message) -> bool:
    """Run the collective once on known numbers; True when this rank has received what it must."""
    m.send.copy_(pattern(collective, m.rank, m.send))
    m.receive.copy_(m.send)
    RUN[collective](m)
    part, values = expected(collective, m)
    # Sums round in bf16 beyond 128 ranks (fp16: 1024); a lost or doubled part of the data is off by more than 5 %.
    exact = collective not in REDUCING or m.n * torch.finfo(m.send.dtype).eps <= 1
    found = m.receive[part]
    return torch.equal(found, values) if exact else torch.allclose(found, values, rtol=0.05)


# ------------------------------------------------------------------------------------------------- measuring


def slowest(seconds: list[float], ranks: Ranks) -> list[float]:
    """Each time as the slowest of all ranks had it."""
    times = torch.tensor(seconds, dtype=torch.float64, device=ranks.device)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return times.tolist()


def time_operation(operation: Callable[[], Any], ranks: Ranks, warmup: int, repeats: int) -> list[float]:
    """Seconds of one operation on the slowest rank, by repeat; each repeat is a batch of them."""

    def batch(count: int) -> float:
        ranks.barrier()
        finish()
        start = time.perf_counter()
        for _ in range(count):
            operation()
        finish()
        return (time.perf_counter() - start) / count

    finish = torch.cuda.synchronize if ranks.device.type == "cuda" else lambda: None
    (first,) = slowest([batch(warmup)], ranks)
    count = min(100, math.ceil(BATCH_SECONDS / first))  # alike on all ranks, because `first` is
    return slowest([batch(count) for _ in range(repeats)], ranks)


def measure(
    collective: str, size: int, group: dist.ProcessGroup, ranks: Ranks, config: "BandwidthConfig"
) -> dict[str, Any] | str:
    """One row of the table, or, where the backend has no such operation, its own words for that.

    Args:
        size: bytes; rounded down to whole elements for every rank, but at least one each.

    Raises:
        SystemExit: (exit code 2) a rank received something wrong.
    """
    n, dtype = dist.get_world_size(group), DTYPES[config.dtype]
    count = max(1, size // (n * dtype.itemsize)) * n
    send, receive = (torch.empty(count, dtype=dtype, device=ranks.device) for _ in range(2))
    message = Message(send, receive, group, dist.get_rank(group), n)
    missing = None
    try:
        right = is_right(collective, message)
    except (RuntimeError, ValueError) as error:
        says_so = re.search(r"not (yet )?(support|implement|available)|unsupported", str(error), re.IGNORECASE)
        if not (says_so or isinstance(error, NotImplementedError)):
            raise
        missing, right = str(error).splitlines()[0], True
    for other in ranks.all_gather(missing):
        if other:
            return str(other)
    if wrong := [rank for rank, good in enumerate(ranks.all_gather(right)) if not good]:
        fail(
            f"{collective} of {message.send.nbytes:,} bytes gave a wrong result on rank(s) {spans(wrong)} of "
            f"{ranks.world_size}; expected what its definition says; do not train here: repeat with NCCL_DEBUG=INFO or "
            f"TORCH_DISTRIBUTED_DEBUG=DETAIL, and without any NCCL or Gloo variable of your own"
        )
    for buffer in (send, receive):
        buffer.zero_()  # sums of zeros never overflow, however often they are made; the memory is touched already
    seconds = time_operation(lambda: RUN[collective](message), ranks, config.warmup, config.repeats)
    median = statistics.median(seconds)
    bandwidth = message.send.nbytes / median / 1e9
    return {
        "collective": collective,
        "ranks": n,
        "size": size,
        "bytes": message.send.nbytes,
        "seconds": {"median": median, "min": min(seconds), "max": max(seconds)},
        "algorithm_gbytes_per_second": bandwidth,
        "bus_gbytes_per_second": bandwidth * bus_factor(collective, n),
    }


def memory_copy(ranks: Ranks) -> dict[str, float]:
    """GB/s at which one thread of a rank copies memory: alone on its host, and with all ranks at once (the slowest)."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8)
    target = torch.ones_like(source)

    def seconds() -> float:
        times = []
        for _ in range(6):
            start = time.perf_counter()
            target.copy_(source)
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ranks.barrier()
    (together,) = slowest([seconds()], ranks)
    (alone,) = slowest([seconds() if ranks.local_rank == 0 else 0.0], ranks)  # the others wait in the reduction
    torch.set_num_threads(threads)
    return {
        "alone_gbytes_per_second": COPY_BYTES / alone / 1e9,
        "together_gbytes_per_second": COPY_BYTES / together / 1e9,
    }


# --------------------------------------------------------------------------------------------- what is where


def find_hosts(ranks: Ranks) -> dict[str, list[int]]:
    """The ranks on each host, in the order of their first ranks."""
    hosts: dict[str, list[int]] = {}
    for rank, host in enumerate(ranks.all_gather(socket.gethostname())):
        hosts.setdefault(host, []).append(rank)
    return hosts


def spans(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` → `0-2, 5`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


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


def make_groups(hosts: dict[str, list[int]], config: "BandwidthConfig", ranks: Ranks) -> dict[str, dist.ProcessGroup]:
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


# ---------------------------------------------------------------------------------------------------- output

HEADER = f"{'group':13}{'collective':15}{'bytes':>14}{'time, µs':>12}{'(least – greatest)':>24}{'algbw':>9}{'busbw':>9}"


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    middle, low, high = (row["seconds"][key] * 1e6 for key in ("median", "min", "max"))
    spread = f"({low:,.1f} – {high:,.1f})"
    bandwidths = f"{row['algorithm_gbytes_per_second']:9.3f}{row['bus_gbytes_per_second']:9.3f}"
    return f"{row['group']:13}{row['collective']:15}{row['bytes']:>14,}{middle:>12,.1f}{spread:>24}{bandwidths}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Time and bus bandwidth over message size, a line for each collective; dashed: within nodes."""
    from matplotlib.figure import Figure  # without pyplot: no window system is touched
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(11, 4.6), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = {name: f"C{index}" for index, name in enumerate(RUN)}
    names = list(dict.fromkeys((row["group"], row["collective"]) for row in result["rows"]))
    for group, collective in names:
        rows = [row for row in result["rows"] if (row["group"], row["collective"]) == (group, collective)]
        sizes, seconds = [row["bytes"] for row in rows], [row["seconds"] for row in rows]
        style = {"color": colours[collective], "linestyle": "-" if group == "all ranks" else "--"}
        left.plot(sizes, [s["median"] * 1e6 for s in seconds], "o", markersize=4, **style)
        left.fill_between(
            sizes,
            [s["min"] * 1e6 for s in seconds],
            [s["max"] * 1e6 for s in seconds],
            color=colours[collective],
            alpha=0.15,
        )
        right.plot(sizes, [row["bus_gbytes_per_second"] for row in rows], "o", markersize=4, **style)
    copy = result["memory_copy"]["together_gbytes_per_second"]
    right.axhline(copy, color="0.3", linestyle=":")
    sizes = sorted({row["bytes"] for row in result["rows"]})
    right.annotate("memory copy, all ranks at once", (sizes[0], copy), (0, 3), textcoords="offset points", fontsize=8)
    left.set(ylabel="µs", title="Time of one operation, slowest rank (band: least to greatest)")
    right.set(ylabel="GB/s", title="Bus bandwidth")
    for panel in (left, right):
        panel.set(xscale="log", yscale="log", xlabel="bytes")
        panel.grid(alpha=0.3)
    handles = [Line2D([], [], color=colours[c], label=c) for c in dict.fromkeys(c for _, c in names)]
    if len({group for group, _ in names}) > 1:
        handles += [
            Line2D([], [], color="0.3", linestyle=s, label=g) for s, g in (("-", "all ranks"), ("--", "within nodes"))
        ]
    left.legend(handles=handles, fontsize=8)
    figure.suptitle(
        f"{result['world_size']} ranks on {len(result['hosts'])} host(s), {result['backend']}, {result['dtype']}"
    )
    figure.savefig(path, format="png")


def check_outputs(config: "BandwidthConfig", ranks: Ranks) -> None:
    """Find out now, not after the measurement, whether the files can be written; ends all ranks if not."""
    problem = None
    for key, name in (("json", config.json), ("plot", config.plot)):
        if name and ranks.is_main:
            try:
                open(name, "a").close()
            except OSError as error:
                problem = f"{key} = {name}: {error.strerror}; give a file in a folder that exists and can be written to"
    if problem := ranks.broadcast(problem):
        fail(str(problem))


# ------------------------------------------------------------------------------------------------------ main


@dataclass
class BandwidthConfig:
    """What to measure."""

    collective: str = "all"
    """all, or some of all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, reduce, send_recv, with commas."""
    sizes: str = "auto"
    """Message sizes in bytes, with commas; K, M and G are powers of 1024. auto: 4K to 16M on CPUs, to 1G on GPUs."""
    dtype: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """The type of the numbers that are sent."""
    warmup: int = 3
    """Operations before the clock runs: buffers and connections are made then."""
    repeats: int = 10
    """How often each is timed."""
    within_nodes: bool = False
    """On several nodes, measure besides the whole also one group a node, all nodes at the same time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: every GPU if there is one, else the CPU."""
    network_profile: str = "default"
    """Which NCCL and Gloo variables to set; see python slurm/network.py --explain."""
    json: str | None = None
    """Write all results to this file."""
    plot: str | None = None
    """Draw time and bandwidth over size into this PNG."""
    minimum_gbytes_per_second: float | None = None
    """Exit code 3 when the bus bandwidth of the one collective at the largest size, over all ranks, is below."""

    def __post_init__(self) -> None:
        for name in self.collectives:
            if name not in RUN:
                near = difflib.get_close_matches(name, RUN, 1, 0.5)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ValueError(
                    f"collective = {name!r} is none that this tool knows; {hint}allowed: all, {', '.join(RUN)}"
                )
        if not self.bytes_by_device("cpu"):
            raise ValueError(f"sizes = {self.sizes!r} cannot work; allowed: auto, or bytes above 0 such as 4K,64K,16M")
        if self.warmup < 1 or self.repeats < 1:
            raise ValueError(f"warmup = {self.warmup} and repeats = {self.repeats} must be at least 1")
        minimum = self.minimum_gbytes_per_second
        if minimum is not None and not (0 <= minimum < math.inf and len(self.collectives) == 1):
            raise ValueError(
                f"minimum_gbytes_per_second = {minimum:g} with collective = {self.collective} cannot work; allowed: "
                f"0 or more, for one collective; add --collective all_reduce"
            )

    @property
    def collectives(self) -> list[str]:
        """The names, each once."""
        return (
            list(RUN) if self.collective == "all" else list(dict.fromkeys(self.collective.replace(" ", "").split(",")))
        )

    def bytes_by_device(self, device: str) -> list[int]:
        """The sizes, small ones first; none where the text makes no sense."""
        text = self.sizes
        if text == "auto":
            text = "4K,64K,1M,16M" + (",256M,1G" if device == "cuda" else "")
        words = [re.fullmatch(r"(\d+)([KMG]?)(i?B)?", word.strip(), re.IGNORECASE) for word in text.split(",")]
        sizes = {int(word[1]) * UNITS[word[2].upper()] if word else 0 for word in words}
        return [] if 0 in sizes else sorted(sizes)


@record
def main(config: BandwidthConfig) -> None:
    ranks = join(config.device, network_profile=config.network_profile)
    if ranks.world_size < 2:
        fail("one process has nobody to send to; start several with torchrun --nproc-per-node=2")
    check_outputs(config, ranks)
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
