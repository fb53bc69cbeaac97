"""A pipeline with torch's schedules must give the training of one process, and do things in the order it claims."""

import itertools
import json

import pytest
import torch.distributed.checkpoint as dcp
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
SCRIPT = "model_parallel/pipeline_parallel.py"
BASE = [*SMALL, "--model.layers", "8", "--train.steps", str(STEPS), "--batch.global_size", "48"]
FP64 = ["--train.precision", "fp64"]
TIED = ["--model.tied", "true"]


def arguments(folder, name, *more):
    return [*BASE, "--runs_dir", str(folder), "--run_name", name, *more]


def micro_batches(number):
    return ["--batch.micro_size", str(48 // number)]


@pytest.mark.parametrize(("ranks", "schedule"), [
    (2, "gpipe"),
    (2, "interleaved"),
    (2, "zero_bubble"),
    (3, "1f1b"),
    (3, "interleaved"),
    *(pytest.param(*rest, marks=pytest.mark.slow) for rest in (
        (2, "1f1b"), (3, "gpipe"), (3, "zero_bubble"),
        (4, "gpipe"), (4, "1f1b"), (4, "interleaved"), (4, "zero_bubble"))),
])  # fmt: skip
def test_fp64_is_the_proof(group, single_device, tmp_path, ranks, schedule):
    """8 layers on 3 ranks are unequal stages. Tied, the harder case; the last stage's copy must stay what it is."""
    options = ["--schedule", schedule, *micro_batches(4 if ranks != 3 else 6), *TIED]
    group(ranks)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *FP64, *options))
    assert_same_training(single_device(*BASE, *FP64, *TIED), tmp_path / "many")


@pytest.mark.parametrize("options", [
    # Nothing overlaps, and all is right.
    pytest.param(["--schedule", "gpipe", *micro_batches(1)], marks=pytest.mark.slow),
    pytest.param(["--schedule", "1f1b", *micro_batches(16)], marks=pytest.mark.slow),
    pytest.param(["--schedule", "interleaved", "--stages_per_rank", "4", *micro_batches(4)], marks=pytest.mark.slow),
    pytest.param(["--schedule", "zero_bubble", "--stages_per_rank", "1", *micro_batches(8)], marks=pytest.mark.slow),
    ["--schedule", "1f1b", "--train.activation_checkpointing", "true", *micro_batches(4)],
    ["--schedule", "1f1b", "--model.experts", "4", *micro_batches(4)],
    pytest.param(["--schedule", "zero_bubble", "--train.activation_checkpointing", "true", *micro_batches(4)],
                 marks=pytest.mark.slow),
], ids=lambda options: " ".join(options))  # fmt: skip
def test_every_option(group, single_device, tmp_path, options):
    model = ["--model.experts", "4"] if "--model.experts" in options else []
    group(2)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *FP64, *options))
    assert_same_training(single_device(*BASE, *FP64, *model), tmp_path / "many")


def test_evaluation_during_training(group, single_device, tmp_path):
    options = ["--train.steps", "4", "--train.eval_every", "2"]
    group(2)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *FP64, *options, *micro_batches(4)))
    assert_same_training(single_device(*BASE, *FP64, *options), tmp_path / "many")


@pytest.mark.parametrize("schedule", ["gpipe", pytest.param("zero_bubble", marks=pytest.mark.slow)])
def test_loss_in_chunks(group, single_device, tmp_path, schedule):
    """48 samples of 48 tokens in two micro-batches are more than one chunk of 1024 each."""
    options = ["--train.steps", "2", "--data.sequence_length", "48"]
    group(2)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *FP64, *options, "--schedule", schedule,
                                               *micro_batches(2)))  # fmt: skip
    assert_same_training(single_device(*BASE, *FP64, *options), tmp_path / "many")


@pytest.mark.parametrize(
    ("name", "lr", "parameters"),  # AdamW's division by small roots amplifies the last bits of fp32
    [("adamw", "0.003", 1e-4), pytest.param("sgd", "0.01", 1e-6, marks=pytest.mark.slow)],
)
def test_fp32(group, single_device, tmp_path, name, lr, parameters):
    options = ["--optimizer.name", name, "--optimizer.lr", lr]
    one = single_device(*BASE, *options)
    group(3)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *options, *micro_batches(6)))
    assert_same_rows(one, tmp_path / "many", 1e-5)
    a, b = read_checkpoint(one, STEPS), read_checkpoint(tmp_path / "many", STEPS)
    assert largest_difference(a, b, "model.") <= parameters


