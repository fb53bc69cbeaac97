"""Each launch pattern runs to its end on the cluster, and all train the same."""

import json
import os
from pathlib import Path

import pytest
from equality import read_rows
from slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm
SHORT = ["--train.steps", "4", "--model.layers", "1"]
# Losses in fp32, summed in another order by each number of ranks: the project's bound for losses.
SAME = 1e-5


def check(folder: Path, world_size: int, hosts: list[str], launcher: str) -> list[float]:
    record = json.loads((folder / "run.json").read_text())
    assert (record["world_size"], record["hosts"], record["launcher"]) == (world_size, hosts, launcher)
    losses = [row["loss"] for row in read_rows(folder)]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.3
    return losses


PATTERNS = {
    "one task a node, one node": (["ddp/single_node.sbatch"], 2, ["node1"], "torchrun"),
    "one task a node, two nodes": (["ddp/multi_node.sbatch"], 4, ["node1", "node2"], "torchrun"),
    "one task a device": (["slurm/one_task_per_device.sbatch"], 4, ["node1", "node2"], "srun"),
    "MPI": (["slurm/mpi.sbatch"], 4, ["node1", "node2"], "mpirun"),
    "one GPU a node": (["--gpus-per-node=1", "ddp/multi_node.sbatch"], 2, ["node1", "node2"], "torchrun"),
    "multi-node file on one node": (["--nodes=1", "ddp/multi_node.sbatch"], 2, ["node1"], "torchrun"),
}


QUICK = ("one task a node, two nodes", "one task a device", "MPI")  # each launcher on two nodes of two GPUs


@pytest.fixture(scope="module")
def losses(cluster):
    """The losses of each pattern, by name, once they have run."""
    return {}


def ran(cluster, losses, pattern, job):
    """Wait for the job of a pattern; it trains as those before it did."""
    _, world_size, hosts, launcher = PATTERNS[pattern]
    cluster.completed(job)
    losses[pattern] = check(cluster.run_folder(job), world_size, hosts, launcher)
    for other, values in losses.items():
        assert losses[pattern] == pytest.approx(values, abs=SAME), f"{pattern} against {other}"


def test_each_launcher_on_two_nodes(cluster, losses):
    """One test, so that its jobs are submitted together and Slurm starts each as soon as it can."""
    jobs = {pattern: cluster.submit(*PATTERNS[pattern][0], *SHORT) for pattern in QUICK}
    for pattern, job in jobs.items():
        ran(cluster, losses, pattern, job)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [pattern for pattern in PATTERNS if pattern not in QUICK])
def test_launch_pattern(cluster, losses, pattern):
    ran(cluster, losses, pattern, cluster.submit(*PATTERNS[pattern][0], *SHORT))


@pytest.mark.slow
def test_two_jobs_on_one_node_do_not_collide(cluster):
    """Both want the first node and start at once; each has one of its GPUs, a port and a run folder of its own."""
    common = ["--nodes=1", "--nodelist=node1", "--gpus-per-node=1", "ddp/multi_node.sbatch", *SHORT]
    first, second = cluster.submit(*common, "--seed", "1"), cluster.submit(*common, "--seed", "2")
    outputs = [cluster.completed(job) for job in (first, second)]
    shown = [cluster.show(job) for job in (first, second)]
    assert max(s["StartTime"] for s in shown) <= min(s["EndTime"] for s in shown), "they did not run side by side"
    assert all("node1:" in text for text in outputs)
    ends = [check(cluster.run_folder(job), 1, ["node1"], "torchrun") for job in (first, second)]
    assert ends[0] != ends[1]  # another seed: neither has read or written the other's run


@pytest.mark.slow
def test_mpi_on_three_nodes(cluster, losses, tmp_path):
    """mpirun starts helpers on the second and third node by one srun, whose step is not that of the ranks."""
    three = SlurmCluster(f"test-three-{os.getpid()}", tmp_path, nodes=3, gpus=1)
    try:
        job = three.submit("--nodes=3", "--ntasks-per-node=1", "--gpus-per-node=1", "slurm/mpi.sbatch", *SHORT)
        three.completed(job)
        losses["MPI on three nodes"] = check(three.run_folder(job), 3, ["node1", "node2", "node3"], "mpirun")
    finally:
        three.down()
    for other, values in losses.items():
        assert losses["MPI on three nodes"] == pytest.approx(values, abs=SAME), other
