"""Context parallelism must give the training of one process, send what it says, and share the work fairly."""

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
from launching import SCRIPTS, OnRanks, assert_refused

ON_RANKS = OnRanks("tests/model_parallel/context_expert_on_ranks.py")
SCRIPT = "model_parallel/context_parallel.py"
# The sequence divides into 2, 4, 6 and 8 pieces. There are fewer key-value heads than heads, as by default.
BASE = [*SMALL, "--data.sequence_length", "24", "--train.steps", str(STEPS), "--batch.global_size", "24"]
FP64 = ["--train.precision", "fp64"]
TIED = ["--model.tied", "true"]


def arguments(folder, name, *more):
    return [*BASE, "--runs_dir", str(folder), "--run_name", name, *more]


@pytest.mark.parametrize(("ranks", "accumulation"), [
    (2, 4),
    (3, 1),
    *(pytest.param(*rest, marks=pytest.mark.slow) for rest in ((2, 1), (3, 4), (4, 1), (4, 4))),
])  # fmt: skip
def test_fp64_is_the_proof(group, single_device, tmp_path, ranks, accumulation):
    """Tied where gradients accumulate, the harder case. A wrong position would show in the first loss."""
    model = TIED if accumulation > 1 else []
    options = ["--batch.micro_size", str(24 // accumulation)]
    group(ranks)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *FP64, *model, *options))
    assert_same_training(single_device(*BASE, *FP64, *model), tmp_path / "many")


@pytest.mark.parametrize(("ranks", "options"), [
    (2, ["--train.activation_checkpointing", "true"]),  # gathers again in backward
    (2, ["--mesh.dp", "2"]),  # context groups of one rank: FSDP, through the same code
    pytest.param(4, ["--mesh.dp", "2", "--batch.micro_size", "3"], marks=pytest.mark.slow),
    pytest.param(4, ["--mesh.dp", "2", "--mesh.cp", "2", "--attention", "all_gather"], marks=pytest.mark.slow),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)  # fmt: skip
def test_on_a_mesh(group, single_device, tmp_path, ranks, options):
    group(ranks)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *FP64, *options))
    assert_same_training(single_device(*BASE, *FP64), tmp_path / "many")


def test_evaluation_during_training(group, single_device, tmp_path):
    options = ["--train.steps", "4", "--train.eval_every", "2"]
    group(2)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *FP64, *options))
    assert_same_training(single_device(*BASE, *FP64, *options), tmp_path / "many")


