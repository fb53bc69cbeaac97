"""The same script under every launcher, as a user starts it."""

import subprocess
import sys
from pathlib import Path

import pytest
from equality import SMALL, read_rows
from launching import ROOT, SCRIPTS, OnRanks, clean_environment, free_port, run_command

ON_RANKS = OnRanks("tests/ddp/starts_on_ranks.py")
QUICK = [*SMALL, "--train.steps", "3"]


def only_run(folder):
    (run,) = (folder / "runs").iterdir()
    return run


def test_torchrun_leaves_a_whole_run_folder(launch, tmp_path):
    result = launch("ddp/train.py", *QUICK, "--train.eval_every", "2")
    run = only_run(tmp_path)
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "run.json", "metrics.jsonl", "checkpoints", "loss.png"} <= names
    assert not any(path.is_symlink() for path in run.rglob("*"))
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    row = read_rows(run)[-1]
    keys = {
        "step",
        "loss",
        "grad_norm",
        "lr",
        "tokens",
        "step_seconds",
        "tokens_per_second",
        "mfu",
        "peak_memory_bytes",
    }
    assert row.keys() == keys
    assert row["tokens"] == 3 * 24 * 16
    for words in ("finished after 3 of 3 steps", "validation loss", "tokens/s", "peak memory", str(run), "to go on"):
        assert words in result.stdout, result.stdout
    assert result.stdout.count("finished after") == 1  # rank 0 speaks for all


@pytest.mark.parametrize("size", [1, 2])
def test_the_next_command_that_the_summary_offers_works(group, tmp_path, size):
    first, *_ = group(size)(SCRIPTS.printed, "ddp/train.py", [*QUICK, "--runs_dir", str(tmp_path / "runs")])
    launcher, _, arguments = first.split("to go on")[1].strip().partition(f" {ROOT}/ddp/train.py ")
    assert launcher == ("torchrun --nproc-per-node=2" if size == 2 else "python")
    more = [*arguments.split(), "--runs_dir", str(tmp_path / "runs")]
    assert "finished after 6 of 6 steps" in group(size)(SCRIPTS.printed, "ddp/train.py", more)[0]
    assert [row["step"] for row in read_rows(only_run(tmp_path))] == list(range(6))


@pytest.mark.slow
def test_make_train(tmp_path):
    if not (Path(sys.prefix) / ".core").is_file():
        pytest.skip("needs an environment made by `make venv`: else make would install packages now")
    small = " ".join([*SMALL, "--train.steps", "3"])
    command = ["make", "train", f"VENV={sys.prefix}", "NPROC=3", f"ARGS={small}"]
    result = run_command(command, RUNS_DIR=str(tmp_path / "runs"), DEVICE="cpu")
    assert "world size 3 on" in result.stdout
    assert "finished after 3 of 3 steps" in result.stdout


@pytest.mark.parametrize("script", ["ddp/train.py", "ddp/single_device.py"])
def test_plain_python_is_one_process(group, tmp_path, script):
    arguments = [*QUICK, "--runs_dir", str(tmp_path)]
    assert "world size 1 on" in group(1)(ON_RANKS.printed_by_plain_python, script, arguments)[0]


@pytest.mark.parametrize("size", [2, 3])
def test_minimal(group, size):
    """Each rank draws its own part of each epoch, in another order every time; the weights stay the same."""
    ranks = group(size)(ON_RANKS.minimal_parts, "ddp/minimal.py")
    assert [rank["printed"] == "" for rank in ranks] == [False] + [True] * (size - 1)
    lines = ranks[0]["printed"].strip().splitlines()
    assert [line.split()[1] for line in lines] == [str(epoch) for epoch in range(10)]
    accuracy = float(lines[-1].split()[-1])
    assert 0.88 < accuracy <= 1
    assert abs(accuracy * 360 - round(accuracy * 360)) < 0.05  # all 360 test digits, each once
    assert float(lines[0].split()[3]) > 4 * float(lines[-1].split()[3])  # the loss is a mean over the batches
    assert len({rank["weights"] for rank in ranks}) == 1
    assert [rank["steps"] for rank in ranks] == [10 * (1437 // 48)] * size  # whole global batches, at any world size
    for epochs in zip(*(rank["epochs"] for rank in ranks), strict=True):
        drawn = [index for part in epochs for index in part]
        assert len(set(drawn)) == len(drawn) == 1437 // size * size
    assert ranks[0]["epochs"][0] != ranks[0]["epochs"][1]


def start_all(environments, command):
    """Start one process per environment, all at once; returns their outputs."""
    processes = [
        subprocess.Popen(command(i), cwd=ROOT, env=clean_environment(DEVICE="cpu", **env), text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for i, env in enumerate(environments)
    ]  # fmt: skip
    outputs = []
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), outputs
    return outputs


@pytest.mark.slow
def test_two_torchruns_as_on_two_machines(tmp_path):
    port = str(free_port())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
                "--master-addr=127.0.0.1", f"--master-port={port}"]  # fmt: skip
    arguments = ["ddp/train.py", *QUICK, "--runs_dir", str(tmp_path / "runs")]
    outputs = start_all([{}, {}], lambda node: [*torchrun, f"--node-rank={node}", *arguments])
    assert "world size 2 on" in "".join(outputs)
    assert len(read_rows(only_run(tmp_path))) == 3


@pytest.mark.parametrize("launcher", ["srun", "mpirun", "mpiexec"])
def test_one_task_a_device(group, tmp_path, launcher):
    """Two ranks with the variables that the launcher sets; the launchers themselves are not needed for that."""
    job = str(free_port())  # the port is derived from it: other than that of other tests
    variables = {
        "srun": lambda r: {"SLURM_JOB_ID": job, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": r,
                           "SLURM_LOCALID": r, "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2"},
        "mpirun": lambda r: {"OMPI_COMM_WORLD_RANK": r, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": r,
                             "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": job},
        "mpiexec": lambda r: {"PMI_RANK": r, "PMI_SIZE": "2", "MPI_LOCALRANKID": r, "MPI_LOCALNRANKS": "2"},
    }[launcher]  # fmt: skip
    arguments = [*QUICK, "--runs_dir", str(tmp_path / "runs")]
    outputs = group(2)(ON_RANKS.printed_with, [variables("0"), variables("1")], "ddp/train.py", arguments)
    assert "world size 2 on" in "".join(outputs)
    run = only_run(tmp_path)
    assert len(read_rows(run)) == 3
    assert run.name == f"ddp-train-job{job}" if launcher == "srun" else run.name.startswith("ddp-train-")
