"""DDP must give the training of one process: losses, gradients, parameters; at any world size and accumulation."""

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
from launching import SCRIPTS, OnRanks

ON_RANKS = OnRanks("tests/ddp/starts_on_ranks.py")
BASE = [*SMALL, "--train.steps", str(STEPS)]


def arguments(tmp_path, name, *more):
    return [*BASE, "--runs_dir", str(tmp_path), "--run_name", name, *more]


@pytest.fixture
def reference(single_device):
    return lambda *options: single_device(*BASE, *options)


@pytest.mark.parametrize(("world_size", "accumulation"), [
    (2, 1), (3, 4), (4, 1),
    *(pytest.param(*more, marks=pytest.mark.slow) for more in ((2, 4), (3, 1), (4, 4))),
])  # fmt: skip
def test_fp64_is_the_proof(group, reference, tmp_path, world_size, accumulation):
    """Within 1e-12 over all steps: sums in another order differ by some 1e-16, and AdamW amplifies that a little."""
    options = ["--train.precision", "fp64", "--batch.global_size", "48"]
    one = reference(*options)
    micro = 48 // world_size // accumulation
    many = arguments(tmp_path, "many", *options, "--batch.micro_size", str(micro))
    group(world_size)(SCRIPTS.train, "ddp/train.py", many)
    assert_same_training(one, tmp_path / "many")


@pytest.mark.parametrize(
    ("name", "lr", "world_size", "parameters"), [("adamw", "0.003", 3, 1e-4), ("sgd", "0.01", 2, 1e-6)]
)
def test_fp32(group, reference, tmp_path, name, lr, world_size, parameters):
    """fp32 rounds at 6e-8; AdamW divides by the root of tiny second moments, which amplifies the last bits."""
    options = ["--optimizer.name", name, "--optimizer.lr", lr]
    one = reference(*options)
    group(world_size)(SCRIPTS.train, "ddp/train.py", arguments(tmp_path, "many", *options))
    assert_same_rows(one, tmp_path / "many", 1e-5)
    a, b = read_checkpoint(one, STEPS), read_checkpoint(tmp_path / "many", STEPS)
    assert largest_difference(a, b, "model.") <= parameters


def test_first_gradients_in_fp32(group, reference, tmp_path):
    options = ["--train.steps", "1", "--optimizer.clip", "1000"]
    group(4)(SCRIPTS.train, "ddp/train.py", arguments(tmp_path, "many", *options))
    # Embedding and head, nine weights in each of two blocks, the last norm.
    assert_same_first_gradients(reference(*options), tmp_path / "many", 2 + 2 * 9 + 1)


@pytest.mark.parametrize("options", [
    ["--model.tied", "true"],
    ["--train.activation_checkpointing", "true", "--batch.micro_size", "4"],
    ["--model.experts", "4"],
], ids=["tied", "activation checkpointing", "mixture of experts"])  # fmt: skip
def test_variants_in_fp64(group, reference, tmp_path, options):
    options = [*options, "--train.precision", "fp64"]
    one = reference(*options)
    group(3)(SCRIPTS.train, "ddp/train.py", arguments(tmp_path, "many", *options))
    assert_same_training(one, tmp_path / "many")


@pytest.mark.parametrize("tied", ["false", "true"])
@pytest.mark.parametrize(("world_size", "micro"), [(2, 12), (2, 3), (3, 2)])
def test_gradients_travel_once_a_step(group, tmp_path, world_size, micro, tied):
    """Each gradient is sent once in a step, however many micro-batches there are, and a tied weight once, too.

    Gradients that are reduced on every micro-batch are right, and cost `accumulation` times as much.
    """
    options = ["--batch.global_size", "24", "--batch.micro_size", str(micro), "--model.tied", tied,
               "--train.steps", "3", "--train.check_replicas_every", "0"]  # fmt: skip
    answers = group(world_size)(ON_RANKS.counted, "ddp/train.py", arguments(tmp_path, "run", *options))
    weights = read_checkpoint(tmp_path / "run", 3)
    sizes = {name: tensor.nbytes for name, tensor in weights.items() if name.startswith("model.")}
    if tied == "true":
        sizes.pop("model.head.weight", None)
    for answer in answers:
        assert [sum(messages) for messages in answer["gradients"]] == [sum(sizes.values())] * 3
        assert all(len(messages) == 1 for messages in answer["gradients"])  # so small a model fits into one bucket
        assert answer["others"] == [16] * 4  # Run's loss and wish to stop in each step, and one evaluation


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
    assert rows[-1]["loss"] < rows[0]["loss"] - (0.5 if STEPS == 20 else 0.05)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains(group, reference, tmp_path, precision):
    """Autocast over fp32 weights: the loss falls as in fp32; 2e-2 is some five bf16 roundings (2^-8) of a loss of 5."""
    steps = ["--train.steps", "20"]  # so many are needed for the loss to fall by 0.5
    group(2)(SCRIPTS.train, "ddp/train.py", arguments(tmp_path, "low", "--train.precision", precision, *steps))
    assert_trains_in_low_precision(reference(*steps), tmp_path / "low", 2e-2)
    # What is clipped is the gradient itself, not the scaler's multiple of it.
    norms = [read_rows(run)[0]["grad_norm"] for run in (reference(*steps), tmp_path / "low")]
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_accumulation_on_one_process_changes_nothing(reference):
    options = ["--train.precision", "fp64"]
    assert_same_training(reference(*options), reference(*options, "--batch.micro_size", "6"))


def test_a_compiled_block_is_one_graph(group):
    """torch's own optimization for DDP would cut it at the end of a bucket."""
    for graphs, difference in group(2)(ON_RANKS.graphs_of_compiled_blocks):
        assert graphs == 1  # both blocks have the same
        assert difference < 1e-10  # sums of 32 tokens in another order
