"""Lightning's Trainer on images trains what the loop of ddp/train_vision.py trains, rank for rank."""

import json

import pytest
import torch
from equality import STEPS, largest_difference, read_checkpoint, read_rows
from launching import OnRanks
from PIL import Image

ON_RANKS = OnRanks("tests/lightning/lightning_on_ranks.py")
VISION = OnRanks("tests/lightning/vision_on_ranks.py")
SCRIPT, LOOP = "lightning/train_vision.py", "ddp/train_vision.py"
SMALL = ["--model.name", "small_cnn", "--optimizer.warmup_steps", "3"]
FP64 = ["--train.precision", "fp64", "--train.label_smoothing", "0.1", "--optimizer.clip", "1.0"]


def train(group, world_size, folder, name, *more, script=SCRIPT):
    """Train small_cnn on `world_size` ranks; returns the run folder."""
    arguments = [*SMALL, "--runs_dir", str(folder), "--run_name", name, *more]
    group(world_size)(ON_RANKS.train, arguments, script)
    return folder / name


def read_evaluations(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: (row["val_loss"], row["accuracy"]) for row in rows if "val_loss" in row}


def assert_same(one, two, tolerance, first_step=0):
    """Losses, norms and rates of the steps from `first_step` on, evaluations, and all of the last checkpoint."""
    rows, others = read_rows(one)[first_step:], read_rows(two)
    assert len(rows) == len(others) > 0
    for a, b in zip(rows, others, strict=True):
        assert (a["step"], a["images"], a["lr"]) == (b["step"], b["images"], b["lr"])
        assert abs(a["loss"] - b["loss"]) <= tolerance, (a, b)
        assert abs(a["grad_norm"] - b["grad_norm"]) <= tolerance * max(1, a["grad_norm"]), (a, b)
    found = read_evaluations(two)
    assert found.keys() == {step for step in read_evaluations(one) if step > first_step} and found
    for step, (loss, accuracy) in found.items():
        expected = read_evaluations(one)[step]
        assert abs(loss - expected[0]) <= tolerance
        assert accuracy == expected[1]
    last = others[-1]["step"] + 1
    a, b = read_checkpoint(one, last), read_checkpoint(two, last)
    assert any("running_var" in name for name in a) and any("momentum_buffer" in name for name in a)
    assert largest_difference(a, b) <= tolerance


# BatchNorm makes of each cut of the batch another training: compared are equal cuts. In the last row 359 validation
# images make 8, 8 and 7 batches of 17: a collective in every evaluation step would wait for ever.
@pytest.mark.parametrize(("world_size", "global_size", "micro_size"), [
    (1, 48, 12), (2, 48, 6), (3, 102, 17),
    pytest.param(1, 48, 48, marks=pytest.mark.slow), pytest.param(2, 48, 24, marks=pytest.mark.slow),
])  # fmt: skip
def test_fp64_is_the_proof(group, tmp_path, world_size, global_size, micro_size):
    """1e-12: the same sums in the same order, but for Lightning's division by the accumulation."""
    options = [*FP64, "--train.steps", str(STEPS), "--train.eval_every", str(STEPS - 1),
               "--train.check_replicas_every", "1",
               "--batch.global_size", str(global_size), "--batch.micro_size", str(micro_size),
               "--checkpoint.every", "1", "--checkpoint.keep", "99"]  # fmt: skip
    loop = train(group, world_size, tmp_path, "loop", *options, script=LOOP)
    trainer = train(group, world_size, tmp_path, "trainer", *options)
    assert_same(loop, trainer, 1e-12)
    assert sorted(read_evaluations(trainer)) == [STEPS - 1, STEPS]
    first, second = read_checkpoint(loop, 1), read_checkpoint(trainer, 1)
    assert largest_difference(first, second, "optimizer.") <= 1e-12  # SGD's velocity is the gradient, after one step
    rows = read_rows(trainer)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.01 * STEPS  # something was learned, or equality would say little
    record = json.loads((trainer / "run.json").read_text())
    assert (record["framework"], record["unit"], record["world_size"]) == ("lightning", "images", world_size)
    assert record["flops_per_unit"] == json.loads((loop / "run.json").read_text())["flops_per_unit"]


def test_steps_images_and_messages(group, tmp_path):
    """Three steps of 48 images in micro-batches of 6: 3 updates, 3 sends of all gradients, 72 images on each rank."""
    options = [*SMALL, "--train.steps", "3", "--batch.micro_size", "6", "--runs_dir", str(tmp_path)]
    for counts in group(2)(VISION.counted, options):
        assert counts == {"steps": 3, "sent": 3, "images": 72}


def test_resume_is_exact_and_between_scripts(group, tmp_path):
    """From step 3, between two evaluations: Lightning bitwise, and the loop of ddp/ from Lightning's checkpoint too."""
    options = ["--train.steps", "7", "--train.eval_every", "2", "--batch.micro_size", "12"]
    whole = train(group, 2, tmp_path, "whole", *options, "--checkpoint.every", "3", "--checkpoint.keep", "9")
    for name, script in (("trainer", SCRIPT), ("loop", LOOP)):
        halfway = ["--resume", str(whole / "checkpoints" / "step_3")]
        resumed = train(group, 2, tmp_path, name, *options, *halfway, script=script)
        # fp32 rounds at 6e-8; an accumulation of 2 divides without rounding, and so the loop is as near.
        assert_same(whole, resumed, 0 if name == "trainer" else 1e-6, first_step=3)


