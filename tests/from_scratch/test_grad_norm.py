"""The global gradient norm: over pieces that all ranks have of one gradient, and what clipping does with it."""

import pytest
from launching import OnRanks

ON_RANKS = OnRanks("tests/from_scratch/tp_on_ranks.py")


@pytest.mark.parametrize(("value", "dtype", "norm", "after"), [
    (3.0, "float64", 6.0, 0.5),  # two numbers on each of two ranks: the root of 4 · 3², scaled to 1
    (0.125, "float64", 0.25, 0.125),  # below the limit: nothing is scaled, least of all up
    (300.0, "float16", 600.0, 0.5),  # its square, 90 000, is more than fp16 can hold
])  # fmt: skip
def test_norm_and_clipping_to_1(group, value, dtype, norm, after):
    for found, clipped in group(2)(ON_RANKS.clip, value, dtype):
        assert found == pytest.approx(norm, rel=1e-9)  # summed in fp32 at least, of numbers that are exact there
        assert clipped == pytest.approx(after, rel=1e-3 if dtype == "float16" else 1e-5)  # 1e-6 keeps off zero


def test_what_both_ranks_hold_counts_once(group):
    for found, _ in group(2)(ON_RANKS.clip, 3.0, "float64", 2):
        assert found == pytest.approx(18**0.5, rel=1e-12)
