"""Runs whose ranks die, stop or are started twice: what was committed goes on, and nothing else is ever loaded."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from equality import SMALL, largest_difference, read_checkpoint, read_rows
from launching import ROOT, SCRIPTS, OnRanks, assert_refused, clean_environment, kill_tree, run_command

ON_RANKS = OnRanks("tests/fsdp/fsdp_on_ranks.py")
SCRIPT, STEPS = "fsdp/train.py", 12
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def arguments(folder, name):
    options = ["--train.steps", str(STEPS), "--train.precision", "fp64", "--checkpoint.every", "2"]
    return [*SMALL, *options, "--runs_dir", str(folder), "--run_name", name]


@pytest.fixture(scope="module")
def undisturbed(group, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    group(2)(SCRIPTS.train, SCRIPT, arguments(folder, "run"))
    return folder / "run"


def assert_same(one, other):
    """Two ranks on one machine, fp64: bitwise; each step logged once."""
    assert largest_difference(read_checkpoint(one, STEPS), read_checkpoint(other, STEPS)) == 0
    assert [row["step"] for row in read_rows(other)] == list(range(STEPS))
    assert [row["loss"] for row in read_rows(other)] == [row["loss"] for row in read_rows(one)]


@pytest.fixture
def dies_once(tmp_path):
    """The script; its rank 1 is killed in step 5, unless torchrun has restarted it."""
    text = (
        "import os, runpy, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'fsdp')!r})\n"
        "from common.run import Run\n"
        "log = Run.log\n"
        "def log_or_die(self, step, *rest):\n"
        "    if step == 5 and self.ranks.rank == 1 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    log(self, step, *rest)\n"
        "Run.log = log_or_die\n"
        f"runpy.run_path({str(ROOT / SCRIPT)!r}, run_name='__main__')\n"
    )
    (tmp_path / "dies_once.py").write_text(text)
    return str(tmp_path / "dies_once.py")


@pytest.mark.slow
def test_torchrun_restarts_a_rank_that_died(undisturbed, dies_once, tmp_path):
    """All ranks are started again, and go on from the checkpoint: the training of nobody who died."""
    store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "DEVICE": "cpu"}
    command = [*TORCHRUN, "--max-restarts=1", dies_once, *arguments(tmp_path, "run")]
    result = run_command(command, 180, **store)
    assert f"resumed from {tmp_path}/run/checkpoints/step_4: 4 steps done" in result.stdout
    assert_same(undisturbed, tmp_path / "run")


@pytest.mark.slow
def test_a_restart_with_the_old_store_says_so(dies_once, tmp_path):
    command = [*TORCHRUN, "--max-restarts=1", dies_once, *arguments(tmp_path, "run")]
    result = run_command(command, 120, check=False, DEVICE="cpu")
    assert result.returncode == 1  # torchrun's, for a script that ended with 2
    errors = [line for line in result.stderr.splitlines() if "error: torchrun has restarted the ranks" in line]
    assert len(errors) == 2
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in errors[0]


def test_a_restart_needs_the_name_of_the_run(group, tmp_path):
    options = arguments(tmp_path, "run")[:-2]
    answers = group(2)(ON_RANKS.ends_with, {"TORCHELASTIC_MAX_RESTARTS": "1"}, SCRIPT, options)
    assert_refused(answers, "--max-restarts=1 without --run_name")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def stops_in_a_save(tmp_path):
    """`stops_in_a_save("before")`: a script whose ranks stop themselves in the save of step 4, before they write."""

    def write(place):
        text = (
            "import os, runpy, signal, sys\n"
            "import torch.distributed.checkpoint as dcp\n"
            f"sys.path.insert(0, {str(ROOT / 'fsdp')!r})\n"
            "write = dcp.save\n"
            "def stop(writer, place):\n"
            f"    if 'step_4' in str(writer.path) and place == {place!r}:\n"
            f"        with open(os.path.join({str(tmp_path)!r}, 'stopped-' + os.environ['RANK']), 'w') as file:\n"
            "            file.write(str(os.getpid()))\n"
            "        os.kill(os.getpid(), signal.SIGSTOP)\n"
            "def write_or_stop(state, *, storage_writer):\n"
            "    stop(storage_writer, 'before')\n"
            "    write(state, storage_writer=storage_writer)\n"
            "    stop(storage_writer, 'after')\n"
            "dcp.save = write_or_stop\n"
            f"runpy.run_path({str(ROOT / SCRIPT)!r}, run_name='__main__')\n"
        )
        (tmp_path / "stops.py").write_text(text)
        return str(tmp_path / "stops.py")

    return write


def stopped(path):
    """The process whose number stands in the file, as soon as it has stopped."""
    text = path.read_text() if path.exists() else ""
    with contextlib.suppress(psutil.NoSuchProcess):
        if text and (process := psutil.Process(int(text))).status() == psutil.STATUS_STOPPED:
            return process
    return None


@pytest.mark.slow
@pytest.mark.parametrize("place", ["before", "after"])
def test_a_leftover_that_wakes_up_ends_itself(group, undisturbed, stops_in_a_save, tmp_path, place):
    """All processes of an attempt stop while they write a checkpoint, as on a node that hangs; another one finishes the
    run, and removes what was begun; then the first ones go on."""
    run = tmp_path / "run"
    command = [*TORCHRUN, stops_in_a_save(place), *arguments(tmp_path, "run")]
    first = subprocess.Popen(command, cwd=ROOT, env=clean_environment(DEVICE="cpu"), stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not all(family := [stopped(tmp_path / f"stopped-{rank}") for rank in range(2)]):
            assert first.poll() is None, first.communicate()[1]
            assert time.monotonic() < deadline, "the ranks did not stop"
            time.sleep(0.01)
        os.kill(first.pid, signal.SIGSTOP)
        group(2)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "run"))
        before = {path: path.stat().st_mtime_ns for path in run.glob("checkpoints/step_*/manifest.json")}
        for number in (*(process.pid for process in family), first.pid):
            os.kill(number, signal.SIGCONT)
        _, errors = first.communicate(timeout=120)
    finally:
        kill_tree(first.pid)
    assert first.returncode == 1
    assert "another attempt has taken over" in errors
    assert {path: path.stat().st_mtime_ns for path in run.glob("checkpoints/step_*/manifest.json")} == before
    assert_same(undisturbed, run)