def test_first_gradients_in_fp32(group, single_device, tmp_path):
    options = ["--train.steps", "1", "--optimizer.clip", "1000", *TIED]
    one = single_device(*BASE, *options)
    group(4)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *options, *micro_batches(8)))
    assert_same_first_gradients(one, tmp_path / "many", 1 + 8 * 9 + 1)


def test_bf16_trains(group, single_device, tmp_path):
    options = [*micro_batches(4), "--train.precision", "bf16", "--train.steps", "20"]
    group(2)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "low", *options))
    assert_trains_in_low_precision(single_device(*BASE), tmp_path / "low")


def recorded(group, folder, ranks, schedule, number, stages_per_rank):
    options = ["--train.steps", "1", "--schedule", schedule, "--stages_per_rank", str(stages_per_rank)]
    return group(ranks)(ON_RANKS.recorded, arguments(folder, "order", *options, *micro_batches(number)))


def most_in_flight(actions):
    """Forwards whose backward has not come yet; of a backward in two parts, the first."""
    changes = [{"F": 1, "B": -1, "I": -1, "W": 0}[kind] for kind, _, _ in actions]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)])
def test_order_and_peak_of_gpipe(group, tmp_path, ranks):
    for rank, actions in enumerate(recorded(group, tmp_path, ranks, "gpipe", 6, 1)):
        assert actions == [("F", rank, i) for i in range(6)] + [("B", rank, i) for i in range(6)]
        assert most_in_flight(actions) == 6


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_order_and_peak_of_1f1b(group, tmp_path, ranks):
    for rank, actions in enumerate(recorded(group, tmp_path, ranks, "1f1b", 6, 1)):
        assert most_in_flight(actions) == min(6, ranks - rank)
        warm_up = ranks - rank - 1
        kinds = "F" * warm_up + "FB" * (6 - warm_up) + "B" * warm_up
        assert "".join(kind for kind, _, _ in actions) == kinds
        for kind in "FB":
            assert [number for k, _, number in actions if k == kind] == list(range(6))


@pytest.mark.parametrize(("ranks", "number", "chunks"), [
    pytest.param(2, 4, 2, marks=pytest.mark.slow), (3, 6, 2), pytest.param(2, 8, 4, marks=pytest.mark.slow),
])  # fmt: skip
def test_order_and_peak_of_interleaved(group, tmp_path, ranks, number, chunks):
    """Warm-up: 2 (ranks - 1 - rank) + (chunks - 1) ranks forwards (arXiv 2104.04473, 2.2); then in turn."""
    for rank, actions in enumerate(recorded(group, tmp_path, ranks, "interleaved", number, chunks)):
        total = number * chunks
        warm_up = min(2 * (ranks - 1 - rank) + (chunks - 1) * ranks, total)
        kinds = "F" * warm_up + "FB" * (total - warm_up) + "B" * warm_up
        assert "".join(kind for kind, _, _ in actions) == kinds
        assert most_in_flight(actions) == min(warm_up + 1, total)
        assert {stage for _, stage, _ in actions} == {rank + ranks * chunk for chunk in range(chunks)}


