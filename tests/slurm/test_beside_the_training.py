"""What job_env.sh starts before and beside a training: the bandwidth gate and the memory logger."""

import csv
import re
import time
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm
TRAINING = ["ddp/multi_node.sbatch", "--model.layers", "1", "--train.steps"]
BOTH = ["node1", "node2"]


def samples(cluster, job: str) -> dict[str, int]:
    """Samples in each host's CSV; the job must have used memory in some of them."""
    found = {}
    for file in sorted((cluster.folder / "runs" / f"memory-job{job}").glob("*.csv")):
        with open(file) as lines:
            used = [float(row["job_used_bytes"]) for row in csv.DictReader(lines)]
        assert max(used) > 0
        found[file.stem] = len(used)
    return found


def assert_nothing_left(cluster, job: str) -> None:
    """No logger and no rank is left on the nodes, once Slurm has ended the job's processes."""
    deadline = time.monotonic() + 30
    while (left := [cluster.pids(node, r"memory_logger|ddp/train") for node in BOTH]) != [[], []]:
        assert time.monotonic() < deadline, f"job {job} left processes behind: {left}"
        time.sleep(0.2)


def gbytes_per_second(output: str) -> float:
    """Bus bandwidth of the largest all-reduce in the gate's table."""
    return float(re.findall(r"^all ranks +all_reduce .* ([\d.]+)$", output, re.MULTILINE)[-1])


def assert_stopped_by_the_gate(cluster, job: str, limit: str) -> None:
    assert cluster.end_of(job, timeout=180) == "FAILED"
    output = cluster.output(job)
    (line,) = [line for line in output.splitlines() if "error:" in line]
    assert line.startswith("bandwidth_gate: error: the fabric is too slow: all_reduce of ")
    assert f"expected at least {limit}; interface: eth0" in line
    assert "Traceback" not in output and "step     0" not in output
    assert not list(Path(cluster.folder).glob(f"runs/*job{job}")), "a training was started"


@pytest.mark.slow
def test_gate_opens_and_memory_is_logged(cluster):
    job = cluster.submit(*TRAINING, "4", BANDWIDTH_GATE="0.000001", MEMORY_LOG="0.5")
    output = cluster.completed(job)
    assert gbytes_per_second(output) > 0 and output.index("busbw") < output.index("world size 4")
    found = samples(cluster, job)
    assert list(found) == BOTH and min(found.values()) > 1
    summary = output[output.index("\nhost   device  peak GiB") :]
    assert all(re.search(rf"^{node}  job +\d+\.\d", summary, re.MULTILINE) for node in BOTH)
    assert all(f"\n{node}: {found[node]} samples in " in summary for node in BOTH)
    assert (cluster.folder / "runs" / f"memory-job{job}" / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert "Killed" not in output, "the loggers were not asked to end"
    assert_nothing_left(cluster, job)


@pytest.mark.slow
def test_memory_logger_ends_with_a_cancelled_job(cluster):
    job = cluster.submit(*TRAINING, "5000", MEMORY_LOG="0.5")
    cluster.wait_for_text(job, r"step +10 ")
    assert all(cluster.pids(node, "memory_logger") for node in BOTH)
    cluster.on_login("scancel", job)
    assert cluster.end_of(job) == "CANCELLED"
    assert_nothing_left(cluster, job)
    found = samples(cluster, job)
    assert list(found) == BOTH and min(found.values()) > 1


@pytest.mark.slow
def test_gate_stops_the_job(cluster):
    job = cluster.submit(*TRAINING, "4", BANDWIDTH_GATE="1000")
    assert_stopped_by_the_gate(cluster, job, "1000")


@pytest.mark.slow
def test_gate_sees_a_slow_network(cluster, tmp_path):
    """The same limit lets the job through as the network is, and stops it behind 100 Mbit/s, which are 0.0125 GB/s."""
    own = SlurmCluster(f"{cluster.name}-slow", tmp_path)
    try:
        limit = "0.05"
        assert gbytes_per_second(own.completed(own.submit(*TRAINING, "4", BANDWIDTH_GATE=limit))) > float(limit)
        own("throttle", "--rate", "100mbit")
        assert_stopped_by_the_gate(own, own.submit(*TRAINING, "4", BANDWIDTH_GATE=limit), limit)
    finally:
        own.down()
