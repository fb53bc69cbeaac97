"""Tensor parallelism with torch's plans must give the training of one process, and send what it says."""

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
from launching import SCRIPTS, OnRanks, assert_refused

ON_RANKS = OnRanks("tests/model_parallel/model_parallel_on_ranks.py")
SCRIPT = "model_parallel/tensor_parallel.py"
# Heads, neurons, vocabulary and sequence divide by 2, 3 and 4.
EVEN = ["--model.heads", "12", "--model.kv_heads", "12", "--model.width", "48", "--model.ffn_width", "48",
        "--model.vocabulary", "264", "--data.sequence_length", "24"]  # fmt: skip
BASE = [*SMALL, *EVEN, "--train.steps", str(STEPS), "--batch.global_size", "48"]
FP64 = ["--train.precision", "fp64"]


def arguments(folder, name, *more):
    return [*BASE, "--runs_dir", str(folder), "--run_name", name, *more]


@pytest.mark.parametrize(("ranks", "accumulation", "sequence_parallel"), [
    (2, 4, "true"),
    (3, 1, "true"),
    (3, 4, "false"),
    *(pytest.param(*rest, marks=pytest.mark.slow) for rest in (
        (2, 1, "true"), (2, 1, "false"), (2, 4, "false"), (3, 4, "true"), (3, 1, "false"),
        (4, 1, "true"), (4, 1, "false"), (4, 4, "true"), (4, 4, "false"))),
])  # fmt: skip
def test_fp64_is_the_proof(group, single_device, tmp_path, ranks, accumulation, sequence_parallel):
    """Tied where gradients accumulate, the harder case."""
    model = ["--model.tied", "true"] if accumulation > 1 else []
    options = ["--batch.micro_size", str(48 // accumulation), "--sequence_parallel", sequence_parallel]
    group(ranks)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *FP64, *model, *options))
    assert_same_training(single_device(*BASE, *FP64, *model), tmp_path / "many")


@pytest.mark.parametrize("options", [
    pytest.param(["--mesh.dp", "2"], marks=pytest.mark.slow),
    pytest.param(["--mesh.dp", "2", "--sequence_parallel", "false"], marks=pytest.mark.slow),
    pytest.param(["--mesh.dp", "4"], marks=pytest.mark.slow),
    ["--mesh.dp", "2", "--model.tied", "true"],
    pytest.param(["--mesh.dp", "2", "--train.activation_checkpointing", "true"], marks=pytest.mark.slow),
    ["--mesh.tp", "2", "--mesh.dp", "2", "--model.kv_heads", "4"],  # fewer than heads
    # Slices of 25 rows: the last shard of each is padded.
    pytest.param(["--mesh.dp", "2", "--model.ffn_width", "50"], marks=pytest.mark.slow),
], ids=lambda options: " ".join(options))  # fmt: skip
def test_on_a_mesh(group, single_device, tmp_path, options):
    model = [word for key, value in zip(options[::2], options[1::2], strict=True) if key.startswith("--model")
             for word in (key, value)]  # fmt: skip
    options = [*options, "--batch.micro_size", "12"]
    group(4)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *FP64, *options))
    assert_same_training(single_device(*BASE, *FP64, *model), tmp_path / "many")


def test_evaluation_during_training(group, single_device, tmp_path):
    options = ["--train.steps", "4", "--train.eval_every", "2"]
    group(2)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *FP64, *options))
    assert_same_training(single_device(*BASE, *FP64, *options), tmp_path / "many")


@pytest.mark.parametrize("tied", [pytest.param("false", marks=pytest.mark.slow), "true"])
def test_loss_in_chunks(group, single_device, tmp_path, tied):
    """48 samples of 24 tokens are more than one chunk of 1024: logits are computed again in backward."""
    options = ["--train.steps", "2", "--model.tied", tied]
    group(2)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *FP64, *options, "--batch.micro_size", "48"))
    assert_same_training(single_device(*BASE, *FP64, *options), tmp_path / "many")


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


@pytest.mark.parametrize("sequence_parallel", [pytest.param("true", marks=pytest.mark.slow), "false"])
def test_first_gradients_in_fp32(group, single_device, tmp_path, sequence_parallel):
    options = ["--train.steps", "1", "--optimizer.clip", "1000"]
    one = single_device(*BASE, *options)
    more = ["--mesh.dp", "2", "--sequence_parallel", sequence_parallel]
    group(4)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *options, *more))
    assert_same_first_gradients(one, tmp_path / "many", 2 + 2 * 9 + 1)


def test_norms_that_drift_apart_are_noticed(group, tmp_path):
    """The losses part in the fourth digit only; that tensor ranks share the norms is what their mesh says."""
    arguments_ = arguments(tmp_path, "wrong", "--train.steps", "2")
    for code, message in group(2)(ON_RANKS.ends_with_replicated_norms, arguments_):
        assert code == 2
        assert "after step 1 the ranks hold different weights: first in blocks.0.attention_norm.weight" in message


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_low_precision_trains(group, single_device, tmp_path, precision):
    """The policy casts whole blocks where autocast casts operations: losses are close, not equal."""
    group(2)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "low", "--train.steps", "20", "--train.precision", precision))
    assert_trains_in_low_precision(single_device(*BASE), tmp_path / "low")


