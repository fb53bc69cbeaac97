"""What goes wrong on a cluster, made to go wrong: killed ranks and nodes, the time limit, faulty settings."""

import os
import signal
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from equality import largest_difference, read_checkpoint, read_rows
from launching import ROOT, clean_environment

pytestmark = pytest.mark.slurm

STEPS = 400
# Two ranks on two nodes: there the sum of two gradients has one order only, so that a resumed run is bitwise equal.
TRAINING = ["--nodes=2", "--gpus-per-node=1", "ddp/multi_node.sbatch", "--train.steps", str(STEPS)]
TRAINING += ["--model.layers", "1", "--checkpoint.every", "50", "--train.log_every", "50"]


@pytest.fixture(scope="module")
def undisturbed(cluster):
    job = cluster.submit(*TRAINING)
    cluster.completed(job)
    return cluster.run_folder(job)


def assert_equal_runs(run: Path, other: Path) -> None:
    rows, expected = read_rows(run), read_rows(other)
    assert [row["step"] for row in rows] == list(range(STEPS)), "every step once"
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]
    assert largest_difference(read_checkpoint(run, STEPS), read_checkpoint(other, STEPS)) == 0


@pytest.mark.slow
@pytest.mark.alone
def test_killed_rank_fails_the_job(cluster):
    job = cluster.submit("ddp/multi_node.sbatch", "--train.steps", "5000", "--model.layers", "1")
    cluster.wait_for_text(job, r"step +10 ")
    workers = cluster.pids("node2", r"-u ddp/train\.py")
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    assert cluster.end_of(job, timeout=60) == "FAILED"  # the promise is a minute, not the hour of its time limit
    assert "exitcode" in cluster.output(job) and "-9" in cluster.output(job)
    assert not cluster.pids("node1", r"ddp/train\.py") and not cluster.pids("node2", r"ddp/train\.py")


@pytest.mark.slow
@pytest.mark.alone
def test_killed_rank_is_restarted_from_the_checkpoint(cluster, undisturbed):
    """RESTARTS=1: the job fails with progress, goes back into the queue by itself, and ends as if nothing had been."""
    job = cluster.submit(*TRAINING, RESTARTS="1")
    cluster.wait_for_text(job, r"step +100 ")
    os.kill(cluster.pids("node2", r"-u ddp/train\.py")[0], signal.SIGKILL)
    text = cluster.completed(job, timeout=400)
    assert "[rank 0] error: lost rank 1 (node2, process " in text
    assert "job_env: failed with code 1 after a new checkpoint: requeued, restart 1 of 1" in text
    assert cluster.show(job)["Restarts"] == "1" and text.count("resumed from") == 1
    assert_equal_runs(cluster.run_folder(job), undisturbed)


@pytest.mark.slow
@pytest.mark.alone
def test_killed_node_requeued_resumed(cluster, undisturbed):
    job = cluster.submit(*TRAINING)
    cluster.wait_for_text(job, r"step +150 ")
    cluster("kill-node", "2")
    try:
        cluster.wait_for(job, "PENDING", timeout=60)  # Slurm has noticed, and requeued the job
    finally:
        cluster("start-node", "2", timeout=120)  # a minute, in which what was meant for the dead node is sent again
    text = cluster.completed(job, timeout=240)
    assert cluster.show(job)["Restarts"] == "1"
    assert "resumed from" in text
    assert_equal_runs(cluster.run_folder(job), undisturbed)


@pytest.mark.slow
@pytest.mark.alone
def test_signal_before_the_time_limit(cluster, undisturbed):
    """A limit of one minute, with the signal 30 s before it: the run needs several attempts."""
    job = cluster.submit("--time=1", "--signal=B:USR1@30", *TRAINING)
    text = cluster.completed(job, timeout=360)
    restarts = int(cluster.show(job)["Restarts"])
    assert restarts >= 1, "the training ended before Slurm sent its signal"
    assert text.count("SIGUSR1: the ranks are asked to save and stop") == restarts
    assert text.count("resumed from") == restarts
    # Its own: a job of another test that was cancelled may have left one, which nobody reads.
    assert not (cluster.folder / "runs" / f"stop-job{job}").exists()
    assert_equal_runs(cluster.run_folder(job), undisturbed)


