"""The script under torchrun, DeepSpeed's own launcher and srun; a rank that dies; and that nothing is compiled."""

import os
import sys
from pathlib import Path

import pytest
from equality import SMALL, assert_same_rows, read_rows
from launching import free_port, run_command, whose_rank_1_dies

SCRIPT = "deepspeed/train.py"
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


def test_plain_python(launch, one, tmp_path):
    """One process, which nobody has given a rank; stage 3, whose parameters are born in parts."""
    launch(SCRIPT, *QUICK, "--deepspeed_config", "deepspeed/configs/zero3.json", nproc=0)
    assert_same_rows(one, only_run(tmp_path / "runs"), 1e-5)


def test_the_device_is_chosen_before_the_import(launch):
    """DeepSpeed looks for it when it is imported, and would go on with another than the script's."""
    done = launch(SCRIPT, "--device", "cpu", nproc=0, check=False, env={"DEVICE": "", "DS_ACCELERATOR": "cuda"})
    assert done.returncode == 2
    words = "device = cpu, but DeepSpeed chose cuda when it was imported; export DEVICE=cpu DS_ACCELERATOR=cpu"
    assert words in done.stderr


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


@pytest.mark.slurm
@pytest.mark.parametrize("job_file", [
    "deepspeed/multi_node.sbatch", pytest.param("slurm/one_task_per_device.sbatch", marks=pytest.mark.slow),
])  # fmt: skip
def test_srun_on_two_nodes(cluster, single_device, job_file):
    """One torchrun a node, and one task a device; four ranks, and DeepSpeed finds its place by either."""
    job = cluster.submit("--job-name=2Z-2G2N", job_file, *QUICK, SCRIPT=SCRIPT)
    printed = cluster.completed(job)
    assert "world size 4 on" in printed
    assert cluster.show(job)["JobName"] == "2Z-2G2N"
    assert_same_rows(single_device(*QUICK[:-2]), cluster.run_folder(job), 1e-5)


def test_without_the_package_one_line_says_what_to_install(tmp_path):
    """The folder deepspeed/ would be imported in its place, as an empty package."""
    (tmp_path / "sitecustomize.py").write_text(
        "from importlib import metadata\n"
        "version = metadata.version\n"
        "def without(name):\n"
        "    if name == 'deepspeed':\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return version(name)\n"
        "metadata.version = without\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).resolve().parents[2])])
    result = run_command([sys.executable, SCRIPT], 60, check=False, PYTHONPATH=path)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: this lesson needs the package deepspeed; install the core environment: make venv")
