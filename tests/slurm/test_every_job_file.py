"""Every sbatch file of the repository: Slurm accepts it; and, in `make test-slurm-all`, it really runs to its end."""

import pytest
from fake_slurm import job_files
from launching import ROOT

pytestmark = pytest.mark.slurm
SHORT = ["--train.steps", "4", "--model.layers", "1"]


def test_there_are_job_files():
    assert {"ddp/single_node.sbatch", "ddp/multi_node.sbatch", "slurm/mpi.sbatch"} <= set(job_files())


def test_slurm_accepts_each_of_them(cluster):
    """All in one call on the login node, which is most of what each would cost."""
    loop = 'for file; do echo "== $file"; sbatch --test-only "$file" 2>&1 || echo "refused: $?"; done'
    done = cluster.on_login("bash", "-c", loop, "test", *job_files())
    answers = done.stdout.split("== ")[1:]
    assert len(answers) == len(job_files())
    for answer in answers:
        assert "refused" not in answer and "to start at" in answer, answer
        assert "left out" not in answer, f"a fact of one site (partition, account, …) stands in the file: {answer}"


@pytest.fixture(scope="module")
def finished_run(cluster):
    """The folder of a short training, for the jobs that look at one."""
    cluster.completed(cluster.submit("ddp/single_node.sbatch", *SHORT, "--run_name", "for-the-others"))
    return str(cluster.folder / "runs" / "for-the-others")


@pytest.mark.slow
@pytest.mark.parametrize("file", job_files())
def test_it_runs(cluster, finished_run, file):
    """A training takes a short one's settings, unless it is named here."""
    if file == "slurm/jupyter.sbatch":  # serves until its time limit, or this
        job = cluster.submit(file)
        cluster.wait_for_text(job, r"http://localhost:\d+/lab\?token=")
        cluster.wait_for_text(job, r"is running at:")
        cluster.on_login("scancel", job)
        assert cluster.end_of(job) == "CANCELLED"
        assert not cluster.pids("node1", "jupyter|tensorboard")
        return
    arguments = SHORT
    if file in ("slurm/evaluate.sbatch", "slurm/report.sbatch"):
        arguments = [finished_run]
    elif file == "benchmarks/by_hand.sbatch":
        arguments = ["--compare", "ddp", "--turns", "2", "--steps", "1"]
    elif file.startswith("prerequisites/checks/"):
        arguments = []
    job = cluster.submit(file, *arguments)
    tasks = [job]
    if "--array" in (ROOT / file).read_text():
        shown = cluster.on_login("squeue", "--noheader", "--array", f"--jobs={job}", "--format=%i").stdout
        tasks = shown.split()
        assert len(tasks) > 1
    for task in tasks:
        cluster.completed(task, timeout=240)
