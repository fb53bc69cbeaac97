"""Tensor parallelism by hand, one- and three-dimensional: everything equal to one process, and counted."""

import itertools
import sys

import pytest
from equality import STEPS
from launching import ROOT, OnRanks

sys.path.insert(0, str(ROOT / "from_scratch"))

import tensor_parallel_3d as tp3d

ON_RANKS = OnRanks("tests/from_scratch/tp_on_ranks.py")


def check(answers):
    """fp64 sums in another order differ by some 1e-16 of values of order 1, and AdamW amplifies that a little. An error
    in the parallelism shows as 1e-3 and more."""
    for seen in answers:
        assert seen.pop("moved") > 5e-4 * STEPS
        assert seen.keys() == {"loss", "gradients", "norm", "parameters"}
        assert max(seen.values()) <= 1e-12, seen


PLAIN, SEQUENCE, slow = False, True, pytest.mark.slow


@pytest.mark.parametrize(("ranks", "sequence_parallel", "tied"), [
    (2, PLAIN, True), (3, PLAIN, False), (2, SEQUENCE, True), (3, SEQUENCE, False),
    *(pytest.param(*case, marks=slow) for case in [(2, PLAIN, False), (3, PLAIN, True), (2, SEQUENCE, False),
                                                   (3, SEQUENCE, True), *itertools.product([4], [PLAIN, SEQUENCE],
                                                                                           [False, True])]),
])  # fmt: skip
def test_training_is_that_of_one_process(group, ranks, sequence_parallel, tied):
    changes = {"tied": tied} | ({"width": 36} if ranks == 3 else {})
    check(group(ranks)(ON_RANKS.train, sequence_parallel, changes))


def test_gradients_accumulate(group):
    """What is summed over the ranks in backward must be summed once for each micro-batch, not over and over."""
    check(group(2)(ON_RANKS.train, True, {}, 4))


def test_a_wrong_reduce_hides_behind_the_loss(group):
    """The mistake that real code makes: an all-reduce where *g*'s backward is the identity. Equal loss, n times the
    gradient; the comparison of gradients above sees it."""
    for gap, ratio in group(2)(ON_RANKS.wrong_reduce):
        assert gap <= 1e-12
        assert ratio == pytest.approx(2, rel=1e-9)


@pytest.mark.parametrize("ranks", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_gather_undoes_scatter(group, ranks):
    assert group(ranks)(ON_RANKS.conjugates) == [[True] * 4] * ranks


def test_logits_without_targets(group):
    for logits, gradient in group(2)(ON_RANKS.logits):
        assert logits <= 1e-12
        assert gradient <= 1e-12 * 10  # a sum over 24 576 squared logits: gradients of order 10


def test_collectives(group):
    """Two blocks: two pairs each. Forward: one *g* a pair, one after the embedding, three numbers a token in the loss;
    backward: one *f* a pair and one before the head."""
    for forward, backward, norm, keys in group(2)(ON_RANKS.collectives, False):
        assert forward == {"all_reduce": 2 * 2 + 1 + 3}
        assert backward == {"all_reduce": 2 * 2 + 1}
        assert norm == (4, 24, 32)  # (batch, sequence, width): whole
        assert keys == (4, 2, 24, 4)  # two of the four key-value heads


def test_collectives_with_sequence_parallelism(group):
    """Every *f* and *g* becomes an all-gather and a reduce-scatter; each of the five norms sums its gradient."""
    for forward, backward, norm, keys in group(2)(ON_RANKS.collectives, True):
        assert forward == {"all_gather": 2 * 2 + 1, "reduce_scatter": 2 * 2 + 1, "all_reduce": 3}
        assert backward == {"all_gather": 2 * 2 + 1, "reduce_scatter": 2 * 2 + 1, "all_reduce": 5}
        assert norm == (4, 12, 32)  # half the sequence
        assert keys == (4, 2, 24, 4)


@pytest.mark.parametrize(("changes", "found"), [
    ({"kv_heads": 1}, "model.kv_heads is 1, which does not divide among 2 tensor ranks"),
    ({"ffn_width": 49}, "model.ffn_width is 49"),
    ({"vocabulary": 255}, "model.vocabulary is 255"),
    ({"experts": 4}, "model.experts is 4"),
])  # fmt: skip
def test_what_cannot_be_cut_is_refused(group, changes, found):
    for message in group(2)(ON_RANKS.refused, changes):
        assert message.startswith(found) and "\n" not in message


# ---------------------------------------------------------------- three dimensions


@pytest.mark.parametrize("grid", [(4, 1, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4)], ids=str)
def test_a_pair_of_layers_on_a_grid(group, grid):
    """Equal to the dense pair, forward and backward: sums of 48 products of order 1, so some 1e-14."""
    x, y, z = grid
    first = tp3d.bytes_sent(16, 24, 48, x, y, z, 8)
    second = tp3d.bytes_sent(16, 48, 24, y, x, z, 8)
    for seen, sent in group(4)(ON_RANKS.pair_on_grid, *grid):
        assert seen.keys() == {"output", "d input", "d first", "d second"}
        assert max(seen.values()) <= 1e-12, seen
        assert sum(sent.values()) == first + second
        assert bool(sent["all_gather"]) == bool(sent["reduce_scatter"]) == (z > 1)


def test_bytes_by_hand():
    """8192 tokens, 4096 -> 16384 -> 4096 on 8 ranks, bf16. Column + row: an all-reduce of 8192 x 4096 numbers forward
    and one backward, of which a ring sends 2 · 7/8 each."""

    def pair(x, y, z):
        return tp3d.bytes_sent(8192, 4096, 16384, x, y, z, 2) + tp3d.bytes_sent(8192, 16384, 4096, y, x, z, 2)

    activations, weights = 8192 * 4096 * 2, 2 * 4096 * 16384 * 2
    assert pair(8, 1, 1) == 2 * 2 * 7 * activations // 8
    assert pair(1, 1, 8) == 2 * 7 * weights // 8  # FSDP with the weight kept: one all-gather, one reduce-scatter
    narrow = 2 * 2 * activations // 4 // 2  # both layers: an all-reduce over 2 of (tokens / 2, width / 2), twice
    wide = 2 * 2 * 4 * activations // 4 // 2  # the same for what lies between, four times as wide
    assert pair(2, 2, 2) == narrow + wide + 2 * weights // 4 // 2
