"""A Lightning run that was interrupted goes on as if it had not been, also on other ranks, or in another lesson."""

import json
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from equality import SMALL, STEPS, assert_same_training, largest_difference, read_checkpoint, read_rows, read_validation
from launching import ROOT, SCRIPTS, OnRanks, clean_environment, kill_tree

ON_RANKS = OnRanks("tests/lightning/lightning_on_ranks.py")
HALF = STEPS // 2
BASE = [*SMALL, "--train.steps", str(STEPS), "--train.eval_every", str(STEPS - 1), "--batch.micro_size", "3"]
FP64 = ["--train.precision", "fp64"]
slow = pytest.mark.slow


def arguments(folder, strategy, *more):
    return [
        *BASE,
        "--runs_dir",
        str(folder),
        "--run_name",
        "run",
        *(["--strategy", strategy] if strategy else []),
        *more,
    ]


@pytest.mark.parametrize("precision", ["fp16", pytest.param("fp32", marks=slow)])
def test_same_world_size_is_bitwise(group, tmp_path, precision):
    """Cut back to the checkpoint in the middle. fp16 goes on with its scale, too."""
    options = ["--train.precision", precision, "--checkpoint.every", str(HALF)]
    group(2)(ON_RANKS.train, arguments(tmp_path, "ddp", *options))
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "run", whole)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{STEPS}")
    steps = group(2)(ON_RANKS.counted, arguments(tmp_path, "ddp", *options))
    assert [before for before, _, _ in steps[0]] == list(range(HALF, STEPS))  # Lightning's own count goes on, too
    assert largest_difference(read_checkpoint(whole, STEPS), read_checkpoint(tmp_path / "run", STEPS)) == 0
    rows, before = read_rows(tmp_path / "run"), read_rows(whole)
    assert [row["step"] for row in rows] == list(range(STEPS))
    for name in ("loss", "lr", "grad_norm"):
        assert [row[name] for row in rows] == [row[name] for row in before]
    assert read_validation(tmp_path / "run") == read_validation(whole)
    saved = [json.loads((run / "checkpoints" / f"step_{STEPS}" / "manifest.json").read_text())["extra"]
             for run in (whole, tmp_path / "run")]  # fmt: skip
    assert saved[0] == saved[1] and ("scaler" in saved[0]) == (
        precision == "fp16"
    )  # its scale, and how long it has held


LESSON = "ddp/train.py"


