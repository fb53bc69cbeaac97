"""The mesh: every rank has one place, and groups hold those who differ on their axis alone."""

import sys

import pytest
from launching import ROOT, OnRanks

sys.path.insert(0, str(ROOT / "from_scratch"))

import mesh

ON_RANKS = OnRanks("tests/from_scratch/dp_on_ranks.py")


def test_two_by_two(group):
    """dp 2 x tp 2 of ranks 0 … 3: tp has neighbours, dp every second."""
    answers = group(4)(ON_RANKS.grid, {"dp": 2, "tp": 2})
    assert [coordinates for coordinates, _ in answers] == [
        {"dp": d, "pp": 0, "cp": 0, "tp": t} for d in (0, 1) for t in (0, 1)
    ]
    for rank, (_, sums) in enumerate(answers):
        assert sums["tp"] == ((0 + 1, 2) if rank < 2 else (2 + 3, 2))
        assert sums["dp"] == sums["dp_cp"] == ((0 + 2, 2) if rank % 2 == 0 else (1 + 3, 2))
        assert sums["pp"] == sums["cp"] == (rank, 1)


def test_data_and_context_parallel_ranks_together(group):
    for _, sums in group(4)(ON_RANKS.grid, {"dp": 2, "cp": 2}):
        assert sums["dp_cp"] == (0 + 1 + 2 + 3, 4)
        assert sums["dp"][1] == sums["cp"][1] == 2


def test_a_group_is_created_once(group):
    """The axes of one rank share theirs, and dp is dp_cp: 3 groups, not 8."""
    assert group(2)(ON_RANKS.groups_made, {"dp": 2}) == [3, 3]


def test_lines_of_a_large_grid():
    """24 ranks as 2 x 3 x 2 x 2: each rank is once in the groups of an axis, whose stride is the product behind it."""
    grid = mesh.make_grid(24, {"dp": 2, "pp": 3, "cp": 2, "tp": 2})
    for axis, size, stride in (("dp", 2, 12), ("pp", 3, 4), ("cp", 2, 2), ("tp", 2, 1)):
        lines = mesh.lines(grid, axis)
        assert sorted(rank for line in lines for rank in line) == list(range(24))
        assert all(line == list(range(line[0], line[0] + size * stride, stride)) for line in lines)
    assert mesh.lines(grid, "dp", "cp")[0] == [0, 2, 12, 14]


@pytest.mark.parametrize(("sizes", "found"), [
    ({"dp": 3}, "the mesh dp 3 x pp 1 x cp 1 x tp 1 has 3 places, but there are 2 ranks"),
    ({"dp": 1}, "the mesh dp 1 x pp 1 x cp 1 x tp 1 has 1 places, but there are 2 ranks"),
    ({"dp": 0}, "the mesh is dp 0 x pp 1 x cp 1 x tp 1; expected at least 1 on every axis"),
])  # fmt: skip
def test_sizes_that_do_not_fit(group, sizes, found):
    for message in group(2)(ON_RANKS.refused_grid, sizes):
        assert message.startswith(found) and "\n" not in message
