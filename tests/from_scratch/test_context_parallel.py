"""Ring attention by hand: output, gradients and training equal to one process; equal work for all ranks."""

import sys

import pytest
import torch
from equality import STEPS
from launching import ROOT, OnRanks

sys.path.insert(0, str(ROOT / "from_scratch"))

import context_parallel as cp

ON_RANKS = OnRanks("tests/from_scratch/cp_on_ranks.py")


@pytest.mark.parametrize("kv_heads", [6, 2], ids=["all heads", "grouped"])
@pytest.mark.parametrize("balanced", [False, True], ids=["plain", "balanced"])
@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)])
def test_ring_attention(group, ranks, balanced, kv_heads):
    """fp64 and values of order 1 to 100: some 1e-14."""
    for seen, sends in group(ranks)(ON_RANKS.attention, balanced, kv_heads, torch.float64):
        assert seen.keys() == {"output", "d query", "d key", "d value"}
        assert max(seen.values()) <= 1e-12, seen
        assert sends == (ranks - 1) + (ranks - 1) + ranks  # keys and values twice, their gradients home


def test_ring_attention_in_bf16(group):
    """Only the inputs and results are rounded, by 2^-9 of values up to some 4 (output) and 16 (gradients). With scores
    in bf16 the output alone was off by 0.17."""
    for seen, _ in group(2)(ON_RANKS.attention, True, 2, torch.bfloat16):
        assert seen["output"] <= 2e-2 and max(seen.values()) <= 0.1, seen


@pytest.mark.parametrize(
    ("ranks", "balanced"),
    [
        (2, True),
        (3, False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(2, False), (3, True), (4, False), (4, True)]),
    ],
)
def test_training_is_that_of_one_process(group, ranks, balanced):
    """As for the other strategies: 1e-16 rounding, amplified a little. A wrong position shows in the first loss."""
    for seen in group(ranks)(ON_RANKS.train, balanced, {}, STEPS):
        assert seen.pop("moved") > 5e-4 * STEPS
        assert seen.keys() == {"loss", "gradients", "norm", "parameters"}
        assert max(seen.values()) <= 1e-12, seen


def test_every_position_is_somewhere(group):
    assert group(3)(ON_RANKS.split, False) == [list(range(r * 8, r * 8 + 8)) for r in range(3)]
    assert group(3)(ON_RANKS.split, True) == [
        [0, 1, 2, 3, 20, 21, 22, 23],
        [4, 5, 6, 7, 16, 17, 18, 19],
        [8, 9, 10, 11, 12, 13, 14, 15],
    ]


def work(ranks, balanced, rank, owner, length=24):
    """Pairs of query and key that are computed, masked ones of the diagonal included."""
    pieces = cp.visible_pieces(length, rank, owner, ranks, balanced)
    return sum((q.stop - q.start) * (k.stop - k.start) for q, k, _ in pieces)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_balance(ranks):
    """Balanced: in every step of the ring all ranks have the same work. Plain: the last has n times the first's."""
    for step in range(ranks):
        assert len({work(ranks, True, rank, (rank - step) % ranks) for rank in range(ranks)}) == 1
    totals = [sum(work(ranks, False, rank, owner) for owner in range(ranks)) for rank in range(ranks)]
    assert totals == [(rank + 1) * 24 * 24 for rank in range(ranks)]


def test_what_cannot_work_is_refused(group):
    for message in group(2)(ON_RANKS.refused, "sequence"):
        assert message == "a sequence of 18 tokens does not divide into 4 pieces; choose a multiple"
    for message in group(2)(ON_RANKS.refused, "mask"):
        assert message.startswith("ring attention is causal and takes no mask")
