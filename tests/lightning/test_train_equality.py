"""Every strategy of Lightning must give the training of ddp/single_device.py, step by step."""

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
from launching import OnRanks

ON_RANKS = OnRanks("tests/lightning/lightning_on_ranks.py")
# Evaluated before the last step, and after it.
BASE = [*SMALL, "--train.steps", str(STEPS), "--train.eval_every", str(STEPS - 1), "--batch.global_size", "24"]
FP64 = ["--train.precision", "fp64"]
slow = pytest.mark.slow


def arguments(folder, strategy, *more):
    return [*BASE, "--runs_dir", str(folder), "--run_name", "many", "--strategy", strategy, *more]


QUICK = [("single_device", 1, 4), ("ddp", 2, 1), ("ddp", 3, 4), ("fsdp", 2, 4), ("fsdp", 3, 1),
         ("tensor_parallel", 2, 4)]  # fmt: skip
PLACES = [("single_device", 1), *((s, n) for s in ("ddp", "fsdp", "tensor_parallel") for n in (2, 3, 4)), ("fsdp", 1)]
PLACES.remove(("tensor_parallel", 3))  # heads do not divide among three


@pytest.mark.parametrize(("strategy", "ranks", "accumulation"), [
    pytest.param(*place, count, marks=[] if (*place, count) in QUICK else slow) for place in PLACES for count in (1, 4)
])  # fmt: skip
def test_fp64_is_the_proof(group, single_device, tmp_path, strategy, ranks, accumulation):
    """Untied and all at once, or tied where gradients accumulate."""
    model = ["--model.tied", "true"] if accumulation > 1 else []
    data_parallel = 1 if strategy == "tensor_parallel" else ranks
    micro = ["--batch.micro_size", str(24 // data_parallel // accumulation)] if accumulation > 1 else []
    group(ranks)(ON_RANKS.train, arguments(tmp_path, strategy, *FP64, *model, *micro))
    assert_same_training(single_device(*BASE, *FP64, *model), tmp_path / "many")


def test_rows_and_depth(group, single_device, tmp_path):
    """Two tensor ranks by two that FSDP cuts batch and weights among, with accumulation."""
    micro = ["--batch.micro_size", "6", "--tp_dimensions", "[2, 1, 2]"]
    group(4)(ON_RANKS.train, arguments(tmp_path, "tensor_parallel", *FP64, *micro))
    assert_same_training(single_device(*BASE, *FP64), tmp_path / "many")


@slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "tensor_parallel"])
def test_activation_checkpointing(group, single_device, tmp_path, strategy):
    group(2)(ON_RANKS.train, arguments(tmp_path, strategy, *FP64, "--train.activation_checkpointing", "true"))
    assert_same_training(single_device(*BASE, *FP64), tmp_path / "many")


@pytest.mark.parametrize("strategy", ["fsdp", *(pytest.param(name, marks=slow) for name in ("ddp", "tensor_parallel"))])
def test_first_gradients_in_fp32(group, single_device, tmp_path, strategy):
    options = ["--train.steps", "1", "--optimizer.clip", "1000"]
    group(2)(ON_RANKS.train, arguments(tmp_path, strategy, *options))
    assert_same_first_gradients(single_device(*BASE, *options), tmp_path / "many", 2 + 2 * 9 + 1)


@slow
def test_fp32(group, single_device, tmp_path):
    """AdamW's division by small roots amplifies the last bits of fp32 in the parameters, not in the losses."""
    group(2)(ON_RANKS.train, arguments(tmp_path, "ddp"))
    assert_same_rows(single_device(*BASE), tmp_path / "many", 1e-5)
    a, b = read_checkpoint(single_device(*BASE), STEPS), read_checkpoint(tmp_path / "many", STEPS)
    assert largest_difference(a, b, "model.") <= 1e-4


@pytest.mark.parametrize(("strategy", "ranks", "precision"), [
    ("single_device", 1, "bf16"), ("fsdp", 2, "bf16"), ("ddp", 2, "fp16"),
    pytest.param("ddp", 2, "bf16", marks=slow), pytest.param("tensor_parallel", 2, "bf16", marks=slow),
])  # fmt: skip
def test_low_precision_trains(group, single_device, tmp_path, strategy, ranks, precision):
    options = ["--train.steps", "20"]  # the loss must have fallen by 0.5
    group(ranks)(ON_RANKS.train, arguments(tmp_path, strategy, "--train.precision", precision, *options))
    assert_trains_in_low_precision(single_device(*BASE, *options), tmp_path / "many")
    # The norm before clipping, of unscaled gradients: bf16's 8 bits leave it within a few per cent.
    expected, norm = (read_rows(run)[0]["grad_norm"] for run in (single_device(*BASE, *options), tmp_path / "many"))
    assert norm == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("strategy", "ranks", "accumulation"), [("ddp", 2, 4), ("fsdp", 2, 1), ("tensor_parallel", 2, 4)]
)
def test_steps_and_effective_batch(group, tmp_path, strategy, ranks, accumulation):
    """As many optimizer steps as were asked for, each over 24 samples: on one rank each, or on all tensor ranks."""
    parts = 1 if strategy == "tensor_parallel" else ranks
    options = ["--batch.micro_size", str(24 // parts // accumulation), "--train.eval_every", "0"]
    by_rank = group(ranks)(ON_RANKS.counted, arguments(tmp_path, strategy, "--train.steps", "3", *options))
    for steps in by_rank:
        assert [before for before, _, _ in steps] == [0, 1, 2]  # Lightning's count
        assert [tokens for _, _, tokens in steps] == [24 // parts * 16] * 3
    for step in range(3):
        samples = [steps[step][1] for steps in by_rank]
        if parts == 1:
            assert all(mine == samples[0] for mine in samples)
            samples = samples[:1]
        together = [sample for mine in samples for sample in mine]
        assert len(together) == len(set(together)) == 24
    assert [row["tokens"] for row in read_rows(tmp_path / "many")] == [24 * 16, 2 * 24 * 16, 3 * 24 * 16]
    counts = {t.item() for name, t in read_checkpoint(tmp_path / "many", 3).items() if name.endswith(".step")}
    assert counts == {3}  # the optimizer's own count


@pytest.mark.parametrize(("factor", "too_small"), [
    (" * accumulation", 4), pytest.param(" * self.data_parallel", 2, marks=slow),
])  # fmt: skip
def test_a_factor_left_out_shows_in_the_norm_alone(group, tmp_path, factor, too_small):
    """On two ranks with four micro-batches: the two rows of the README's table."""
    options = ["--train.steps", "1", "--batch.micro_size", "3"]
    for folder, function, more in (("right", ON_RANKS.train, []), ("wrong", ON_RANKS.train_changed, [factor, ""])):
        group(2)(function, arguments(tmp_path / folder, "ddp", *options), *more)
    (right,), (wrong,) = (read_rows(tmp_path / folder / "many") for folder in ("right", "wrong"))
    assert wrong["loss"] == right["loss"]
    assert wrong["grad_norm"] * too_small == pytest.approx(right["grad_norm"], rel=1e-6)


@pytest.mark.parametrize(("samples", "mean"), [(24, 1), (25, 25 / 24)])
def test_lightnings_own_mean_drops_what_the_ranks_do_not_divide(group, samples, mean):
    """A loss that is 1 everywhere. The number of samples is averaged over the ranks as an integer: 25 / 2 is 12."""
    assert group(2)(ON_RANKS.logged_mean, samples) == [pytest.approx(mean, rel=1e-6)] * 2
