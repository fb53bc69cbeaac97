"""Fully sharded data parallelism by hand: the training of one process, and in memory what the formula says."""

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
def test_training_is_that_of_one_process(group, ranks, accumulation, tied):
    check(group(ranks)(ON_RANKS.train_fully_sharded, accumulation, {"tied": tied}))


@pytest.mark.parametrize("options", [{"reshard": False}, {"checkpointing": True}, {"experts": 4}], ids=str)
def test_variants(group, options):
    check(group(2)(ON_RANKS.train_fully_sharded, 4, options))


def test_fp32(group):
    """fp32 rounds at 6e-8; AdamW divides by the root of tiny second moments, which amplifies the last bits."""
    answers = group(3)(ON_RANKS.train_fully_sharded, 1, {"dtype": torch.float32})
    check(answers, losses=1e-5, parameters=1e-4)


def gathered(unit: list[list[int]], itemsize: int = 4) -> int:
    """Bytes of a unit when it is whole, padding included."""
    return itemsize * sum(sum(sizes) for sizes in unit)


@pytest.mark.parametrize("ranks", [2, 3])
def test_bytes_are_what_the_formula_says(group, ranks):
    """Between steps 1/n of everything. While a block computes, the root, that block and the next to come are whole."""
    for seen in group(ranks)(ON_RANKS.step_of_units, True, 1, {}):
        held, (root, first, second) = seen["held"], seen["units"]
        shards = 4 * sum(
            math.ceil(sum(sizes[:-1]) / ranks) for unit in (root, first, second) for sizes in unit
        )  # sizes[-1] is padding
        sizes = 2 * 256 * 32 + 32 + 2 * (2 * 32 + 3 * 32 * 48 + 2 * 32 * 32 + 2 * 16 * 32)
        assert 4 * sizes / ranks <= shards < 4 * (sizes / ranks + 6)  # six flats: at most an element each too much
        assert all(now["shards"] == shards for now in held.values())
        assert held["before"]["gathered"] == held["between"]["gathered"] == held["after"]["gathered"] == 0
        assert held["forward 0"]["gathered"] == gathered(root) + gathered(first) + gathered(second)
        assert held["forward 1"]["gathered"] == gathered(root) + gathered(second)
        assert held["backward 1"]["gathered"] == gathered(root) + gathered(first) + gathered(second)
        assert held["backward 0"]["gathered"] == gathered(root) + gathered(first)
        assert held["before"]["gradients"] == 0 and held["after"]["gradients"] == shards


@pytest.mark.parametrize(("reshard", "gathers"), [(True, 2), (False, 1)])
def test_messages(group, reshard, gathers):
    """Three units of two kinds (matrices, vectors): a gather forward and, if freed, backward; a reduce-scatter. All of
    it for every micro-batch."""
    for seen in group(2)(ON_RANKS.step_of_units, reshard, 4, {}):
        assert seen["events"].count("all_gather") == 4 * 6 * gathers
        assert seen["events"].count("reduce_scatter") == 4 * 6


def test_the_next_unit_is_fetched_ahead(group):
    """The gathers of a block begin before the block before it computes, and are waited for after that; gradients leave
    during backward."""
    for seen in group(2)(ON_RANKS.step_of_units, True, 1, {}):
        events = seen["events"]
        root, block = ["all_gather", "wait"] * 2, ["all_gather"] * 2
        forward = ["before", *root, *block, "wait", "wait", *block, "forward 0", "wait", "wait", "forward 1", "between"]
        assert events[: len(forward)] == forward
        backward = events[len(forward) :]
        assert backward.index("backward 1") > 4 and backward[: backward.index("backward 1")].count("all_gather") == 6
        assert "all_gather" not in backward[backward.index("backward 1") :]
        end = backward.index("backward ends")
        assert backward[:end].count("reduce_scatter") == 6
        assert backward[end + 1 :] == ["wait", "after"]  # one message at most is left


@pytest.mark.parametrize("reduce", ["float32", "bfloat16"])
def test_low_precision(group, reduce):
    """bf16 rounds at 2^-9; gradients of some dozens of such operations in a row are within a few per cent."""
    for seen in group(2)(ON_RANKS.low_precision, reduce):
        assert seen["computed in"] == {"weight": torch.bfloat16, "input": torch.bfloat16}
        assert seen["reduced in"] == {getattr(torch, reduce)}
        assert seen["kept in"] == seen["gradients in"] == {torch.float32}
        assert 1e-5 < seen["relative distance"] < 5e-2


def test_low_precision_gathers_half_the_bytes(group):
    for seen in group(2)(ON_RANKS.step_of_units, True, 1, {"compute_dtype": torch.bfloat16}):
        root, _, second = seen["units"]
        assert seen["held"]["forward 1"]["gathered"] == gathered(root, 2) + gathered(second, 2)


@pytest.mark.parametrize("in_group", [False, True], ids=["world", "a group without rank 0"])
def test_odd_units(group, in_group):
    """Tied inside a unit, frozen, unused, shapes that do not divide, two micro-batches. fp64, values of order 100."""
    names = ["shift", "first.weight", "first.bias", "inner.0.weight", "inner.0.bias", "inner.2.weight", "inner.2.bias",
             "tied.weight", "unused.weight", "unused.bias"]  # fmt: skip
    answers = group(3)(ON_RANKS.odd_units, in_group)
    for seen, found, held in answers[1:] if in_group else answers:
        assert max(seen.values()) <= 1e-11 and len(seen) == 9, seen
        assert sorted(found) == sorted(names)
        assert held["gathered"] == 0


def test_the_state_dict_has_the_models_own_names(group):
    for equal, parameters, gap in group(3)(ON_RANKS.state_round_trip):
        assert equal
        assert parameters == sorted(
            f"{unit}flat_shard_{kind}" for unit in ("", "blocks.0.", "blocks.1.") for kind in (0, 1)
        )
        assert gap <= 1e-9  # fp64, a sum of 768 losses of order 5


def test_a_tie_across_units_is_refused(group):
    for message in group(2)(ON_RANKS.tied_across_units):
        assert message.startswith("parameter weight of Linear is tied to one that another unit has cut up")
