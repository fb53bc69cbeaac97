"""FSDP must give the training of one process, whatever is sharded among whom, and say what it holds."""

import json
import math
import re

import pytest
from equality import (
    SMALL,
    STEPS,
    assert_same_first_gradients,
    assert_same_rows,
    assert_same_training,
    assert_trains_in_low_precision,
    largest_difference,
    read_checkpoint,
    read_rows,
)
from launching import SCRIPTS, assert_refused

SCRIPT = "fsdp/train.py"
BASE = [*SMALL, "--train.steps", str(STEPS), "--batch.global_size", "48"]
FP64 = ["--train.precision", "fp64"]


def arguments(folder, name, *more):
    return [*BASE, "--runs_dir", str(folder), "--run_name", name, *more]


@pytest.mark.parametrize(("ranks", "accumulation"), [
    (2, 4),
    (3, 1),
    *(pytest.param(*rest, marks=pytest.mark.slow) for rest in ((2, 1), (3, 4), (4, 1), (4, 4))),
])  # fmt: skip
def test_fp64_is_the_proof(group, single_device, tmp_path, ranks, accumulation):
    """3 does not divide the width: the last shard is padded. Tied where gradients accumulate, the harder case."""
    model = ["--model.tied", "true"] if accumulation > 1 else []
    micro = ["--batch.micro_size", str(48 // ranks // accumulation)]
    group(ranks)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *FP64, *model, *micro))
    assert_same_training(single_device(*BASE, *FP64, *model), tmp_path / "many")


@pytest.mark.parametrize(("ranks", "options"), [
    (2, ["--fsdp.reshard_after_forward", "false"]),
    (4, ["--fsdp.replicate", "2"]),
    pytest.param(4, ["--fsdp.replicate", "4"], marks=pytest.mark.slow),
    (2, ["--fsdp.cpu_offload", "true"]),
    (3, ["--fsdp.prefetch", "2"]),
    (2, ["--train.activation_checkpointing", "true"]),
    (2, ["--model.experts", "4"]),
    pytest.param(4, ["--train.compile", "true"], marks=pytest.mark.slow),  # a minute of compiling
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)  # fmt: skip
def test_every_option(group, single_device, tmp_path, ranks, options):
    model = options if options[0].startswith("--model") else []
    options = [*options, "--batch.micro_size", str(24 // ranks)]
    group(ranks)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *FP64, *options))
    assert_same_training(single_device(*BASE, *FP64, *model), tmp_path / "many")


@pytest.mark.parametrize(
    ("name", "lr", "parameters"),  # AdamW's division by small roots amplifies the last bits of fp32
    [("adamw", "0.003", 1e-4), pytest.param("sgd", "0.01", 1e-6, marks=pytest.mark.slow)],
)
def test_fp32(group, single_device, tmp_path, name, lr, parameters):
    options = ["--optimizer.name", name, "--optimizer.lr", lr]
    one = single_device(*BASE, *options)
    group(3)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *options))
    assert_same_rows(one, tmp_path / "many", 1e-5)
    a, b = read_checkpoint(one, STEPS), read_checkpoint(tmp_path / "many", STEPS)
    assert largest_difference(a, b, "model.") <= parameters


def test_first_gradients_in_fp32(group, single_device, tmp_path):
    options = ["--train.steps", "1", "--optimizer.clip", "1000"]
    one = single_device(*BASE, *options)
    group(4)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *options))
    assert_same_first_gradients(one, tmp_path / "many", 2 + 2 * 9 + 1)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains(group, single_device, tmp_path, precision):
    """The policy casts whole blocks where autocast casts operations: losses are close, not equal."""
    printed = group(2)(
        SCRIPTS.printed, SCRIPT, arguments(tmp_path, "low", "--train.steps", "20", "--train.precision", precision)
    )[0]
    low = {"bf16": "bfloat16", "fp16": "float16"}[precision]
    assert f"units in float32, gathered and computed with in {low}, gradients summed in float32" in printed
    one = single_device(*BASE)
    assert_trains_in_low_precision(one, tmp_path / "low")
    # Without the scaler's factor, in the first step that it did not skip.
    norm = next(row["grad_norm"] for row in read_rows(tmp_path / "low") if row["grad_norm"] is not None)
    assert 0.7 < norm / read_rows(one)[0]["grad_norm"] < 1.4


