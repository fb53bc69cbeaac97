"""ZeRO-1 and ZeRO-2 by hand: the training of one process, from 1/n of the state on each rank."""

import itertools
import math
import sys

import pytest
import torch
from launching import ROOT, OnRanks

sys.path.insert(0, str(ROOT / "tests" / "from_scratch"))

from dp_on_ranks import check

ON_RANKS = OnRanks("tests/from_scratch/zero_on_ranks.py")

# Each strategy at 2 ranks and at 3, where a factor of two would show; accumulation with and without a tied weight.
QUICK = [(2, 4, True), (3, 1, False), (3, 4, True)]
CASES = [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow)
         for case in itertools.product([2, 3, 4], [1, 4], [False, True])]  # fmt: skip


@pytest.mark.parametrize(("ranks", "accumulation", "tied"), CASES)
def test_zero_2_trains_what_one_process_trains(group, ranks, accumulation, tied):
    check(group(ranks)(ON_RANKS.train_sharded_optimizer, 2, accumulation, {"tied": tied}))


@pytest.mark.parametrize(
    ("ranks", "accumulation", "tied"),
    [
        (2, 4, True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(3, 1, False), (4, 1, False)]),
        (3, 4, True),
    ],
)
def test_zero_1_does_too(group, ranks, accumulation, tied):
    """Its gradients are those of data_parallel.py, where all combinations are tested."""
    check(group(ranks)(ON_RANKS.train_sharded_optimizer, 1, accumulation, {"tied": tied}))


@pytest.mark.parametrize("stage", [1, 2])
def test_fp32(group, stage):
    """fp32 rounds at 6e-8; AdamW divides by the root of tiny second moments, which amplifies the last bits."""
    answers = group(3)(ON_RANKS.train_sharded_optimizer, stage, 1, {"dtype": torch.float32})
    check(answers, losses=1e-5, parameters=1e-4)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("stage", [1, 2])
def test_bytes_are_what_the_formula_says(group, stage, ranks):
    """AdamW keeps two numbers of 8 bytes for each element of a piece; a piece is ceil(size / n)."""
    for seen in group(ranks)(ON_RANKS.bytes_and_messages, stage, 1):
        pieces, whole = sum(math.ceil(size / ranks) for size in seen["sizes"]), sum(seen["sizes"])
        assert seen["state"] == 2 * 8 * pieces
        assert whole / ranks <= pieces < whole / ranks + len(seen["sizes"])
        if stage == 1:
            assert seen["most whole gradients"] == 8 * whole
        else:
            assert seen["gradients"] == 8 * pieces
            # At the worst one that is ready waits for those before it in its block; never the whole model's.
            assert seen["most whole gradients"] <= 8 * max(max(seen["sizes"]), 3 * 32 * 48)


def test_messages_of_zero_1(group):
    for seen in group(2)(ON_RANKS.bytes_and_messages, 1, 4):
        gradients = ["all_reduce"] * len(seen["sizes"])
        assert seen["events"] == ["backward ends"] * 4 + gradients + ["all_gather"]


def test_messages_of_zero_2(group):
    """A reduce-scatter a gradient and micro-batch, all begun before backward ends, all but one finished there too."""
    for seen in group(2)(ON_RANKS.bytes_and_messages, 2, 4):
        count, events = len(seen["sizes"]), seen["events"]
        in_backward = ["reduce_scatter"] + ["wait", "reduce_scatter"] * (count - 1) + ["backward ends", "wait"]
        assert events == in_backward * 4 + ["all_gather"]


@pytest.mark.parametrize(("name", "options"), [
    ("AdamW", {"lr": 0.1, "amsgrad": True}),
    ("SGD", {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    ("RMSprop", {"lr": 0.1, "centered": True}),
    ("Adagrad", {"lr": 0.1}),
    ("NAdam", {"lr": 0.1}),
    ("Adamax", {"lr": 0.1}),
])  # fmt: skip
@pytest.mark.parametrize("stage", [1, 2])
def test_any_elementwise_optimizer(group, stage, name, options):
    """In 3 parts of tensors of 35, 7, 7 and 1 elements; fp64, five steps."""
    for seen in group(3)(ON_RANKS.any_optimizer, stage, name, options):
        assert seen.keys() == {"parameters", "state"}
        assert max(seen.values()) <= 1e-12, seen


@pytest.mark.parametrize("stage", [1, 2])
def test_frozen_tied_unused_and_a_group_without_rank_0(group, stage):
    outside, *inside = group(3)(ON_RANKS.odd_optimizer, stage)
    assert outside == {}
    for seen in inside:
        assert len(seen) == 12 and max(seen.values()) <= 1e-12, seen


@pytest.mark.parametrize("ranks", [2, 4])
def test_state_of_three_ranks_goes_on_at_another_number(group, ranks):
    """Two steps at three ranks, then two at others, against four at three. Weights are loaded last of all."""
    model, state = group(3)(ON_RANKS.save, 2)[0]
    expected_model, expected_state = group(3)(ON_RANKS.save, 4)[0]
    for resumed_model, resumed_state in group(ranks)(ON_RANKS.resume, (model, state), 2, 4):
        for name, tensor in expected_model.items():
            assert (resumed_model[name] - tensor).abs().max() <= 1e-12, name  # fp64, sums in another order
            assert (model[name] - tensor).abs().max() > 1e-4  # two steps further
        for number, entries in expected_state["state"].items():
            for key, value in entries.items():
                assert (resumed_state["state"][number][key] - value).abs().max() <= 1e-12


@pytest.mark.parametrize(("name", "found"), [
    ("LBFGS", "LBFGS needs whole parameters"),
    ("Adafactor", "Adafactor needs whole parameters"),
    ("scalar", "a parameter of shape ()"),
])  # fmt: skip
def test_what_cannot_be_cut_is_refused(group, name, found):
    for message in group(2)(ON_RANKS.refused_optimizer, name):
        assert message.startswith(found) and "\n" not in message


def test_forgetting_finish_is_an_error(group):
    for message in group(2)(ON_RANKS.forgotten_finish):
        assert "call finish() after every backward" in message
