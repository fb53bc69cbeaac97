"""A run that was interrupted anywhere, and goes on, is the run that was not."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from equality import SMALL as MODEL
from equality import STEPS, largest_difference, read_checkpoint, read_rows, read_validation
from launching import ROOT, SCRIPTS, OnRanks, clean_environment, kill_tree

ON_RANKS = OnRanks("tests/ddp/starts_on_ranks.py")
HALF = STEPS // 2
SMALL = [*MODEL, "--optimizer.warmup_steps", "1"]


def arguments(folder, name, *more):
    return [*SMALL, "--train.steps", str(STEPS), "--runs_dir", str(folder), "--run_name", name, *more]


def read_manifest(run, step):
    return json.loads((run / "checkpoints" / f"step_{step}" / "manifest.json").read_text())


def cut_back(run, step):
    """Make of a finished run what a kill after its checkpoint at `step` leaves behind."""
    for later in (run / "checkpoints").glob("step_*"):
        if later.name != f"step_{step}":
            shutil.rmtree(later)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, group):
    """Runs of two ranks with checkpoints at half time and at the end, made once for each precision."""
    made = {}

    def get(precision):
        if precision not in made:
            made[precision] = tmp_path_factory.mktemp("undisturbed") / "run"
            options = ["--train.precision", precision, "--checkpoint.every", str(HALF), "--train.eval_every", "1"]
            group(2)(SCRIPTS.train, "ddp/train.py", arguments(made[precision].parent, "run", *options))
        return made[precision]

    return get


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_same_world_size_is_bitwise(group, undisturbed, tmp_path, precision):
    """Weights, both moments, step counts, the scaler with its count of steps, data, learning rates, evaluations."""
    whole = undisturbed(precision)
    shutil.copytree(whole, tmp_path / "run")
    cut_back(tmp_path / "run", HALF)
    options = ["--train.precision", precision, "--checkpoint.every", str(HALF), "--train.eval_every", "1"]
    group(2)(SCRIPTS.train, "ddp/train.py", arguments(tmp_path, "run", *options))
    a, b = read_checkpoint(whole, STEPS), read_checkpoint(tmp_path / "run", STEPS)
    assert largest_difference(a, b) == 0
    counts = {tensor.item() for name, tensor in b.items() if name.endswith(".step")}
    assert counts == {STEPS}
    extra = read_manifest(tmp_path / "run", STEPS)["extra"]
    assert extra == read_manifest(whole, STEPS)["extra"]
    assert extra.get("scaler", {}).get("_growth_tracker") == (STEPS if precision == "fp16" else None)
    rows = read_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(STEPS))  # cut back to the checkpoint, then written once
    for mine, theirs in zip(rows, read_rows(whole), strict=True):
        assert all(mine[key] == theirs[key] for key in ("step", "tokens", "loss", "grad_norm", "lr"))
    assert read_validation(tmp_path / "run") == read_validation(whole)


@pytest.mark.parametrize(
    ("script", "world_size"), [("ddp/single_device.py", 1), ("ddp/train.py", 3), ("ddp/train.py", 4)]
)
def test_another_world_size_goes_on_with_the_same_training(group, undisturbed, tmp_path, script, world_size):
    whole = undisturbed("fp64")
    options = ["--train.precision", "fp64", "--resume", str(whole / "checkpoints" / f"step_{HALF}")]
    group(world_size)(SCRIPTS.train, script, arguments(tmp_path, "other", *options))
    # fp64 sums in another order: 1e-12, as in test_train_equality.py
    a, b = read_checkpoint(whole, STEPS), read_checkpoint(tmp_path / "other", STEPS)
    assert largest_difference(a, b) <= 1e-12
    rows = read_rows(tmp_path / "other")
    assert [row["step"] for row in rows] == list(range(HALF, STEPS))
    for mine, theirs in zip(rows, read_rows(whole)[HALF:], strict=True):
        assert abs(mine["loss"] - theirs["loss"]) <= 1e-12


def test_nothing_to_do_is_said(group, undisturbed):
    whole = undisturbed("fp64")
    more = ["--train.precision", "fp64"]
    [output] = group(1)(SCRIPTS.printed, "ddp/train.py", arguments(whole.parent, "run", *more))
    assert f"nothing to do: {STEPS} of {STEPS} steps were done already" in output
    assert len(read_rows(whole)) == STEPS


def start(folder, name, *more):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "ddp/train.py"]
    return subprocess.Popen([*command, *arguments(folder, name, *more)], cwd=ROOT, env=clean_environment(DEVICE="cpu"),
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip


def wait_for_checkpoint(process, run, timeout=90):
    deadline = time.monotonic() + timeout
    while not list(run.glob("checkpoints/step_*/manifest.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.02)


LONG = ["--train.steps", "400", "--checkpoint.every", "5", "--train.precision", "fp64"]


@pytest.mark.slow
def test_killed_in_mid_run(group, tmp_path):
    """SIGKILL for all processes at once, as a power cut would; what was committed is found and goes on."""
    process = start(tmp_path, "killed", *LONG)
    wait_for_checkpoint(process, tmp_path / "killed")
    time.sleep(0.15)  # somewhere in the steps and saves that follow
    kill_tree(process.pid)
    process.communicate()
    committed = max(int(m.parent.name[5:]) for m in (tmp_path / "killed").glob("checkpoints/step_*/manifest.json"))
    steps = committed + 4
    after = ["--train.steps", "400", "--train.precision", "fp64"]
    # The learning rate depends on train.steps, which therefore stays; both runs are told to stop at the same step.
    group(2)(SCRIPTS.train_until, "ddp/train.py", arguments(tmp_path, "killed", *after), steps)
    group(2)(SCRIPTS.train_until, "ddp/train.py", arguments(tmp_path, "whole", *after), steps)
    last = max(int(m.parent.name[5:]) for m in (tmp_path / "whole").glob("checkpoints/step_*/manifest.json"))
    a, b = read_checkpoint(tmp_path / "whole", last), read_checkpoint(tmp_path / "killed", last)
    assert largest_difference(a, b) == 0  # two ranks, same machine: bitwise
    assert [row["step"] for row in read_rows(tmp_path / "killed")] == list(range(last))


@pytest.mark.parametrize(("script", "size", "how"), [
    ("ddp/train.py", 2, "SIGTERM"), ("ddp/train.py", 3, "stop file"), ("ddp/single_device.py", 1, "SIGINT"),
])  # fmt: skip
def test_told_to_stop(group, tmp_path, script, size, how):
    """All ranks agree on the step, save, and end, and what follows is the training that was not told to."""
    options = ["--train.precision", "fp64", "--train.steps", "9"]
    output = "".join(group(size)(ON_RANKS.told_to_stop, script, arguments(tmp_path, "run", *options), how, 1))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    done = (
        2 if how == "stop file" else 3
    )  # the wish travels with step 0's or step 1's numbers, and is read a step later
    assert (record["status"], record["steps_done"]) == ("stopped", done)
    assert read_manifest(tmp_path / "run", done)["step"] == done
    assert [row["step"] for row in read_rows(tmp_path / "run")] == list(range(done))
    assert output.count(f"stopped after {done} of 9 steps") == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "stop file"])
def test_told_to_stop_under_torchrun(tmp_path, how):
    """All ranks agree on the step, save, and end; nothing that was done is lost."""
    process = start(tmp_path, "run", *LONG, "--train.steps", "4000")
    wait_for_checkpoint(process, tmp_path / "run")
    if how == "stop file":
        (tmp_path / "run" / "stop").touch()
    else:
        process.send_signal(getattr(signal, how))
    output, _ = process.communicate(timeout=60)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "stopped"
    done = record["steps_done"]
    assert (tmp_path / "run" / "checkpoints" / f"step_{done}" / "manifest.json").is_file()
    assert [row["step"] for row in read_rows(tmp_path / "run")] == list(range(done))
    assert f"stopped after {done} of 4000 steps" in output