def test_fp16_goes_on_with_its_scale(group, tmp_path):
    """The scaler's factor and its count of good steps are state: without them this resume would differ, bit by bit."""
    options = [*SMALL, "--batch.global_size", "48", "--train.precision", "fp16", "--runs_dir", str(tmp_path)]
    whole, cut = ([*options, "--train.steps", "4", "--run_name", name] for name in ("whole", "cut"))
    group(2)(SCRIPTS.train, SCRIPT, whole)
    group(2)(SCRIPTS.train_until, SCRIPT, cut, 2)
    group(2)(SCRIPTS.train, SCRIPT, cut)
    manifests = [tmp_path / name / "checkpoints" / "step_4" / "manifest.json" for name in ("whole", "cut")]
    scalers = [json.loads(path.read_text())["extra"]["scaler"] for path in manifests]
    assert scalers[0] == scalers[1]
    assert scalers[0]["_growth_tracker"] > 2 or scalers[0]["scale"] < 65536, "the start's state would pass as well"
    assert largest_difference(*(read_checkpoint(tmp_path / name, 4) for name in ("whole", "cut"))) == 0
    assert [row["loss"] for row in read_rows(tmp_path / "whole")] == [
        row["loss"] for row in read_rows(tmp_path / "cut")
    ]


@pytest.mark.parametrize(
    ("ranks", "replicate", "tied"), [(2, 1, "false"), (2, 1, "true"), (4, 2, "false"), (3, 1, "false")]
)
def test_units_and_bytes_per_rank(group, tmp_path, ranks, replicate, tied):
    """One unit a block and the root; a rank keeps 1/n of each parameter's rows, rounded up."""
    options = ["--train.steps", "2", "--fsdp.replicate", str(replicate), "--model.tied", tied]
    printed = group(ranks)(SCRIPTS.printed, SCRIPT, arguments(tmp_path, "many", *options))[0]
    units, kind, mine, whole = re.search(
        r"(\d+) FSDP units in (\w+): this rank keeps ([\d,]+) of ([\d,]+) bytes", printed
    ).groups()
    weights = {n: t for n, t in read_checkpoint(tmp_path / "many", 2).items() if n.startswith("model.")}
    rows = sum(-(-t.shape[0] // (ranks // replicate)) * math.prod(t.shape[1:]) for t in weights.values())
    assert (int(units), kind) == (1 + 2, "float32")
    assert int(mine.replace(",", "")) == 4 * rows
    assert int(whole.replace(",", "")) == 4 * sum(t.numel() for t in weights.values())


@pytest.mark.parametrize(("options", "words"), [
    (["--fsdp.replicate", "3"], "fsdp.replicate = 3 with 2 ranks"),
    (["--fsdp.replicate", "0"], "expected a divisor of the ranks"),
    (["--fsdp.prefetch", "-1"], "fsdp.prefetch = -1"),
    (["--fsdp.shard", "2"], "unknown key fsdp.shard"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)  # fmt: skip
def test_bad_input(group, tmp_path, options, words):
    assert_refused(group(2)(SCRIPTS.ends, SCRIPT, arguments(tmp_path, "bad", *options)), words)


@pytest.mark.parametrize(("first", "then"), [
    (("fsdp/train.py", 2), ("fsdp/train.py", 3)),
    (("ddp/train.py", 2), ("fsdp/train.py", 4)),
    pytest.param(("fsdp/train.py", 4), ("fsdp/train.py", 2), marks=pytest.mark.slow),
    pytest.param(("fsdp/train.py", 3), ("fsdp/train.py", 1), marks=pytest.mark.slow),
    pytest.param(("fsdp/train.py", 2), ("ddp/train.py", 3), marks=pytest.mark.slow),
], ids=lambda value: f"{value[0].split('/')[0]} on {value[1]}")  # fmt: skip
def test_resume_elsewhere(group, single_device, tmp_path, first, then):
    """Half of the steps on some ranks, the others on other ranks, or under another strategy: those of one process."""
    (script, ranks), (next_script, next_ranks) = first, then
    group(ranks)(SCRIPTS.train_until, script, arguments(tmp_path, "many", *FP64), STEPS // 2)
    assert len(read_rows(tmp_path / "many")) == STEPS // 2
    group(next_ranks)(SCRIPTS.train, next_script, arguments(tmp_path, "many", *FP64))
    assert_same_training(single_device(*BASE, *FP64), tmp_path / "many")
