"""Data parallelism by hand: each of the four steps trains what one process trains, with as many messages as it says."""

import itertools
import sys

import pytest
import torch
from equality import STEPS
from launching import ROOT, OnRanks

sys.path.insert(0, str(ROOT / "tests" / "from_scratch"))

from dp_on_ranks import check

ON_RANKS = OnRanks("tests/from_scratch/dp_on_ranks.py")
PARAMETERS = 1 + 2 * 9 + 1 + 1  # embedding, nine in each of two blocks, the last norm, head

# Each strategy at 2 ranks and at 3, where a factor of two would show; accumulation with and without a tied weight.
QUICK = [(2, 4, True), (3, 1, False), (3, 4, True)]
CASES = [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow)
         for case in itertools.product([2, 3, 4], [1, 4], [False, True])]  # fmt: skip


@pytest.mark.parametrize(("ranks", "accumulation", "tied"), CASES)
def test_buckets_train_what_one_process_trains(group, ranks, accumulation, tied):
    check(group(ranks)(ON_RANKS.train_with, "bucketed", accumulation, {"tied": tied}))


@pytest.mark.parametrize("kind", ["naive", "overlapped"])
@pytest.mark.parametrize(
    ("ranks", "accumulation", "tied"), [(2, 4, True), pytest.param(3, 1, False, marks=pytest.mark.slow), (3, 4, False)]
)
def test_the_steps_before_do_too(group, kind, ranks, accumulation, tied):
    check(group(ranks)(ON_RANKS.train_with, kind, accumulation, {"tied": tied}))


def test_gradients_that_are_zeroed_in_place(group):
    check(group(2)(ON_RANKS.train_with, "bucketed", 4, {"none": False}))


@pytest.mark.parametrize(
    ("name", "ranks", "parameters", "moved"), [("adamw", 3, 1e-4, 1e-3), ("sgd", 2, 1e-6, 1e-6 * STEPS)]
)
def test_fp32(group, name, ranks, parameters, moved):
    """fp32 rounds at 6e-8; AdamW divides by the root of tiny second moments, which amplifies the last bits."""
    check(
        group(ranks)(ON_RANKS.train_with, "bucketed", 1, {"dtype": torch.float32, "name": name}),
        losses=1e-5,
        parameters=parameters,
        moved=moved,
    )


@pytest.mark.parametrize(("kind", "hold_back", "expected"), [
    ("naive", True, PARAMETERS),
    ("naive", False, 4 * PARAMETERS),  # what forgetting no_sync costs
    ("overlapped", True, PARAMETERS),
    ("bucketed", True, 4),
])  # fmt: skip
def test_collectives_of_a_step_of_four_micro_batches(group, kind, hold_back, expected):
    """Buckets of at least 40 000 bytes, from the end: the head (65 536 bytes in fp64); norm to attention output of the
    second block (45 568); from there to `up` of the first (41 216); the rest with the embedding."""
    assert group(2)(ON_RANKS.collectives, kind, 4, hold_back) == [(expected, expected)] * 2


def test_naive_waits_for_the_end_of_backward(group):
    for events in group(2)(ON_RANKS.order_of_events, "naive"):
        assert events == ["head", "embedding", "backward ends"] + ["all_reduce"] * PARAMETERS


@pytest.mark.parametrize("kind", ["overlapped", "bucketed"])
def test_messages_leave_during_backward(group, kind):
    """Every all-reduce begins before backward ends, all but the last before the last gradient; none is waited for."""
    for events in group(2)(ON_RANKS.order_of_events, kind):
        end = events.index("backward ends")
        sent, waits = events.count("all_reduce"), events.count("wait")
        assert sent == waits > 1
        assert events[:end].count("all_reduce") == sent
        assert events[end + 1 :] == ["wait"] * waits
        assert events[: events.index("embedding")].count("all_reduce") == sent - 1


@pytest.mark.parametrize("kind", ["naive", "overlapped", "bucketed"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_unused_frozen_and_tied_parameters(group, kind, accumulation):
    """Zeros stand in for what a rank did not use; what it used only in an earlier micro-batch counts. fp64 sums of
    values of order 10."""
    for seen, without, equal in group(3)(ON_RANKS.odd, kind, accumulation):
        assert max(seen.values()) <= 1e-12 and len(seen) == 9, seen
        assert without == ["frozen.weight", "frozen.bias"]
        assert all(equal.values()) and "shift" in equal and "frozen.weight" in equal


def test_a_bucket_has_one_dtype(group):
    expected = [(["torch.float64"], True), (["torch.float32"], True)]  # the first layer, ready last, is fp32
    assert group(2)(ON_RANKS.mixed_dtypes) == [expected] * 2


@pytest.mark.parametrize("kind", ["naive", "overlapped", "bucketed"])
def test_a_group_without_rank_0(group, kind):
    outside, *inside = group(3)(ON_RANKS.subgroups, kind)
    assert outside == ([], None)
    assert inside == [([1.5, 1.0], None)] * 2  # the mean of 1 and 2; the weights of rank 1, the group's first


@pytest.mark.parametrize("kind", ["overlapped", "bucketed"])
def test_forgetting_finish_is_an_error(group, kind):
    for message in group(2)(ON_RANKS.second_backward, kind):
        assert "call finish() after every backward" in message


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_views_into_buckets(group, set_to_none):
    assert group(2)(ON_RANKS.views, set_to_none) == [[True] * 3] * 2
