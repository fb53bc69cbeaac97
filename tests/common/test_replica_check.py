"""The guard must find a single changed bit on a single rank, and say where."""

import pytest
from launching import OnRanks

ON_RANKS = OnRanks("tests/common/replica_on_ranks.py")


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_equal_replicas_pass(group, size, dtype):
    assert group(size)(ON_RANKS.compare, dtype, None, []) == [None] * size


@pytest.mark.parametrize(("size", "where", "on_ranks"), [
    (3, "1.weight", [2]), (4, "0.bias", [1]), (4, "1.bias", [0, 3]), (3, "2.running_mean", [0]),
])  # fmt: skip
def test_one_bit_is_found(group, size, where, on_ranks):
    found = group(size)(ON_RANKS.compare, "float32", where, on_ranks)
    assert all(f[0] == where for f in found)
    # With two against two there is no majority; either pair may be named.
    assert all(sorted(f[1]) in (on_ranks, sorted(set(range(size)) - set(on_ranks))) for f in found)
    assert len(on_ranks) * 2 == size or all(f[1] == on_ranks for f in found)


def test_the_first_of_several_is_named(group):
    assert group(3)(ON_RANKS.compare_two, "float32")[0][0] == "0.weight"


def test_one_collective_while_all_is_well(group):
    assert group(2)(ON_RANKS.collectives) == [["all_reduce"], ["all_reduce"]]


def test_a_mesh_says_who_holds_the_same(group):
    assert group(4)(ON_RANKS.on_a_mesh, "") == [None] * 4
    # Rank 3 shares its rows of the weight with rank 1, and the bias with all, of whom 1 and 2 are its neighbours.
    for flipped, who_see_it in (("weight", [1, 3]), ("bias", [1, 2, 3])):
        for rank, (code, line) in enumerate(group(4)(ON_RANKS.on_a_mesh, flipped)):
            assert code == 2
            assert (f"first in {flipped}, on rank(s)" if rank in who_see_it else "other ranks hold different") in line


def test_all_ranks_end(group):
    for code, line in group(3)(ON_RANKS.ends):
        assert code == 2
        assert "after step 7" in line
        assert "first in 1.weight, on rank(s) 2" in line