def test_told_to_stop_and_nothing_to_do(group, tmp_path):
    """At a SIGTERM all ranks save after the same step, without evaluating; started again it goes on, or has nothing
    to do."""
    arguments = [*SMALL, "--train.steps", "6", "--runs_dir", str(tmp_path), "--run_name", "run"]
    assert group(2)(ON_RANKS.terminated, arguments, 2, SCRIPT) == [True, True]
    run = tmp_path / "run"
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["steps_done"]) == ("stopped", 4)
    assert (run / "checkpoints" / "step_4" / "manifest.json").is_file()
    assert read_evaluations(run) == {}
    for _ in range(2):
        train(group, 2, tmp_path, "run", "--train.steps", "6")
        assert [row["step"] for row in read_rows(run)] == list(range(6))
        assert list(read_evaluations(run)) == [6]


@pytest.mark.slow
def test_a_folder_with_fewer_validation_images_than_ranks(group, tmp_path):
    """The third rank has nothing to validate, and nobody waits for it."""
    for part, count in (("train", 9), ("val", 1)):
        for label in ("cat", "dog"):
            (tmp_path / part / label).mkdir(parents=True)
            for number in range(count):
                color = (20 * number, 90, 200 if label == "cat" else 30)
                Image.new("RGB", (12, 12), color).save(tmp_path / part / label / f"{number}.png")
    options = ["--data.source", "folder", "--data.path", str(tmp_path), "--data.image_size", "8", *FP64,
               "--batch.global_size", "6", "--train.steps", "4", "--train.eval_every", "2"]  # fmt: skip
    loop = train(group, 3, tmp_path, "loop", *options, script=LOOP)
    assert_same(loop, train(group, 3, tmp_path, "trainer", *options), 1e-12)


@pytest.mark.slow
def test_bf16_and_groupnorm(group, tmp_path):
    """Autocast over fp32 weights and fp32 statistics; GroupNorm keeps no statistics, so nothing has to be averaged."""
    options = ["--train.steps", "12", "--train.check_replicas_every", "1"]
    run = train(group, 2, tmp_path, "low", *options, "--train.precision", "bf16")
    rows = read_rows(run)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    weights = {name: t for name, t in read_checkpoint(run, 12).items() if name.startswith("model.")}
    assert {t.dtype for name, t in weights.items() if "num_batches" not in name} == {torch.float32}
    full = train(group, 2, tmp_path, "full", *options)
    assert read_rows(full)[0]["loss"] != rows[0]["loss"]  # or autocast was never on
    one, two = (train(group, n, tmp_path, f"group{n}", *options, *FP64, "--model.norm", "group") for n in (1, 2))
    for a, b in zip(read_rows(one), read_rows(two), strict=True):
        assert abs(a["loss"] - b["loss"]) <= 1e-12  # without BatchNorm two ranks train what one trains


@pytest.mark.slow
def test_resnet50_under_lightnings_own_launcher(launch, tmp_path):
    """Plain python: Lightning starts the second process."""
    options = ["--devices", "2", "--model.name", "resnet50", "--train.steps", "2", "--batch.global_size", "8"]
    result = launch(SCRIPT, *options, "--run_name", "resnet", nproc=0, timeout=250)
    assert "finished after 2 of 2 steps" in result.stdout and result.stdout.count("world size 2") == 1
    weights = read_checkpoint(tmp_path / "runs" / "resnet", 2)
    assert weights["model.conv1.weight"].shape == (64, 1, 3, 3)  # the stem for small images
    assert weights["model.layer4.2.conv3.weight"].shape == (2048, 512, 1, 1)
    assert not [line for line in result.stderr.splitlines() if "warn" in line.lower()]


@pytest.mark.parametrize(("more", "words"), [
    (["--devices", "3"], ["devices = 3", "torchrun started 2 process"]),
    (["--batch.global_size", "25"], ["global_size = 25", "2 data-parallel ranks"]),
    (["--batch.micro_size", "1"], ["1 image", "batch.micro_size", "--model.norm group"]),
    (["--model.sync_batchnorm", "true"], ["model.sync_batchnorm", "GPUs only"]),
    (["--data.source", "folder", "--data.path", "nowhere"], ["nowhere", "train/CLASS"]),
    (["--train.precision", "fp16"], ["train.precision = fp16", "use bf16"]),
    (["--model.nrom", "group"], ["model.nrom", "did you mean model.norm"]),
])  # fmt: skip
def test_a_mistake_is_one_line_on_every_rank(group, tmp_path, more, words):
    for code, text in group(2)(ON_RANKS.ends, [*SMALL, "--runs_dir", str(tmp_path), *more], SCRIPT):
        lines = [line for line in text.splitlines() if "error: " in line]
        assert code == 2 and len(lines) == 1 and "Traceback" not in text, text
        assert all(word in lines[0] for word in words), lines


def test_a_mistake_found_while_training_is_one_line_too(group, tmp_path):
    """A loss that is not a number is seen inside the Trainer, which passes the end on."""
    options = [*SMALL, "--runs_dir", str(tmp_path), "--optimizer.lr", "1e30", "--train.steps", "20"]
    for code, text in group(2)(ON_RANKS.ends, options, SCRIPT):
        lines = [line for line in text.splitlines() if "error: " in line]
        assert code == 2 and len(lines) == 1 and "Traceback" not in text, text
        assert "the loss is" in lines[0] and "optimizer.lr" in lines[0]
