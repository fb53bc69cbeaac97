"""The script under torchrun, DeepSpeed's own launcher and srun; a rank that dies; and that nothing is compiled."""

import sys
from pathlib import Path

import pytest
from equality import SMALL, assert_same_rows, read_rows
from launching import OnRanks, assert_refused, free_port, run_command, whose_rank_1_dies

SCRIPT = "deepspeed/train.py"
ON_RANKS = OnRanks("tests/deepspeed/deepspeed_on_ranks.py")
QUICK = [*SMALL, "--train.steps", "6", "--deepspeed_config", "deepspeed/configs/zero2.json"]


def only_run(folder):
    (run,) = folder.iterdir()
    return run


@pytest.fixture(scope="module")
def one(single_device):
    return single_device(*QUICK[:-2])


def test_torchrun_compiles_nothing(launch, one, tmp_path):
    """With an empty folder for extensions, and no compiler: a start that wanted one would end here."""
    extensions = tmp_path / "extensions"
    launch(SCRIPT, *QUICK, env={"TORCH_EXTENSIONS_DIR": str(extensions), "CXX": "/bin/false", "CC": "/bin/false"})
    assert not extensions.exists()
    assert_same_rows(one, only_run(tmp_path / "runs"), 1e-5)


STAGE_3 = ["--deepspeed_config", "deepspeed/configs/zero3.json"]  # its parameters are born in parts


def test_plain_python(group, one, tmp_path):
    """One process, to which no launcher has given a rank."""
    places = ["--runs_dir", str(tmp_path), "--run_name", "run"]
    group(1)(ON_RANKS.by_plain_python, SCRIPT, [*QUICK, *STAGE_3, *places])
    assert_same_rows(one, tmp_path / "run", 1e-5)


CHOSE_ANOTHER = "device = cpu, but DeepSpeed chose cuda when it was imported; export DEVICE=cpu DS_ACCELERATOR=cpu"


def test_another_accelerator_is_refused(group):
    """DeepSpeed would go on with another device than the script's."""
    assert_refused(group(2)(ON_RANKS.ends_with_another_accelerator, SCRIPT, QUICK), CHOSE_ANOTHER)


@pytest.mark.slow
def test_the_device_is_chosen_before_the_import(launch, one, tmp_path):
    """The same in a new process, where DeepSpeed reads DS_ACCELERATOR when it is imported."""
    done = launch(SCRIPT, "--device", "cpu", nproc=0, check=False, env={"DEVICE": "", "DS_ACCELERATOR": "cuda"})
    assert done.returncode == 2
    assert CHOSE_ANOTHER in done.stderr
    launch(SCRIPT, *QUICK, *STAGE_3, nproc=0)
    assert_same_rows(one, only_run(tmp_path / "runs"), 1e-5)


def test_the_launcher_of_deepspeed(one, tmp_path):
    """It says ranks by variables, adds --local_rank, and wants a port that is free."""
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus=2", f"--master_port={free_port()}"]
    environment = {"DEVICE": "cpu", "DS_ACCELERATOR": "cpu", "RUNS_DIR": str(tmp_path)}
    printed = run_command([*launcher, SCRIPT, *QUICK], 120, **environment).stdout
    assert "world size 2 on" in printed
    assert_same_rows(one, only_run(tmp_path), 1e-5)


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_others_with_it_and_the_run_goes_on(launch, one, tmp_path):
    dies = whose_rank_1_dies(SCRIPT, tmp_path)
    options = [*QUICK, "--checkpoint.every", "2", "--run_name", "many"]
    result = launch(dies, *options, timeout=90, check=False)
    assert result.returncode != 0
    assert "finished" not in result.stdout
    again = launch(SCRIPT, *options)
    assert "resumed from" in again.stdout
    assert [row["step"] for row in read_rows(tmp_path / "runs" / "many")] == list(range(6))
    assert_same_rows(one, tmp_path / "runs" / "many", 1e-5)


@pytest.mark.slow  # tests/slurm/ submits these job files in `make test`, with a script that starts faster
@pytest.mark.slurm
@pytest.mark.parametrize("job_file", ["deepspeed/multi_node.sbatch", "slurm/one_task_per_device.sbatch"])
def test_srun_on_two_nodes(cluster, single_device, job_file):
    """One torchrun a node, and one task a device; four ranks, and DeepSpeed finds its place by either."""
    job = cluster.submit("--job-name=2Z-2G2N", job_file, *QUICK, SCRIPT=SCRIPT)
    printed = cluster.completed(job)
    assert "world size 4 on" in printed
    assert cluster.show(job)["JobName"] == "2Z-2G2N"
    assert_same_rows(single_device(*QUICK[:-2]), cluster.run_folder(job), 1e-5)


def test_without_the_package_one_line_says_what_to_install(group):
    """The folder deepspeed/ would be imported in its place, as an empty package."""
    words = "error: this lesson needs the package deepspeed; install the core environment: make venv"
    ((code, message),) = group(1)(ON_RANKS.ends_without_the_package, SCRIPT)
    assert code == 2
    (line,) = message.strip().splitlines()
    assert line.startswith(words)