@pytest.mark.parametrize(("ranks", "options"), [
    (2, []),
    (3, ["--train.activation_checkpointing", "true", "--batch.micro_size", "6"]),
    pytest.param(4, ["--mesh.dp", "2"], marks=pytest.mark.slow),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)  # fmt: skip
def test_torchs_ring(group, single_device, tmp_path, ranks, options):
    """What runs on GPUs, with the kernel of the CPU in the ring; see the case."""
    folder = arguments(tmp_path, "many", *FP64, *options)
    sends = group(ranks)(ON_RANKS.train_in_a_ring, SCRIPT, folder)
    assert_same_training(single_device(*BASE, *FP64), tmp_path / "many")
    # Around the ring go keys and values, forward and backward, once for each other rank, and gradients once for all.
    cp, dp = (2, 2) if ranks == 4 else (ranks, 1)
    micro_size, passes = (6, 2) if options[:1] == ["--train.activation_checkpointing"] else (24 // dp, 1)
    in_a_step = 24 // dp // micro_size * 2 * ((passes + 1) * (cp - 1) + cp)
    in_an_evaluation = math.ceil(25 / dp / micro_size) * 2 * (cp - 1)
    assert sends == [STEPS * in_a_step + in_an_evaluation] * ranks


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_position_is_somewhere(group, ranks):
    """Torch cuts as we do: pieces r and 2n - 1 - r of 2n."""
    size = 12 // ranks
    expected = [
        [*range(rank * size, (rank + 1) * size), *range(24 - (rank + 1) * size, 24 - rank * size)]
        for rank in range(ranks)
    ]
    assert sorted(place for part in expected for place in part) == list(range(24))
    assert group(ranks)(ON_RANKS.positions, "all_gather") == expected
    assert group(ranks)(ON_RANKS.positions, "ring") == expected


@pytest.mark.parametrize(("ranks", "layers"), [(2, 1), (3, 3)])
def test_messages_and_work(group, ranks, layers):
    """3 sequences of 24 tokens, 2 key-value heads of size 8, fp32."""
    mine = 2 * 3 * 2 * (24 // ranks) * 8 * 4  # bytes of keys and values of one layer
    forward, backward = ("all_gather_into_tensor", mine), ("reduce_scatter_tensor", ranks * mine)
    piece = 24 // (2 * ranks)  # early and late piece of a rank see r + 1 and 2n - r of 2n: together 2n + 1
    pairs = layers * (2 * ranks + 1) * piece * piece
    results = group(ranks)(ON_RANKS.context_work, layers)
    assert results == [([forward] * layers + [backward] * layers, pairs)] * ranks
    # The last of plain parts would see the whole sequence: nearly twice the work, for which all others would wait.
    assert pairs / (layers * (24 // ranks) * 24) == (2 * ranks + 1) / (4 * ranks)


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
    group(3)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *options))
    assert_same_first_gradients(one, tmp_path / "many", 2 + 2 * 9 + 1)


def test_bf16_trains(group, single_device, tmp_path):
    group(2)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "low", "--train.precision", "bf16", "--train.steps", "20"))
    assert_trains_in_low_precision(single_device(*BASE), tmp_path / "low")


@pytest.mark.parametrize(("ranks", "options"), [(2, []), pytest.param(4, ["--mesh.dp", "2"], marks=pytest.mark.slow)])
def test_bytes_per_rank(group, tmp_path, ranks, options):
    """Context ranks, too, share the weights: 1/n of each, whatever the mesh."""
    printed = group(ranks)(SCRIPTS.printed, SCRIPT, arguments(tmp_path, "many", "--train.steps", "2", *options))[0]
    mine, whole = re.search(r"this rank keeps ([\d,]+) of ([\d,]+) bytes", printed).groups()
    weights = [t for n, t in read_checkpoint(tmp_path / "many", 2).items() if n.startswith("model.")]
    assert int(mine.replace(",", "")) == sum(4 * t.numel() // ranks for t in weights)
    assert int(whole.replace(",", "")) == 4 * sum(t.numel() for t in weights)
    tokens = 24 // (2 if options else ranks)
    assert f"all_gather attention: {tokens} of 24 tokens a rank" in printed


@pytest.mark.parametrize(("ranks", "options", "words"), [
    (2, ["--mesh.dp", "3"], "mesh.dp = 3, mesh.cp = None with 2 ranks"),
    (2, ["--mesh.cp", "3"], "expected a product of 2"),
    (2, ["--mesh.dp", "0"], "mesh.dp = 0"),
    (2, ["--data.sequence_length", "26"], "data.sequence_length = 26, which does not divide into 4 pieces"),
    (3, ["--data.sequence_length", "27"], "expected a multiple of 6"),
    (2, ["--attention", "ring"], "attention = ring on a cpu device in fp32; expected a GPU"),
    (2, ["--attention", "flash"], "attention = flash"),
    (2, ["--mesh.dp", "2", "--batch.global_size", "23"], "does not divide among 2 data-parallel ranks"),
    (2, ["--mesh.tp", "2"], "unknown key mesh.tp"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)  # fmt: skip
def test_bad_input(group, tmp_path, ranks, options, words):
    assert_refused(group(ranks)(SCRIPTS.ends, SCRIPT, arguments(tmp_path, "bad", *options)), words)


@pytest.mark.parametrize(("first", "then"), [
    ((SCRIPT, 3), (SCRIPT, 2, "--mesh.dp", "2")),
    pytest.param((SCRIPT, 2), ("ddp/train.py", 3), marks=pytest.mark.slow),
    pytest.param(("ddp/train.py", 2), (SCRIPT, 3), marks=pytest.mark.slow),
    pytest.param((SCRIPT, 4, "--mesh.dp", "2"), (SCRIPT, 3), marks=pytest.mark.slow),
], ids=lambda value: " ".join(map(str, value)).replace("/", " "))  # fmt: skip
def test_resume_elsewhere(group, single_device, tmp_path, first, then):
    """Half of the steps on some ranks, the others on other ranks, or under another strategy: those of one process."""
    (script, ranks, *more), (next_script, next_ranks, *next_more) = first, then
    group(ranks)(SCRIPTS.train_until, script, arguments(tmp_path, "many", *FP64, *more), STEPS // 2)
    assert len(read_rows(tmp_path / "many")) == STEPS // 2
    group(next_ranks)(SCRIPTS.train, next_script, arguments(tmp_path, "many", *FP64, *next_more))
    assert_same_training(single_device(*BASE, *FP64), tmp_path / "many")
