"""from_scratch/train.py with any strategy, mesh, world size and accumulation is ddp/single_device.py's training."""

import itertools
import json
import subprocess
import sys

import pytest
from equality import SMALL, STEPS, assert_same_training, assert_trains_in_low_precision, read_rows
from launching import ROOT, SCRIPTS, OnRanks, assert_refused, clean_environment, free_port, whose_rank_1_dies

sys.path.insert(0, str(ROOT / "from_scratch"))

import gantt

SCRIPT = "from_scratch/train.py"
ON_RANKS = OnRanks("tests/from_scratch/train_on_ranks.py")
# Divides by 2, 3 and 4: key-value heads, neurons, sequence (in 2n pieces), vocabulary, layers; and 48 samples.
EVEN = ["--model.heads", "12", "--model.kv_heads", "12", "--model.width", "48", "--model.ffn_width", "48",
        "--model.vocabulary", "264", "--model.layers", "4", "--data.sequence_length", "24",
        "--batch.global_size", "48", "--train.precision", "fp64"]  # fmt: skip


BASE = [*SMALL, *EVEN, "--train.steps", str(STEPS)]


def arguments(folder, name, *more):
    return [*BASE, "--runs_dir", str(folder), "--run_name", name, *more]


@pytest.fixture
def reference(single_device):
    return lambda *options: single_device(*BASE, *options)


def train_and_compare(group, reference, folder, ranks, options, model=()):
    group(ranks)(SCRIPTS.train, SCRIPT, arguments(folder, "many", *options, *model))
    assert_same_training(reference(*model), folder / "many")


slow = pytest.mark.slow  # the strategies' own tests cover these numbers of ranks and micro-batches, all of them


