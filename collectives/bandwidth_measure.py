"""Time one collective at one size, after its result was checked; time copies of memory."""

import math
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from bandwidth_operations import RUN, Message, bus_factor, is_right
from bandwidth_settings import BandwidthConfig

from common.ranks import Ranks, fail

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
BATCH_SECONDS = 0.01  # operations are timed in batches of about so long: one alone may end before a clock can tell
COPY_BYTES = 64 * 2**20  # larger than a core's share of any cache


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
    collective: str, size: int, group: dist.ProcessGroup, ranks: Ranks, config: BandwidthConfig
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


def spans(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` → `0-2, 5`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
