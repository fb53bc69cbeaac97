"""DDP must give the training of one process: losses, gradients, parameters; at any world size and accumulation."""

import pytest
import torch
from equality import (
    SMALL,
    assert_same_rows,
    assert_same_training,
    largest_difference,
    read_checkpoint,
    read_rows,
)  # fmt: skip

STEPS = 20


BASE = [*SMALL, "--train.steps", str(STEPS)]


def arguments(tmp_path, name, *more):
    return [*BASE, "--runs_dir", str(tmp_path), "--run_name", name, *more]


@pytest.fixture
def reference(single_device):
    return lambda *options: single_device(*BASE, *options)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_fp64_is_the_proof(group, reference, tmp_path, world_size, accumulation):
    """Within 1e-12 over 20 steps: sums in another order differ by some 1e-16, and AdamW amplifies that a little."""
    options = ["--train.precision", "fp64", "--batch.global_size", "48"]
    one = reference(*options)
    micro = 48 // world_size // accumulation
    many = arguments(tmp_path, "many", *options, "--batch.micro_size", str(micro))
    group(world_size)("tests/ddp/cases.py", "train", "ddp/train.py", many)
    assert_same_training(one, tmp_path / "many")


@pytest.mark.parametrize(
    ("name", "lr", "world_size", "parameters"), [("adamw", "0.003", 3, 1e-4), ("sgd", "0.01", 2, 1e-6)]
)
def test_fp32(group, reference, tmp_path, name, lr, world_size, parameters):
    """fp32 rounds at 6e-8; AdamW divides by the root of tiny second moments, which amplifies the last bits."""
    options = ["--optimizer.name", name, "--optimizer.lr", lr]
    one = reference(*options)
    group(world_size)("tests/ddp/cases.py", "train", "ddp/train.py", arguments(tmp_path, "many", *options))
    assert_same_rows(one, tmp_path / "many", 1e-5)
    a, b = read_checkpoint(one, STEPS), read_checkpoint(tmp_path / "many", STEPS)
    assert largest_difference(a, b, "model.") <= parameters


def test_first_gradients_in_fp32(group, reference, tmp_path):
    """After one step AdamW's exp_avg is 0.1 times the clipped gradient: a factor of 2 hides from AdamW, not here."""
    options = ["--train.steps", "1", "--optimizer.clip", "1000"]
    one = reference(*options)
    group(4)("tests/ddp/cases.py", "train", "ddp/train.py", arguments(tmp_path, "many", *options))
    a, b = (
        {name: tensor / 0.1 for name, tensor in read_checkpoint(run, 1).items() if name.endswith("exp_avg")}
        for run in (one, tmp_path / "many")
    )
    assert len(a) == 2 + 2 * 9 + 1  # embedding and head, nine weights in each of two blocks, the last norm
    assert largest_difference(a, b) <= 1e-5


@pytest.mark.parametrize("options", [
    ["--model.tied", "true"],
    ["--train.activation_checkpointing", "true", "--batch.micro_size", "4"],
    ["--model.experts", "4"],
], ids=["tied", "activation checkpointing", "mixture of experts"])  # fmt: skip
def test_variants_in_fp64(group, reference, tmp_path, options):
    options = [*options, "--train.precision", "fp64"]
    one = reference(*options)
    group(3)("tests/ddp/cases.py", "train", "ddp/train.py", arguments(tmp_path, "many", *options))
    assert_same_training(one, tmp_path / "many")


def test_parameters_have_moved(reference):
    """A training whose optimizer saw zero gradients would be equal everywhere, and worthless."""
    one = reference()
    first, last = (
        read_checkpoint(reference("--train.steps", "1", "--optimizer.clip", "1000"), 1),
        read_checkpoint(one, STEPS),
    )
    for name, tensor in first.items():
        if name.startswith("model."):
            assert (tensor - last[name]).abs().max() > 1e-4, name
    rows = read_rows(one)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains(group, reference, tmp_path, precision):
    """Autocast over fp32 weights: the loss falls as in fp32; 2e-2 is some five bf16 roundings (2^-8) of a loss of 5."""
    group(2)("tests/ddp/cases.py", "train", "ddp/train.py", arguments(tmp_path, "low", "--train.precision", precision))
    one = read_rows(reference())
    low = read_rows(tmp_path / "low")
    assert abs(low[0]["loss"] - one[0]["loss"]) < 2e-2
    assert low[-1]["loss"] < low[0]["loss"] - 0.5
    weights = read_checkpoint(tmp_path / "low", STEPS)
    assert all(tensor.dtype == torch.float32 for name, tensor in weights.items() if name.startswith("model."))