@pytest.mark.parametrize(("ranks", "layers", "tied"), [
    (2, 1, True),
    (3, 3, False),
    *(pytest.param(*rest, marks=pytest.mark.slow) for rest in (
        (2, 1, False), (2, 3, False), (2, 3, True), (3, 1, False), (3, 1, True), (3, 3, True))),
])  # fmt: skip
def test_collectives_are_those_of_the_plan(group, ranks, layers, tied):
    """Four pairs a layer, embedding and head; the loss: maximum, sum of exponentials, logit of the target."""
    plain = {"all_reduce": 1 + 2 * layers + 3 + 1 + 2 * layers}
    # With sequence parallelism each of these, the loss's apart, is a reduce-scatter in one direction and an all-gather
    # in the other; norms see a part of the sequence, and their gradients wait as partial sums until they are used.
    cut = {"all_gather_into_tensor": 2 + 4 * layers, "reduce_scatter_tensor": 2 + 4 * layers, "all_reduce": 3}
    assert group(ranks)(ON_RANKS.collectives, False, tied, layers) == [plain] * ranks
    assert group(ranks)(ON_RANKS.collectives, True, tied, layers) == [cut] * ranks


@pytest.mark.parametrize(("ranks", "dp"), [(2, 1), (4, 2), pytest.param(3, 1, marks=pytest.mark.slow)])
def test_bytes_per_rank(group, tmp_path, ranks, dp):
    """A rank keeps 1/n of every matrix, and of a norm what FSDP leaves: tensor ranks hold it whole."""
    options = ["--train.steps", "2", "--mesh.dp", str(dp)]
    printed = group(ranks)(SCRIPTS.printed, SCRIPT, arguments(tmp_path, "many", *options))[0]
    mine, whole = re.search(r"this rank keeps ([\d,]+) of ([\d,]+) bytes", printed).groups()
    weights = [t for n, t in read_checkpoint(tmp_path / "many", 2).items() if n.startswith("model.")]
    assert int(mine.replace(",", "")) == sum(4 * t.numel() // (ranks if t.ndim > 1 else dp) for t in weights)
    assert int(whole.replace(",", "")) == 4 * sum(t.numel() for t in weights)


@pytest.mark.parametrize(("ranks", "options", "words"), [
    (2, ["--mesh.dp", "3"], "mesh.dp = 3, mesh.tp = None with 2 ranks"),
    (2, ["--mesh.tp", "3"], "expected a product of 2"),
    (2, ["--mesh.dp", "1", "--mesh.tp", "1"], "expected a product of 2"),  # one rank would have nothing to do
    (2, ["--mesh.dp", "0"], "mesh.dp = 0"),
    (2, ["--model.heads", "3", "--model.kv_heads", "3"], "model.heads = 3, which does not divide among 2 tensor ranks"),
    (2, ["--model.kv_heads", "3"], "model.kv_heads = 3"),
    (2, ["--model.ffn_width", "49"], "model.ffn_width = 49"),
    (2, ["--model.vocabulary", "257"], "model.vocabulary = 257"),
    (2, ["--data.sequence_length", "25"], "data.sequence_length = 25"),
    (2, ["--model.experts", "4"], "set it to 0"),
    (2, ["--mesh.pp", "2"], "unknown key mesh.pp"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)  # fmt: skip
def test_bad_input(group, tmp_path, ranks, options, words):
    assert_refused(group(ranks)(SCRIPTS.ends, SCRIPT, arguments(tmp_path, "bad", *options)), words)


@pytest.mark.parametrize(("first", "then"), [
    ((SCRIPT, 4, "--mesh.dp", "2"), (SCRIPT, 3)),
    pytest.param((SCRIPT, 2), (SCRIPT, 4, "--mesh.dp", "2"), marks=pytest.mark.slow),
    pytest.param((SCRIPT, 2), ("ddp/train.py", 3), marks=pytest.mark.slow),
    pytest.param(("ddp/train.py", 2), (SCRIPT, 4), marks=pytest.mark.slow),
    (("fsdp/train.py", 3), (SCRIPT, 2)),
], ids=lambda value: " ".join(map(str, value)).replace("/", " "))  # fmt: skip
def test_resume_elsewhere(group, single_device, tmp_path, first, then):
    """Half of the steps on some ranks, the others on other ranks, or under another strategy: those of one process."""
    (script, ranks, *more), (next_script, next_ranks, *next_more) = first, then
    group(ranks)(SCRIPTS.train_until, script, arguments(tmp_path, "many", *FP64, *more), STEPS // 2)
    assert len(read_rows(tmp_path / "many")) == STEPS // 2
    group(next_ranks)(SCRIPTS.train, next_script, arguments(tmp_path, "many", *FP64, *next_more))
    assert_same_training(single_device(*BASE, *FP64), tmp_path / "many")