@pytest.mark.parametrize(
    ("ranks", "accumulation"),
    [(2, 1), (3, 2), *(pytest.param(*case, marks=slow) for case in [(3, 4), (4, 4), (2, 4), (4, 1)])],
)
@pytest.mark.parametrize(
    "strategy", ["naive", "accumulate", "overlap", "bucket", "zero1", "zero2", "fsdp", "tensor", "pipeline", "context"]
)
def test_every_strategy(group, reference, tmp_path, strategy, ranks, accumulation):
    samples = 48 if strategy in ("tensor", "pipeline", "context") else 48 // ranks
    options = ["--strategy", strategy, "--batch.micro_size", str(samples // accumulation),
               "--train.check_replicas_every", "1"]  # fmt: skip
    tied = ["--model.tied", "true"] if accumulation > 1 else []
    train_and_compare(group, reference, tmp_path, ranks, options, tied)


def test_context_without_balance(group, reference, tmp_path):
    train_and_compare(group, reference, tmp_path, 2, ["--strategy", "context", "--balanced", "false"])


COMBINATIONS = {  # on 4 ranks
    "zero1 x tensor": ["--strategy", "zero1", "--mesh.tp", "2"],
    "zero2 x tensor, sequence parallel": ["--strategy", "zero2", "--mesh.tp", "2", "--sequence_parallel", "true"],
    "fsdp x tensor": ["--strategy", "fsdp", "--mesh.tp", "2"],
    "fsdp x context": ["--strategy", "fsdp", "--mesh.cp", "2"],
    "overlap x context, unbalanced": ["--strategy", "overlap", "--mesh.cp", "2", "--balanced", "false"],
    "zero1 x pipeline": ["--strategy", "zero1", "--mesh.pp", "2"],
    "tensor x pipeline": ["--strategy", "tensor", "--mesh.pp", "2", "--schedule", "afab"],
    "context x pipeline": ["--strategy", "context", "--mesh.pp", "2"],
    "context x tensor": ["--strategy", "context", "--mesh.tp", "2", "--sequence_parallel", "true"],
    "pipeline, interleaved, x data": ["--strategy", "pipeline", "--mesh.dp", "2", "--schedule", "interleaved",
                                      "--stages_per_rank", "2"],
}  # fmt: skip
ORDINARY = {"zero2 x tensor, sequence parallel", "fsdp x context", "tensor x pipeline"}  # every axis
MARKED = [pytest.param(it, id=name, marks=() if name in ORDINARY else slow) for name, it in COMBINATIONS.items()]


@pytest.mark.parametrize("tied", ["true", pytest.param("false", marks=slow)])
@pytest.mark.parametrize("options", MARKED)
def test_combinations(group, reference, tmp_path, options, tied):
    model = ["--model.tied", tied] if tied == "true" else []
    train_and_compare(group, reference, tmp_path, 4, [*options, "--batch.micro_size", "12"], model)


def test_activation_checkpointing(group, reference, tmp_path):
    options = ["--strategy", "fsdp", "--mesh.tp", "2", "--train.activation_checkpointing", "true"]
    train_and_compare(group, reference, tmp_path, 4, options)


@pytest.mark.parametrize(("first", "then"), [
    ((4, ["--strategy", "fsdp", "--mesh.tp", "2"]), (2, ["--strategy", "pipeline"])),
    ((2, ["--strategy", "pipeline"]), (3, ["--strategy", "zero2"])),
    ((3, ["--strategy", "zero1"]), (2, ["--strategy", "fsdp"])),
], ids=["fsdp x tensor to pipeline", "pipeline to zero2", "zero1 to fsdp"])  # fmt: skip
def test_resume_under_another_strategy(group, reference, tmp_path, first, then):
    """Half of the steps one way, half another, at another world size: those of one process. Tied, the harder case."""
    tied = ["--model.tied", "true"]
    group(first[0])(SCRIPTS.train_until, SCRIPT, arguments(tmp_path, "many", *first[1], *tied), STEPS // 2)
    assert len(read_rows(tmp_path / "many")) == STEPS // 2
    group(then[0])(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *then[1], *tied))
    assert_same_training(reference(*tied), tmp_path / "many")


def test_ddp_goes_on_from_shards_by_hand(group, reference, tmp_path):
    group(2)(SCRIPTS.train_until, SCRIPT, arguments(tmp_path, "many", "--strategy", "fsdp"), STEPS // 2)
    group(2)(SCRIPTS.train, "ddp/train.py", arguments(tmp_path, "many"))
    assert_same_training(reference(), tmp_path / "many")


@pytest.mark.parametrize(
    "strategy", ["bucket", "fsdp", "pipeline", *(pytest.param(s, marks=slow) for s in ("zero2", "tensor", "context"))]
)
def test_bf16_trains(group, single_device, tmp_path, strategy):
    steps = ["--train.steps", "20"]  # until the loss has fallen
    options = ["--strategy", strategy, "--train.precision", "bf16", *steps]
    group(2)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "low", *options))
    assert_trains_in_low_precision(single_device(*BASE, "--train.precision", "fp32", *steps), tmp_path / "low")


