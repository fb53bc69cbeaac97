"""Stages, slices and shards together must give the training of one process, whatever the mesh."""

import re

import pytest
from equality import (
    SMALL,
    STEPS,
    assert_same_first_gradients,
    assert_same_training,
    assert_trains_in_low_precision,
    read_checkpoint,
    read_rows,
)
from launching import SCRIPTS, assert_refused

SCRIPT = "model_parallel/hybrid_parallel.py"
# Heads, neurons, vocabulary and sequence divide by 2 and 3; four layers make four stages.
EVEN = ["--model.layers", "4", "--model.heads", "12", "--model.kv_heads", "12", "--model.width", "48",
        "--model.ffn_width", "48", "--model.vocabulary", "264", "--data.sequence_length", "24"]  # fmt: skip
BASE = [*SMALL, *EVEN, "--train.steps", str(STEPS), "--batch.global_size", "24"]
FP64, TIED = ["--train.precision", "fp64"], ["--model.tied", "true"]


def arguments(folder, name, *more):
    return [*BASE, "--runs_dir", str(folder), "--run_name", name, "--batch.micro_size", "3", *more]


def mesh(pp, dp, tp):
    return ["--mesh.pp", str(pp), "--mesh.dp", str(dp), "--mesh.tp", str(tp)]


@pytest.mark.parametrize(("ranks", "options"), [
    (8, []),  # 2 × 2 × 2
    (4, [*mesh(2, 1, 2), "--sequence_parallel", "false", "--schedule", "zero_bubble"]),
    pytest.param(4, [*mesh(2, 2, 1), "--schedule", "interleaved"], marks=pytest.mark.slow),
    pytest.param(4, [*mesh(2, 1, 2), "--schedule", "gpipe", "--batch.micro_size", "24"],  # one micro-batch
                 marks=pytest.mark.slow),
    pytest.param(4, [*mesh(2, 1, 2), "--train.activation_checkpointing", "true"], marks=pytest.mark.slow),
    pytest.param(2, mesh(2, 1, 1), marks=pytest.mark.slow),
    pytest.param(8, ["--schedule", "zero_bubble"], marks=pytest.mark.slow),
    pytest.param(8, ["--schedule", "interleaved", "--sequence_parallel", "false"], marks=pytest.mark.slow),
    pytest.param(8, ["--schedule", "gpipe"], marks=pytest.mark.slow),
    pytest.param(8, mesh(4, 2, 1), marks=pytest.mark.slow),
    pytest.param(8, mesh(2, 4, 1), marks=pytest.mark.slow),
    pytest.param(6, mesh(3, 2, 1), marks=pytest.mark.slow),  # unequal stages
    pytest.param(6, mesh(2, 1, 3), marks=pytest.mark.slow),
], ids=lambda value: " ".join(value).replace("--", "") if isinstance(value, list) else None)  # fmt: skip
def test_fp64_is_the_proof(group, single_device, tmp_path, ranks, options):
    """Tied, the harder case: two stages hold the weight, each of their ranks a shard of a slice of it."""
    group(ranks)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *FP64, *TIED, *options))
    assert_same_training(single_device(*BASE, *FP64, *TIED), tmp_path / "many")


def test_untied(group, single_device, tmp_path):
    group(4)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *FP64, *mesh(2, 2, 1)))
    assert_same_training(single_device(*BASE, *FP64), tmp_path / "many")


def test_evaluation_during_training(group, single_device, tmp_path):
    options = ["--train.steps", "4", "--train.eval_every", "2"]
    group(4)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *FP64, *options, *mesh(2, 2, 1)))
    assert_same_training(single_device(*BASE, *FP64, *options), tmp_path / "many")


def test_first_gradients_in_fp32(group, single_device, tmp_path):
    """Untied, with slices."""
    options = ["--train.steps", "1", "--optimizer.clip", "1000"]
    one = single_device(*BASE, *options)
    group(4)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *options, *mesh(2, 1, 2)))
    assert_same_first_gradients(one, tmp_path / "many", 2 + 4 * 9 + 1)


