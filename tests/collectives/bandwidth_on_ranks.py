"""What the ranks of a `group` run for the tests of collectives/bandwidth.py."""

import contextlib
import io
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from rank_worker import starts_its_own_group

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "collectives"), str(Path(__file__).parent)]

import bandwidth  # noqa: E402  (needs the paths above)
import bandwidth_measure  # noqa: E402
import bandwidth_operations  # noqa: E402
import lesson_on_ranks  # noqa: E402
from lesson_on_ranks import here  # noqa: E402


@starts_its_own_group
def run(arguments: list[str]) -> tuple[int, str, str]:
    """The script with these arguments on this rank: its exit code, and what it wrote to stdout and stderr."""
    return lesson_on_ranks.run("bandwidth", arguments)


def tampered(collective: str, on_rank: int) -> tuple[int, str]:
    """Measure a collective whose last received element is off by one on one rank: exit code and stderr."""
    honest, err = bandwidth_operations.RUN[collective], io.StringIO()

    def dishonest(message: bandwidth_operations.Message) -> None:
        honest(message)
        if dist.get_rank() == on_rank:
            part = message.mine if collective == "reduce_scatter" else slice(None)
            message.receive[part][-1] += 1

    bandwidth_operations.RUN[collective] = dishonest
    try:
        with contextlib.redirect_stderr(err):
            bandwidth_measure.measure(collective, 64, dist.group.WORLD, here(), bandwidth.BandwidthConfig(repeats=1))
    except SystemExit as ended:
        return ended.code, err.getvalue()
    finally:
        bandwidth_operations.RUN[collective] = honest
    return 0, err.getvalue()


def slowest_of() -> list[float]:
    """Three times that another rank has longest each, or all alike."""
    ranks = here()
    return bandwidth_measure.slowest([1.0 + ranks.rank, 30.0 - 10 * ranks.rank, 9.0], ranks)


def idle(collective: str) -> bool:
    """Whether a collective that does nothing at all passes as right on this rank."""
    honest = bandwidth_operations.RUN[collective]
    bandwidth_operations.RUN[collective] = lambda message: None
    try:
        n, numbers = dist.get_world_size(), torch.zeros(12 * dist.get_world_size())
        message = bandwidth_operations.Message(numbers, numbers.clone(), dist.group.WORLD, dist.get_rank(), n)
        return bandwidth_operations.is_right(collective, message)
    finally:
        bandwidth_operations.RUN[collective] = honest


def unsupported() -> dict | str:
    """An operation that the backend does not have: Gloo reduces no sparse tensor."""
    honest = bandwidth_operations.RUN["reduce"]
    bandwidth_operations.RUN["reduce"] = lambda m: dist.reduce(m.receive.to_sparse(), group_dst=0, group=m.group)
    try:
        return bandwidth_measure.measure("reduce", 64, dist.group.WORLD, here(), bandwidth.BandwidthConfig())
    finally:
        bandwidth_operations.RUN["reduce"] = honest


def hosts_of_two(counts: list[int]) -> list[tuple[str, list[int]]] | tuple[int, str]:
    """Groups within hosts, when the ranks are told that they lie on several: each rank's group and its members."""
    ranks, hosts, first = here(), {}, 0
    for number, count in enumerate(counts):
        hosts[f"node{number}"] = list(range(first, first + count))
        first += count
    config, err = bandwidth.BandwidthConfig(within_nodes=True, repeats=1), io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            groups = bandwidth.make_groups(hosts, config, ranks)
    except SystemExit as ended:
        return ended.code, err.getvalue()
    rows = {name: bandwidth_measure.measure("all_gather", 240, group, ranks, config) for name, group in groups.items()}
    return [
        (name, dist.get_process_group_ranks(groups[name]), row["ranks"], row["bytes"]) for name, row in rows.items()
    ]