@pytest.mark.parametrize(("ranks", "options", "words"), [
    (2, ["--strategy", "tensor", "--mesh.dp", "3"], "2 ranks for mesh.tp and other axes of together 3"),
    (2, ["--mesh.tp", "0"], "expected at least 1 on every axis"),
    (2, ["--mesh.dp", "1"], "has 1 places, but there are 2 ranks"),
    (4, ["--strategy", "fsdp", "--mesh.pp", "2"], "use bucket or zero1"),
    (2, ["--strategy", "tensor", "--model.experts", "4"], "set it to 0"),
    (2, ["--strategy", "tensor", "--model.heads", "3", "--model.kv_heads", "3"], "model.kv_heads is 3"),
    (4, ["--strategy", "pipeline", "--model.layers", "3"], "expected a layer for each"),
    (2, ["--strategy", "pipeline", "--schedule", "interleaved"], "expected 1 for afab and 1f1b, else at least 2"),
    (2, ["--strategy", "context", "--data.sequence_length", "18"], "does not divide into 4 pieces"),
    (2, ["--sequence_parallel", "true"], "set mesh.tp"),
    (2, ["--stages_per_rank", "2"], "set mesh.pp"),
    (2, ["--train.precision", "fp16"], "ddp/train.py has fp16"),
    (2, ["--strategy", "horizontal"], "strategy = horizontal"),
    (2, ["--strategy", "interleaved"], "strategy = interleaved"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)  # fmt: skip
def test_bad_input(group, tmp_path, ranks, options, words):
    assert_refused(group(ranks)(SCRIPTS.ends, SCRIPT, arguments(tmp_path, "bad", *options)), words)


# ---------------------------------------------------------------- what is sent, in which dtype

NUMBERS = 2 * 264 * 48 + 48 + 4 * (2 * 48 + 4 * 48 * 48 + 3 * 48 * 48)  # of all parameters


@pytest.fixture
def sent(group, tmp_path):
    """Messages and numbers by operation and dtype of one step of four micro-batches, for each rank."""

    runs = itertools.count()

    def get(ranks, *options):
        few = ["--train.steps", "3", "--batch.micro_size", str(48 // 2 // 4)]
        return group(ranks)(ON_RANKS.sent, arguments(tmp_path, f"sent{next(runs)}", *few, *options))

    return get


@pytest.mark.parametrize(("strategy", "numbers"), [
    ("naive", {"all-reduce": 4}),
    ("accumulate", {"all-reduce": 1}),
    ("overlap", {"all-reduce": 1}),
    ("bucket", {"all-reduce": 1}),
    ("zero1", {"all-reduce": 1, "all-gather": 1 / 2}),
    ("zero2", {"reduce-scatter": 4, "all-gather": 1 / 2}),
    ("fsdp", {"reduce-scatter": 4, "all-gather": 4 * 2 / 2}),
])  # fmt: skip
def test_gradients_travel_no_oftener_than_the_strategy_says(sent, strategy, numbers):
    """In units of all parameters, for four micro-batches on two ranks. Equal losses hide gradients that are reduced for
    every micro-batch, or twice."""
    for _, found in sent(2, "--strategy", strategy):
        assert found == {(name, "float64"): units * NUMBERS for name, units in numbers.items()}


def test_settings_that_change_messages_alone(sent):
    """Options under which the training is the same: what they ask for shows in the messages only."""
    for messages, _ in sent(2, "--bucket_bytes", "60000"):
        assert messages[("all-reduce", "float64")] > 4
    for _, numbers in sent(2, "--strategy", "fsdp", "--reshard_after_forward", "false"):
        assert numbers[("all-gather", "float64")] == 4 * NUMBERS / 2
    # Sequence parallelism gathers twice in each of four layers and at the head, forward and backward, for each of two
    # micro-batches; activation checkpointing gathers once more in the layers.
    sequence = ["--strategy", "tensor", "--sequence_parallel", "true", "--batch.micro_size", "24"]
    for checkpointing, gathers in (("false", 2 * (4 * 2 + 1)), ("true", 2 * (4 * 2 + 1) + 4 * 2)):
        for messages, _ in sent(2, *sequence, "--train.activation_checkpointing", checkpointing):
            assert messages[("all-gather", "float64")] == 2 * gathers


def test_a_pipelines_replicas_reduce_once_a_step(sent):
    """Two stages on two replicas: together the all-reduces hold each replica's parameters once."""
    answers = sent(4, "--strategy", "pipeline", "--mesh.dp", "2")
    assert sum(numbers[("all-reduce", "float64")] for _, numbers in answers) == 2 * NUMBERS


@pytest.mark.parametrize(("strategy", "dtypes"), [
    ("bucket", {("all-reduce", "float32")}),
    ("zero2", {("reduce-scatter", "float32"), ("all-gather", "float32")}),
    ("fsdp", {("reduce-scatter", "float32"), ("all-gather", "bfloat16")}),
])  # fmt: skip
def test_gradients_are_summed_in_fp32_when_bf16_computes(sent, strategy, dtypes):
    for messages, _ in sent(2, "--strategy", strategy, "--train.precision", "bf16"):
        assert messages.keys() == dtypes


# ---------------------------------------------------------------- replicas, logs


@pytest.mark.parametrize(("ranks", "options"), [
    (2, []),
    (4, ["--strategy", "tensor", "--mesh.dp", "2"]),
    (4, ["--strategy", "fsdp", "--mesh.tp", "2", "--mesh.dp", "2"]),
], ids=["bucket", "tensor", "fsdp"])  # fmt: skip
def test_a_replica_that_drifts_ends_all_ranks(group, tmp_path, ranks, options):
    """The check between replicas is on, and it is between the right ranks; of fsdp's shards there are no replicas."""
    options = ["--train.check_replicas_every", "1", "--train.steps", "3", *options]
    answers = group(ranks)(ON_RANKS.drift, arguments(tmp_path, "drifts", *options), 1, 2)
    if "fsdp" in options:
        assert [code for code, _ in answers] == [0] * ranks
    else:
        assert_refused(answers, "hold different weights")
        assert all("after step 1 " in message for _, message in answers)


def test_events_are_those_of_one_pipelines_last_step(group, tmp_path):
    """Recording slows a GPU down, so that only the last step is; one file for each rank of the first replica. The
    schedule is the one that was asked for."""
    options = ["--strategy", "pipeline", "--mesh.dp", "2", "--train.steps", "2", "--batch.micro_size", "6",
               "--schedule", "interleaved", "--stages_per_rank", "2"]  # fmt: skip
    group(4)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *options))
    files = sorted((tmp_path / "many" / "events").iterdir())
    assert [file.name for file in files] == ["rank_0.jsonl", "rank_1.jsonl"]
    events = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert {event["step"] for event in events} == {1}
    assert sum(event["event"] == "forward" for event in events) == 4 * 4  # stages x micro-batches
    assert gantt.name_schedule(events) == "interleaved 1F1B with 2 stages a rank"


def three_dimensional(folder):
    """2 x 2 x 2 on 8 ranks."""
    config = ["--config", str(ROOT / "from_scratch/configs/three_dimensional.yaml"), "--batch.global_size", "48",
              "--batch.micro_size", "6"]  # fmt: skip
    return arguments(folder, "many", *config, "--train.steps", str(STEPS))


def test_three_dimensions(group, reference, tmp_path):
    group(8)(SCRIPTS.train, SCRIPT, three_dimensional(tmp_path))
    assert_same_training(reference(), tmp_path / "many")


@slow
def test_three_dimensions_as_a_user_starts_them(launch, reference, tmp_path):
    launch(SCRIPT, *three_dimensional(tmp_path), nproc=8, timeout=200)
    assert_same_training(reference(), tmp_path / "many")


@slow
@pytest.mark.parametrize("strategy", ["bucket", "fsdp", "pipeline", "zero2", "tensor", "context"])
def test_a_killed_rank_does_not_leave_the_others_waiting(tmp_path, strategy):
    """Only the network tells the others (no torchrun): they end because a connection closed, not by the time-out."""
    script = whose_rank_1_dies(SCRIPT, tmp_path)
    options = arguments(tmp_path / "runs", "many", "--strategy", strategy, "--train.steps", "4000", "--timeout_s", "60")
    port = str(free_port())
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    processes = [
        subprocess.Popen([sys.executable, str(script), *options], cwd=ROOT, text=True, stderr=subprocess.PIPE,
                         stdout=subprocess.DEVNULL,
                         env=clean_environment(DEVICE="cpu", RANK=str(rank), LOCAL_RANK=str(rank), **place))
        for rank in range(3)
    ]  # fmt: skip
    try:
        processes[1].wait(timeout=100)
        for survivor in (processes[0], processes[2]):
            _, stderr = survivor.communicate(timeout=100)
            assert survivor.returncode not in (0, None)
            assert "error: lost rank 1 (" in stderr, stderr[-2000:]
    finally:
        for process in processes:
            process.kill()
