"""The loop under Fabric is the loop: equal to one process, whoever starts it; one checkpoint format for all."""

import json

import pytest
import torch
from equality import (
    SMALL,
    STEPS,
    assert_same_rows,
    assert_same_training,
    assert_trains_in_low_precision,
    largest_difference,
    read_checkpoint,
    read_rows,
    read_validation,
)
from launching import OnRanks, assert_refused

SCRIPT = "lightning/fabric_loop.py"
ON_RANKS = OnRanks("tests/lightning/lightning_on_ranks.py")
HALF = STEPS // 2
BASE = [*SMALL, "--train.steps", str(STEPS)]
FP64 = ["--train.precision", "fp64", "--batch.global_size", "48"]


def arguments(folder, name, *more):
    return [*BASE, "--runs_dir", str(folder), "--run_name", name, *more]


def train(group, world_size, folder, name, *more, script=SCRIPT):
    group(world_size)(ON_RANKS.train, arguments(folder, name, *more), script)
    return folder / name


# ---------------------------------------------------------------------------------------- against one process, exactly


@pytest.mark.parametrize(("world_size", "accumulation"), [
    (2, 4), (3, 1), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(3, 4, marks=pytest.mark.slow),
])  # fmt: skip
def test_fp64_is_the_proof(group, single_device, tmp_path, world_size, accumulation):
    """Within 1e-12: sums in another order differ by some 1e-16, and AdamW amplifies that a little."""
    micro = str(48 // world_size // accumulation)
    many = train(group, world_size, tmp_path, "many", *FP64, "--batch.micro_size", micro)
    assert_same_training(single_device(*BASE, *FP64), many)
    rows = read_rows(many)
    assert rows[-1]["tokens"] == STEPS * 48 * 16  # the effective batch, in steps of the optimizer
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.01 * STEPS  # something was learned, or equality would say little
    record = json.loads((many / "run.json").read_text())
    assert (record["framework"], record["strategy"], record["world_size"]) == ("lightning", "ddp", world_size)
    assert record["versions"]["lightning"].startswith("2.")


def test_gradients_travel_once_a_step(group, tmp_path):
    """With four micro-batches a step: sent with the last one only."""
    options = ["--train.steps", "3", "--batch.micro_size", "6", "--batch.global_size", "48"]
    for counts in group(2)(ON_RANKS.communication, arguments(tmp_path, "run", *options), True, SCRIPT):
        assert counts["gradients"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("variant", [["--model.tied", "true"], ["--train.activation_checkpointing", "true"]], ids=str)
def test_variants(group, single_device, tmp_path, variant):
    assert_same_training(single_device(*BASE, *FP64, *variant), train(group, 2, tmp_path, "many", *FP64, *variant))


def test_fp32_and_bf16(group, single_device, tmp_path):
    """fp32 rounds at 6e-8, and losses are of order 5; the low precision is Fabric's, not ours."""
    longer = ["--train.steps", "20"]
    one = single_device(*BASE, *longer)
    assert_same_rows(one, train(group, 2, tmp_path, "fp32", *longer), 1e-5)
    low = train(group, 2, tmp_path, "bf16", *longer, "--train.precision", "bf16")
    assert_trains_in_low_precision(one, low)
    assert read_rows(low)[0]["loss"] != read_rows(one)[0]["loss"]  # or autocast was never on


def test_why_fp64_is_not_fabrics_own():
    """The comment beside PRECISION: "64-true" returns fp32, "32-true" leaves a double as it is."""
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import LightningEnvironment

    for precision, dtype in (("64-true", torch.float32), ("32-true", torch.float64)):
        fabric = Fabric(accelerator="cpu", devices=1, precision=precision, plugins=LightningEnvironment())
        model = fabric.setup(torch.nn.Linear(2, 2).double())
        assert model(torch.ones(1, 2, dtype=torch.float64)).dtype == dtype


# --------------------------------------------------------------------------------------------------- resume and stop


def test_resume_is_exact_and_between_scripts(group, tmp_path):
    """Two ranks, same machine: bitwise. ddp/train.py goes on from Fabric's checkpoint, and Fabric from its own."""
    options = ["--train.eval_every", str(STEPS - 1)]
    whole = train(group, 2, tmp_path, "whole", *options, "--checkpoint.every", str(HALF))
    halfway = ["--resume", str(whole / "checkpoints" / f"step_{HALF}")]
    for name, script in (("fabric", SCRIPT), ("ddp", "ddp/train.py")):
        resumed = train(group, 2, tmp_path, name, *options, *halfway, script=script)
        rows = read_rows(resumed)
        assert [row["step"] for row in rows] == list(range(HALF, STEPS))
        # The norm of all gradients is a sum, and Fabric adds it up in the optimizer's order of the parameters.
        for mine, theirs in zip(rows, read_rows(whole)[HALF:], strict=True):
            assert mine["lr"] == theirs["lr"]
            assert abs(mine["loss"] - theirs["loss"]) <= (0 if name == "fabric" else 1e-6)
        late = {step: loss for step, loss in read_validation(whole).items() if step > HALF}
        assert read_validation(resumed) == (late if name == "fabric" else pytest.approx(late, abs=1e-6))
        if name == "fabric":
            assert largest_difference(read_checkpoint(whole, STEPS), read_checkpoint(resumed, STEPS)) == 0


def test_told_to_stop(group, tmp_path):
    group(2)(ON_RANKS.train_until, arguments(tmp_path, "run", "--train.steps", "8"), 4, SCRIPT)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record["steps_done"]) == ("stopped", 4)
    assert (tmp_path / "run" / "checkpoints" / "step_4" / "manifest.json").is_file()


# ---------------------------------------------------------------------------------------------------------- launchers


@pytest.mark.slow  # test_strategies.py starts train.py in this way
def test_lightnings_own_launcher(launch, single_device, tmp_path):
    """Plain python: Lightning starts the second process, and each has its own half of the batch."""
    result = launch(SCRIPT, *arguments(tmp_path, "own", *FP64, "--devices", "2"), nproc=0)
    assert f"finished after {STEPS} of {STEPS} steps" in result.stdout
    assert result.stdout.count("world size 2") == 1  # one run, not two beside each other
    assert_same_training(single_device(*BASE, *FP64), tmp_path / "own")
    assert json.loads((tmp_path / "own" / "run.json").read_text())["launcher"] == "lightning"


@pytest.mark.slow
@pytest.mark.slurm
def test_srun(cluster, single_device):
    """One task a device, as Lightning wants it under Slurm."""
    places = ["--runs_dir", str(cluster.folder / "runs"), "--run_name", "fabric-srun"]
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", "python", SCRIPT, *BASE, *FP64, *places]
    cluster.on_login(*command, timeout=200, DEVICE="cpu")
    run = cluster.folder / "runs" / "fabric-srun"
    assert_same_training(single_device(*BASE, *FP64), run)
    record = json.loads((run / "run.json").read_text())
    assert (record["launcher"], record["world_size"], len(record["hosts"])) == ("srun", 2, 2)


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(("more", "words"), [
    (["--devices", "3"], ["devices = 3", "torchrun started 2 process", "leave devices out"]),
    (["--devices", "0"], ["devices = 0", "1 or more"]),
    (["--device_count", "2"], ["unknown key device_count"]),
    (["--train.precision", "fp16"], ["train.precision = fp16", "bf16"]),
    (["--batch.global_size", "25"], ["global_size = 25", "2 data-parallel ranks"]),
    (["--data.path", "nowhere.txt"], ["nowhere.txt", "no such file"]),
    (["--network_profile", "token-ring"], ["token-ring"]),
])  # fmt: skip
def test_a_mistake_is_one_line_on_every_rank(group, tmp_path, more, words):
    for code, text in group(2)(ON_RANKS.ends, [*SMALL, "--runs_dir", str(tmp_path), *more], SCRIPT):
        lines = [line for line in text.splitlines() if "error: " in line]
        assert code == 2 and len(lines) == 1 and "Traceback" not in text, text
        assert all(word in lines[0] for word in words), lines


def test_a_mistake_under_lightnings_own_launcher(group):
    """The first process finds it before it has started any other."""
    given = ["--devices", "2", "--train.precision", "fp16"]
    assert_refused(group(1)(ON_RANKS.ends_by_plain_python, given, SCRIPT), "train.precision = fp16")