@pytest.mark.parametrize(("ranks", "chunks"), [(2, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_zero_bubble_delays_the_gradients_of_weights(group, tmp_path, ranks, chunks):
    """Backward comes in two parts, the second of which waits where a neighbour waits for the first."""
    by_rank = recorded(group, tmp_path, ranks, "zero_bubble", 8, chunks)
    waited = 0
    for actions in by_rank:
        inputs = [action[1:] for action in actions if action[0] == "I"]
        weights = [action[1:] for action in actions if action[0] == "W"]
        assert sorted(inputs) == sorted(weights)
        for place, (kind, *what) in enumerate(actions):
            if kind == "W":
                first = actions.index(("I", *what))
                assert first < place
                waited += place - first > 1
        done = [action[1:] for action in actions if action[0] in "IB"]
        assert len(done) == len(set(done)) == 8 * chunks
    assert waited > 0


@pytest.mark.parametrize(("ranks", "options", "words"), [
    (4, ["--model.layers", "3"], "expected a layer for each"),
    (2, ["--schedule", "interleaved", "--model.layers", "3"], "model.layers = 3 for 4 stages"),
    (2, [], "1 micro-batches (batch.global_size / batch.micro_size) with schedule = 1f1b on 2 ranks"),
    (3, ["--schedule", "interleaved", "--batch.global_size", "21", *micro_batches(16)], "expected a multiple of 2"),
    (2, ["--schedule", "zero_bubble", "--stages_per_rank", "1", "--batch.global_size", "20", "--batch.micro_size", "4"],
     "5 micro-batches (batch.global_size / batch.micro_size) with schedule = zero_bubble on 2 ranks"),
    (2, ["--stages_per_rank", "2"], "stages_per_rank = 2 with schedule = 1f1b"),
    (2, ["--schedule", "interleaved", "--stages_per_rank", "0"], "stages_per_rank = 0"),
    (2, ["--train.precision", "fp16"], "ddp/train.py has fp16"),
    (2, ["--train.compile", "true"], "not compiled"),
    (2, ["--schedule", "round_robin"], "schedule = round_robin"),
    (1, [], "1 rank for a pipeline"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)  # fmt: skip
def test_bad_input(group, tmp_path, ranks, options, words):
    assert_refused(group(ranks)(SCRIPTS.ends, SCRIPT, arguments(tmp_path, "bad", *options)), words)


@pytest.mark.parametrize(("first", "then"), [
    pytest.param((SCRIPT, 4), (SCRIPT, 3), marks=pytest.mark.slow),
    ((SCRIPT, 2, "--schedule", "interleaved"), ("ddp/train.py", 3)),
    (("ddp/train.py", 2), (SCRIPT, 2, "--schedule", "zero_bubble")),
    pytest.param(("fsdp/train.py", 3), (SCRIPT, 2), marks=pytest.mark.slow),
], ids=lambda value: " ".join(map(str, value)).replace("/", " "))  # fmt: skip
def test_resume_elsewhere(group, single_device, tmp_path, first, then):
    """Half of the steps one way, half another, on other ranks: those of one process. Tied, the harder case."""

    def options(script, ranks, *more):
        cut = micro_batches(6 if ranks == 3 else 4) if script == SCRIPT else []
        return arguments(tmp_path, "many", *FP64, *TIED, *cut, *more)

    group(first[1])(SCRIPTS.train_until, first[0], options(*first), STEPS // 2)
    assert len(read_rows(tmp_path / "many")) == STEPS // 2
    group(then[1])(SCRIPTS.train, then[0], options(*then))
    assert_same_training(single_device(*BASE, *FP64, *TIED), tmp_path / "many")


def test_resume_without_momentum(group, single_device, tmp_path):
    """Plain SGD keeps nothing of a parameter that a checkpoint could hold."""
    options = [*FP64, *TIED, "--optimizer.name", "sgd", "--optimizer.betas", "[0.0, 0.0]", "--optimizer.lr", "0.01"]
    many = arguments(tmp_path, "many", *options, *micro_batches(4))
    group(2)(SCRIPTS.train_until, SCRIPT, many, STEPS // 2)
    assert len(read_rows(tmp_path / "many")) == STEPS // 2
    group(2)(SCRIPTS.train, SCRIPT, many)
    one = single_device(*BASE, *options)
    assert_same_rows(one, tmp_path / "many", 1e-12)
    a, b = read_checkpoint(one, STEPS), read_checkpoint(tmp_path / "many", STEPS)
    assert largest_difference(a, b, "model.") <= 1e-12


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_all_stages_names_are_saved(group, tmp_path):
    """The optimizer's groups are those of the whole model, whichever rank writes them."""
    options = [*TIED, "--train.steps", "1"]
    group(1)(SCRIPTS.train, "ddp/single_device.py", arguments(tmp_path, "one", *options))
    group(2)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *options, *micro_batches(4)))
    names = [f"optimizer.param_groups.{number}.params" for number in range(2)]
    found = []
    for run in "one", "many":
        folder = tmp_path / run / "checkpoints" / "step_1"
        shards = folder / json.loads((folder / "manifest.json").read_text())["shards"]
        groups = {name: [] for name in names}
        dcp.load(groups, storage_reader=dcp.FileSystemReader(shards), no_dist=True)
        found.append([sorted(groups[name]) for name in names])
    assert found[0] == found[1]
    assert list(map(len, found[0])) == [1 + 8 * 7, 8 * 2 + 1]


def test_a_checkpoint_of_another_model(group, tmp_path):
    group(2)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", "--train.steps", "1", *micro_batches(4)))
    checkpoint = str(tmp_path / "many" / "checkpoints" / "step_1")
    other = arguments(tmp_path, "other", "--model.layers", "4", "--resume", checkpoint, *micro_batches(4))
    for code, message in group(2)(SCRIPTS.ends, SCRIPT, other):
        assert code == 2 and "is of another model: blocks.4." in message, message
