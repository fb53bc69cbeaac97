"""from_scratch/train.py with any strategy, mesh, world size and accumulation is ddp/single_device.py's training."""

import re
import subprocess
import sys
import time

import pytest
from equality import SMALL, assert_same_training, assert_trains_in_low_precision, read_rows
from launching import ROOT, SCRIPTS, assert_refused, clean_environment, free_port, whose_rank_1_dies

SCRIPT = "from_scratch/train.py"
STEPS = 20
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
    [(2, 1), (3, 4), pytest.param(4, 4, marks=slow), pytest.param(2, 4, marks=slow), pytest.param(4, 1, marks=slow)],
)
@pytest.mark.parametrize(
    "strategy", ["naive", "accumulate", "overlap", "bucket", "zero1", "zero2", "fsdp", "tensor", "pipeline", "context"]
)
def test_every_strategy(group, reference, tmp_path, strategy, ranks, accumulation):
    samples = 48 if strategy in ("tensor", "pipeline", "context") else 48 // ranks
    options = ["--strategy", strategy, "--batch.micro_size", str(samples // accumulation)]
    tied = ["--model.tied", "true"] if accumulation == 4 else []
    train_and_compare(group, reference, tmp_path, ranks, options, tied)


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
    train_and_compare(group, reference, tmp_path, 4, [*options, "--batch.micro_size", "6"], model)


def test_activation_checkpointing(group, reference, tmp_path):
    options = ["--strategy", "fsdp", "--mesh.tp", "2", "--train.activation_checkpointing", "true"]
    train_and_compare(group, reference, tmp_path, 4, options)


@pytest.mark.parametrize(("first", "then"), [
    ((4, ["--strategy", "fsdp", "--mesh.tp", "2"]), (2, ["--strategy", "pipeline"])),
    ((2, ["--strategy", "pipeline"]), (3, ["--strategy", "zero2"])),
    ((3, ["--strategy", "zero1"]), (2, ["--strategy", "fsdp"])),
], ids=["fsdp x tensor to pipeline", "pipeline to zero2", "zero1 to fsdp"])  # fmt: skip
def test_resume_under_another_strategy(group, reference, tmp_path, first, then):
    """Ten steps one way, ten another, at another world size: 20 steps of one process. Tied, the harder case."""
    tied = ["--model.tied", "true"]
    group(first[0])(SCRIPTS.train_until, SCRIPT, arguments(tmp_path, "many", *first[1], *tied), 10)
    assert len(read_rows(tmp_path / "many")) == 10
    group(then[0])(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *then[1], *tied))
    assert_same_training(reference(*tied), tmp_path / "many")


def test_ddp_goes_on_from_shards_by_hand(group, reference, tmp_path):
    group(2)(SCRIPTS.train_until, SCRIPT, arguments(tmp_path, "many", "--strategy", "fsdp"), 10)
    group(2)(SCRIPTS.train, "ddp/train.py", arguments(tmp_path, "many"))
    assert_same_training(reference(), tmp_path / "many")


@pytest.mark.parametrize("strategy", ["bucket", "zero2", "fsdp", "tensor", "pipeline", "context"])
def test_bf16_trains(group, single_device, tmp_path, strategy):
    options = ["--strategy", strategy, "--train.precision", "bf16"]
    group(2)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "low", *options))
    assert_trains_in_low_precision(single_device(*BASE, "--train.precision", "fp32"), tmp_path / "low")


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


def test_three_dimensions(launch, reference, tmp_path):
    """2 x 2 x 2 on 8 ranks, as a user starts it."""
    config = ["--config", "from_scratch/configs/three_dimensional.yaml", "--batch.global_size", "48"]
    launch(SCRIPT, *arguments(tmp_path, "many", *config, "--train.steps", str(STEPS)), nproc=8, timeout=200)
    assert_same_training(reference(), tmp_path / "many")


@pytest.mark.parametrize(
    "strategy", ["bucket", "fsdp", "pipeline", *(pytest.param(s, marks=slow) for s in ("zero2", "tensor", "context"))]
)
def test_a_killed_rank_does_not_leave_the_others_waiting(tmp_path, strategy):
    """Nobody but the network tells the others (no torchrun): they end by themselves, long before the time-out."""
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
        died = time.monotonic()
        for survivor in (processes[0], processes[2]):
            _, stderr = survivor.communicate(timeout=100)
            assert survivor.returncode not in (0, None)
            assert re.search(r"Connection (closed|reset) by peer|Broken pipe", stderr), stderr[-2000:]
        assert time.monotonic() - died < 30  # by the closed connection, not by the time-out of 60 s
    finally:
        for process in processes:
            process.kill()