@pytest.mark.parametrize(("first", "then"), [
    (("ddp", 2), ("fsdp", 2)),
    (("fsdp", 2), ("tensor_parallel", 2)),
    (("tensor_parallel", 2), (LESSON, 2)),
    ((LESSON, 2), ("ddp", 3)),
    pytest.param(("fsdp", 2), ("single_device", 1), marks=slow),
    pytest.param(("ddp", 3), ("fsdp", 4), marks=slow),
    pytest.param(("fsdp", 4), ("fsdp", 2), marks=slow),
], ids=lambda value: f"{value[0]} on {value[1]}")  # fmt: skip
def test_resume_elsewhere(group, single_device, tmp_path, first, then):
    """Told to stop in the middle, then on other ranks or by another strategy: all steps are those of one process."""
    for (strategy, ranks), until in ((first, HALF), (then, None)):
        more = arguments(tmp_path, None if strategy == LESSON else strategy, *FP64)
        more = [*more, "--batch.micro_size", str(24 // ranks)] if ranks in (3, 4) else more
        of_lesson = strategy == LESSON
        call = [LESSON, more] if of_lesson else [more]
        functions = SCRIPTS if of_lesson else ON_RANKS
        function = functions.train_until if until else functions.train
        group(ranks)(function, *call, *([until] if until else []))
        assert len(read_rows(tmp_path / "run")) == (until or STEPS)
    assert_same_training(single_device(*BASE, *FP64), tmp_path / "run")


def test_nothing_to_do_is_said(group, tmp_path):
    group(2)(ON_RANKS.train, arguments(tmp_path, "ddp"))
    (printed,) = group(1)(ON_RANKS.printed, arguments(tmp_path, "single_device"))
    assert f"nothing to do: {STEPS} of {STEPS} steps were done already" in printed
    assert len(read_rows(tmp_path / "run")) == STEPS


def start(launcher, folder, *more):
    """A long run of two ranks, under torchrun or Lightning's own launcher."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if launcher == "torchrun" else []
    command = [sys.executable, *torchrun, "lightning/train.py", "--devices", "2"]
    long = ["--train.steps", "4000", "--checkpoint.every", "5", "--train.eval_every", "0"]
    return subprocess.Popen([*command, *arguments(folder, "ddp", *FP64, *long, *more)], cwd=ROOT,
                            env=clean_environment(DEVICE="cpu"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)  # fmt: skip


def wait_for_checkpoint(process, run, timeout=100):
    deadline = time.monotonic() + timeout
    while not list(run.glob("checkpoints/step_*/manifest.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.02)


@slow
def test_killed_in_mid_run(group, tmp_path):
    """SIGKILL for all processes at once, as a power cut would; what was committed is found and goes on."""
    process = start("torchrun", tmp_path)
    wait_for_checkpoint(process, tmp_path / "run")
    time.sleep(0.15)  # somewhere in the steps and saves that follow
    kill_tree(process.pid)
    process.communicate()
    committed = max(int(m.parent.name[5:]) for m in (tmp_path / "run").glob("checkpoints/step_*/manifest.json"))
    steps = committed + 4
    # The learning rate depends on train.steps, which therefore stays; both runs are told to stop at the same step.
    long = ["--train.steps", "4000", "--train.eval_every", "0"]
    group(2)(ON_RANKS.train_until, arguments(tmp_path, "ddp", *FP64, *long), steps)
    group(2)(ON_RANKS.train_until, arguments(tmp_path / "whole", "ddp", *FP64, *long), steps)
    a, b = read_checkpoint(tmp_path / "whole" / "run", steps), read_checkpoint(tmp_path / "run", steps)
    assert largest_difference(a, b) == 0  # two ranks, same machine: bitwise
    assert [row["step"] for row in read_rows(tmp_path / "run")] == list(range(steps))


@slow
def test_killed_rank_under_lightnings_own_launcher(tmp_path):
    """The first process looks after the others every five seconds, and ends itself and all of them."""
    process = start("lightning", tmp_path)
    wait_for_checkpoint(process, tmp_path / "run")
    (child,) = psutil.Process(process.pid).children()
    child.kill()
    output, _ = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "finished" not in output and "stopped after" not in output


def test_a_signal_for_one_rank(group, tmp_path):
    """Rank 1 alone gets a SIGTERM; all ranks save after the same step. Lightning's own handler would end rank 1."""
    assert group(2)(ON_RANKS.terminated, arguments(tmp_path, "ddp", "--train.steps", "8"), 1) == [True, True]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record["steps_done"]) == ("stopped", 3)
    assert (tmp_path / "run" / "checkpoints" / "step_3" / "manifest.json").is_file()


@slow
@pytest.mark.parametrize(("launcher", "how"), [
    ("lightning", "stop file"), ("torchrun", "SIGTERM"), ("lightning", "SIGTERM"), ("lightning", "SIGINT"),
])  # fmt: skip
def test_told_to_stop(tmp_path, launcher, how):
    """All ranks agree on the step, save, and end; Lightning's own handlers would not save, and are out of the way."""
    process = start(launcher, tmp_path)
    wait_for_checkpoint(process, tmp_path / "run")
    if how == "stop file":
        (tmp_path / "run" / "stop").touch()
    else:
        process.send_signal(getattr(signal, how))
    output, _ = process.communicate(timeout=60)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "stopped", output
    done = record["steps_done"]
    assert (tmp_path / "run" / "checkpoints" / f"step_{done}" / "manifest.json").is_file()
    assert [row["step"] for row in read_rows(tmp_path / "run")] == list(range(done))
    assert f"stopped after {done} of 4000 steps" in output


@slow
@pytest.mark.slurm
@pytest.mark.alone
@pytest.mark.parametrize(("script", "options"), [
    ("lightning/train.py", ["--train.steps", "60"]),
    ("lightning/train_vision.py", ["--train.steps", "600", "--model.name", "small_cnn"]),
])  # fmt: skip
def test_requeued_by_slurm(cluster, script, options):
    """Slurm's warning goes to the batch script; the ranks save, the job is requeued once, and goes on."""
    job = cluster.submit("lightning/single_node.sbatch", *options, SCRIPT=script)
    cluster.wait_for_text(job, r"step +10 ")
    cluster.on_login("scancel", "--batch", "--signal=USR1", job)
    text = cluster.completed(job, timeout=240)
    assert cluster.show(job)["Restarts"] == "1"
    assert text.count("resumed from") == 1
    steps = int(options[1])
    assert f"finished after {steps} of {steps} steps" in text
    assert [row["step"] for row in read_rows(cluster.run_folder(job))] == list(range(steps))
    assert not list(ROOT.glob("hpc_ckpt*"))  # Lightning's own way to be requeued