def test_bf16_trains(group, single_device, tmp_path):
    """The policy casts whole blocks where autocast casts operations: losses are close, not equal."""
    options = ["--train.precision", "bf16", "--train.steps", "20", "--batch.micro_size", "12"]
    group(4)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "low", *options))
    assert_trains_in_low_precision(single_device(*BASE), tmp_path / "low")


def test_bytes_on_each_rank(group, tmp_path):
    """1/tp of the stage's matrices; its norms whole, because tensor ranks need them whole and dp is 1."""
    options = ["--train.steps", "1", *mesh(2, 1, 2)]
    printed = group(4)(SCRIPTS.printed, SCRIPT, arguments(tmp_path, "many", *options))[0]
    stages = [0, 0]
    for name, tensor in read_checkpoint(tmp_path / "many", 1).items():
        if name.startswith("model."):
            name = name.removeprefix("model.")
            stage = int(name.split(".")[1]) // 2 if name.startswith("blocks.") else int(name != "embedding.weight")
            stages[stage] += 4 * tensor.numel() // (2 if tensor.ndim > 1 else 1)
    least, most = re.search(r"2 × 1 × 2 ranks keep ([\d,]+) to ([\d,]+) bytes", printed).groups()
    assert [int(number.replace(",", "")) for number in (least, most)] == sorted(stages)
    assert stages[0] != stages[1]  # the last norm


@pytest.mark.parametrize(("ranks", "options", "words"), [
    (4, mesh(2, 2, 2), "mesh.pp = 2, mesh.dp = 2, mesh.tp = 2 with 4 ranks; expected a product of 4"),
    (3, [], "mesh.pp = 2, mesh.dp = None, mesh.tp = 2 with 3 ranks"),
    (2, mesh(1, 1, 2), "mesh.pp = 1; expected 2 or more stages"),
    (2, mesh(0, 1, 2), "mesh.pp = 0"),
    (4, [*mesh(2, 1, 2), "--model.heads", "3", "--model.kv_heads", "3"], "model.heads = 3, which does not divide"),
    (4, [*mesh(4, 1, 1), "--model.layers", "3"], "expected a layer for each"),
    (4, [*mesh(2, 2, 1), "--batch.micro_size", "12"], "1 micro-batches"),
    (4, ["--model.experts", "4"], "set it to 0"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)  # fmt: skip
def test_bad_input(group, tmp_path, ranks, options, words):
    assert_refused(group(ranks)(SCRIPTS.ends, SCRIPT, arguments(tmp_path, "bad", *options)), words)


@pytest.mark.parametrize(("first", "then"), [
    ((SCRIPT, 4, *mesh(2, 1, 2)), ("fsdp/train.py", 3, "--batch.micro_size", "4")),
    (("ddp/train.py", 2), (SCRIPT, 4, *mesh(2, 2, 1))),
    pytest.param((SCRIPT, 8), (SCRIPT, 4, *mesh(4, 1, 1)), marks=pytest.mark.slow),
    pytest.param(("model_parallel/pipeline_parallel.py", 2), (SCRIPT, 8, "--schedule", "interleaved"),
                 marks=pytest.mark.slow),
], ids=lambda value: " ".join(map(str, value)).replace("/", " "))  # fmt: skip
def test_resume_elsewhere(group, single_device, tmp_path, first, then):
    """Half of the steps one way, half another, on other ranks: those of one process."""
    (script, ranks, *more), (next_script, next_ranks, *next_more) = first, then
    group(ranks)(SCRIPTS.train_until, script, arguments(tmp_path, "many", *FP64, *TIED, *more), STEPS // 2)
    assert len(read_rows(tmp_path / "many")) == STEPS // 2
    group(next_ranks)(SCRIPTS.train, next_script, arguments(tmp_path, "many", *FP64, *TIED, *next_more))
    assert_same_training(single_device(*BASE, *FP64, *TIED), tmp_path / "many")