def failed(cluster, *sbatch: str, **environment: str) -> str:
    """Submit, expect FAILED, and return the output, in which there is no traceback."""
    job = cluster.submit(*sbatch, **environment)
    assert cluster.end_of(job, timeout=60) == "FAILED"
    output = cluster.output(job)
    assert "Traceback" not in output
    return output


@pytest.mark.slow
def test_wrong_interface_name(cluster):
    output = failed(cluster, "ddp/multi_node.sbatch", GLOO_SOCKET_IFNAME="eth7")
    assert "GLOO_SOCKET_IFNAME=eth7: host node1 has no interface 'eth7'" in output
    assert "eth0, lo" in output or "lo, eth0" in output


@pytest.mark.slow
def test_settings_that_cannot_work(cluster, tmp_path):
    source = ["--wrap", "bash -c 'source slurm/job_env.sh; echo went on'"]  # Slurm's own wrapper is sh
    gpu = ["--gpus-per-node=1"]
    cases = {
        "Slurm does not say how many GPUs a node of this job has": (source, {}),
        "CLUSTER=nowhere: there is no slurm/profiles/nowhere.sh; there are: aws-efa.sh": (
            [*gpu, *source],
            {"CLUSTER": "nowhere"},
        ),
        "there is no environment with torch in /no/such/environment": (
            [*gpu, *source],
            {"VENV": "/no/such/environment"},
        ),
        "does not lie evenly on 2 nodes": (["--gpus=3", "--nodes=2", *source], {}),
        "submit it from the repository root": (
            [*gpu, f"--chdir={tmp_path}", "--wrap", f"bash -c 'source {ROOT}/slurm/job_env.sh; echo went on'"],
            {},
        ),
        "STAGE_ENV=1 copies an environment made by venv": ([*gpu, *source], {"STAGE_ENV": "1", "VENV": str(tmp_path)}),
    }
    (tmp_path / "bin").mkdir()  # looks like an environment, but venv has not made it
    for program in ("python", "torchrun"):
        (tmp_path / "bin" / program).symlink_to(Path(sys.executable).parent / program)
    jobs = {message: cluster.submit(*sbatch, **environment) for message, (sbatch, environment) in cases.items()}
    for message, job in jobs.items():
        assert cluster.end_of(job, timeout=60) == "FAILED", message
        output = cluster.output(job)
        assert message in output and "went on" not in output
        assert len(output.splitlines()) == 1


def test_outside_a_job():
    done = subprocess.run(
        ["bash", "-c", "source slurm/job_env.sh; echo went on"],
        cwd=ROOT, env=clean_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "job_env: error: this is no Slurm job; submit the file with sbatch\n"


def test_impossible_requests_are_refused_at_once(cluster):
    for option in ("--nodes=5", "--gpus-per-node=3"):
        done = cluster.on_login("sbatch", "--test-only", option, "ddp/multi_node.sbatch", check=False)
        assert done.returncode != 0
        assert "Requested node configuration is not available" in done.stderr


@pytest.mark.slow
def test_environment_staged_to_each_node(cluster, tmp_path):
    """A small environment that leans on this one is copied to both nodes' disks, used there, and removed."""
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "lean.pth").write_text(next(path for path in sys.path if path.endswith("site-packages")) + "\n")
    torchrun = environment / "bin" / "torchrun"
    torchrun.write_text(f"#!{environment}/bin/python\nfrom torch.distributed.run import main\nmain()\n")
    torchrun.chmod(0o755)
    where = tmp_path / "where.py"
    where.write_text(  # one write a line: two ranks share the output
        "import os, socket, sys\n"
        "os.write(1, f'{socket.gethostname()} {os.environ[\"RANK\"]} {sys.prefix}\\n'.encode())\n"
    )

    job = cluster.submit("ddp/multi_node.sbatch", VENV=str(environment), STAGE_ENV="1", SCRIPT=str(where))
    output = cluster.completed(job)
    local = Path(cluster.state_folder())
    staged = f"{local}/local/environment-{job}"
    said = {line for line in output.splitlines() if line.startswith("node")}
    assert said == {f"node{1 + rank // 2} {rank} {staged}" for rank in range(4)}
    assert [list((local / f"disk-node{i}").glob("environment-*")) for i in (1, 2)] == [[], []]
