"""The collectives lesson: every operation at 2, 3 and 4 ranks, the ring by hand, its cost model, and who sees what."""

import math
import sys

import pytest
import torch
from launching import ROOT, OnRanks

sys.path.insert(0, str(ROOT / "collectives"))

import collective_ops
import data_sharding_demo
import point_to_point
import ring_all_reduce

ON_RANKS = OnRanks("tests/collectives/lesson_on_ranks.py")


def ended_well(answers):
    """The output of rank 0, after all ranks ended with 0 and only rank 0 spoke."""
    assert [code for code, _, _ in answers] == [0] * len(answers)
    assert not any("error: " in err or "Traceback" in err for _, _, err in answers)
    assert [bool(out) for _, out, _ in answers] == [True] + [False] * (len(answers) - 1)
    return answers[0][1]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_operation(group, size):
    printed = ended_well(group(size)(ON_RANKS.run, "collective_ops", []))
    assert len(collective_ops.OPERATIONS) == 18
    assert all(f"\n{name}: " in printed for name in collective_ops.OPERATIONS)
    assert printed.count("  →  ") == 18 * size  # a row for each rank
    assert f"18 operations on {size} ranks" in printed


def test_what_the_operations_give(group):
    """By hand, on 4 ranks that start with 10 r, 10 r + 1, …"""
    by_hand = {
        "broadcast": [[30, 31]] * 4,
        "scatter": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "gather": [[[0, 1], [10, 11], [20, 21], [30, 31]], None, None, None],
        "reduce": [[60, 64], None, None, None],
        "all_reduce": [[60, 64]] * 4,
        "all_reduce_operations": [{"SUM": 6.0, "AVG": 1.5, "MIN": 1.0, "MAX": 2.0, "PRODUCT": 4.0}] * 4,
        "all_gather": [[0, 1, 10, 11, 20, 21, 30, 31]] * 4,
        "reduce_scatter": [[60, 64], [68, 72], [76, 80], [84, 88]],
        "all_to_all": [[0, 10, 20, 30], [1, 11, 21, 31], [2, 12, 22, 32], [3, 13, 23, 33]],
        "barrier": [4] * 4,
        "asynchronous": [[60, 64]] * 4,
        "scatter_objects": ["part0", "part1", "part2", "part3"],
        "all_gather_objects": [[[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]] * 4,
        "new_group": [[20, 22], [40, 42]] * 2,
        "subgroups": [[0, 1], [0, 1], [20, 21], [20, 21]],
        "device_mesh": [{"model": 10, "data": 20}, {"model": 10, "data": 40},
                        {"model": 50, "data": 20}, {"model": 50, "data": 40}],
    }  # fmt: skip
    for name, expected in by_hand.items():
        assert group(4)(ON_RANKS.after, "collective_ops", name) == expected, name
    uneven = group(3)(ON_RANKS.after, "collective_ops", "all_to_all_uneven")
    assert uneven == [[0, 10, 20], [1, 2, 11, 12, 21, 22], [3, 4, 5, 13, 14, 15, 23, 24, 25]]


@pytest.mark.parametrize(("operation", "call"), [
    ("broadcast", "broadcast"), ("scatter", "scatter"), ("gather", "gather"), ("reduce", "reduce"),
    ("all_reduce", "all_reduce"), ("all_reduce_operations", "all_reduce"), ("all_to_all", "all_to_all_single"),
    ("barrier", "barrier"), ("broadcast_objects", "broadcast_object_list"), ("new_group", "all_reduce"),
    ("device_mesh", "all_reduce"),
])  # fmt: skip
def test_an_operation_that_does_nothing_is_noticed(group, operation, call):
    for code, text in group(3)(ON_RANKS.tampered, operation, call):
        (line,) = text.strip().splitlines()
        assert code == 2 and f"{operation}: rank(s) " in line and "expected" in line


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)])
def test_point_to_point(group, size):
    printed = ended_well(group(size)(ON_RANKS.run, "point_to_point", []))
    assert all(f"\n{name}: " in printed for name in point_to_point.OPERATIONS)
    for call in ("send", "recv"):  # on one rank or on both: the first to give up closes the connection
        assert printed.count(f"Timed out waiting 2000ms for {call} operation to complete") in (1, 2)
    assert printed.count("looks on") == 3 * (size - 2) and "→  got 10" in printed and "→  got 0" in printed
    assert f"{len(point_to_point.OPERATIONS)} operations on {size} ranks" in printed


def test_what_point_to_point_gives(group):
    by_hand = {
        "blocking": [0, 1, 3],
        "in_order": [None, [101, 201], [102, 202]],
        "nonblocking": [[20, 21], [0, 1], [10, 11]],
        "batched": [[20, 21], [0, 1], [10, 11]],
        "ring": [[[0, 1], [10, 11], [20, 21]]] * 3,
    }
    for name, expected in by_hand.items():
        assert group(3)(ON_RANKS.after, "point_to_point", name) == expected, name


# ------------------------------------------------------------------------------------------------- the ring


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["int64", "int32", "float64", "float32", "bfloat16"])
def test_ring_sums(group, size, dtype):
    kind = getattr(torch, dtype)
    for elements in (0, 1, size, 10 * size + 1, 1000):
        answers = group(size)(ON_RANKS.ring_sum, elements, dtype)
        assert all(answer["in_place"] for answer in answers)
        assert all(answer["found"] == answers[0]["found"] for answer in answers)  # bit for bit on all ranks
        sent = [answer["sent"] for answer in answers]
        # Chunks may differ by an element, so ranks may differ; together they send 2 (n - 1) times the whole.
        assert sum(map(sum, sent)) == 2 * (size - 1) * elements * kind.itemsize
        if elements >= size:
            assert [len(messages) for messages in sent] == [2 * (size - 1)] * size
        if not kind.is_floating_point:
            assert answers[0]["found"] == answers[0]["theirs"]
            continue
        from_cases = [_values(elements, kind, rank) for rank in range(size)]
        exact = [math.fsum(column) for column in zip(*from_cases, strict=True)]
        # n - 1 additions, each off by eps / 2 of the sum of absolute values at most; twice that.
        bound = [(size - 1) * torch.finfo(kind).eps * sum(map(abs, c)) for c in zip(*from_cases, strict=True)]
        found = answers[0]["found"]
        assert all(abs(f - e) <= b for f, e, b in zip(found, exact, bound, strict=True))


def _values(elements, kind, rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(elements, generator=generator, dtype=torch.float64).to(kind).double().tolist()


def test_ring_in_a_group(group):
    """Ranks 3 and 1 of four, and nobody else."""
    answers = group(4)(ON_RANKS.ring_sum, 7, "int64", [1, 3])
    assert answers[0] is answers[2] is None
    assert answers[1]["found"] == answers[1]["theirs"] == answers[3]["found"]
    assert len(answers[1]["sent"]) == 2


def test_ring_of_what_does_not_lie_in_a_row(group):
    assert group(3)(ON_RANKS.ring_of_a_transpose) == [True] * 3


def test_the_rings_own_check_notices(group):
    for code, text in group(3)(ON_RANKS.ring_that_forgets):
        assert code == 2 and "wrong on rank(s)" in text and len(text.strip().splitlines()) == 1


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)])
def test_ring_measured(group, tmp_path, size):
    image = tmp_path / "ring.png"
    options = ["--sizes", "1K,16K,256K", "--repeats", "2", "--plot", str(image)]
    printed = ended_well(group(size)(ON_RANKS.run, "ring_all_reduce", options))
    assert f"{2 * (size - 1)} messages of S / {size} bytes" in printed
    assert "fitted: α = " in printed and all(f"{count:>12,} " in printed for count in (1024, 16384, 262144))
    assert image.read_bytes().startswith(b"\x89PNG")


def test_cost_model():
    # By hand: 3 ranks, 6 MB, α 50 µs, β 1 GB/s: 4 messages of 50 µs + 2 MB / (1 GB/s) = 4 × 2.05 ms.
    assert ring_all_reduce.predict(6_000_000, 3, 50e-6, 1e9) == pytest.approx(8.2e-3, rel=1e-12)
    sizes = [2**k for k in range(10, 26, 3)]
    for n in (2, 3, 4):
        exact = [2 * (n - 1) * (50e-6 + size / (n * 1e9)) for size in sizes]
        # The equations are solved in fp64, with a condition number of some 1e4.
        assert ring_all_reduce.fit(sizes, exact, n) == pytest.approx((50e-6, 1e9), rel=1e-9)
    noisy = [seconds * (1.1 if index % 2 else 0.9) for index, seconds in enumerate(exact)]
    alpha, beta = ring_all_reduce.fit(sizes, noisy, 4)
    # 10 % of noise: a fit that squared absolute errors would miss α by several hundred per cent.
    assert alpha == pytest.approx(50e-6, rel=0.15) and beta == pytest.approx(1e9, rel=0.15)


# ------------------------------------------------------------------------------------------ who sees what

play = data_sharding_demo.main.__wrapped__  # without @record, which wants the streams that pytest has taken


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sharding_on_ranks(group, size):
    printed = ended_well(group(size)(ON_RANKS.run, "data_sharding_demo", []))
    padded = {2: 1, 3: 2, 4: 3}[size]
    assert f"25 samples on {size} ranks, so {padded} come once too often" in printed
    assert "nobody sees 1 of them" in printed  # 25 = 12 · 2 + 1 = 8 · 3 + 1 = 6 · 4 + 1
    steps = {2: "[13, 12]", 3: "[9, 8, 8]", 4: "[7, 6, 6, 6]"}[size]
    assert f"steps by rank {steps}" in printed and "75 steps: each sample exactly 36 times" in printed
    assert printed.endswith("all counts are as they must be\n")


def test_ranks_that_drift_under_join_are_noticed(group):
    for code, _, err in group(2)(ON_RANKS.drift_under_join):
        (line,) = [line for line in err.splitlines() if "error: " in line]
        assert code == 2 and "equal weights at the end" in line


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_sharding_played(capsys, ranks):
    play(data_sharding_demo.ShardingConfig(ranks=ranks))
    printed = capsys.readouterr().out
    assert f"so {math.ceil(25 / ranks) * ranks - 25} come once too often" in printed
    assert "needs real ranks" in printed and printed.endswith("all counts are as they must be\n")


def test_played_and_real_ranks_see_the_same(group, capsys):
    play(data_sharding_demo.ShardingConfig(ranks=3))
    played = capsys.readouterr().out.split("\n6. ")[0].replace("played", "real")
    assert group(3)(ON_RANKS.run, "data_sharding_demo", [])[0][1].split("\n6. ")[0] == played


@pytest.mark.parametrize(("name", "words"), [
    ("BatchPlan", "the same global batches"),
    ("evaluation_batches", "every sample once"),
    ("DistributedSampler", "each sample, and padding"),
])  # fmt: skip
def test_wrong_counts_are_noticed(monkeypatch, capsys, name, words):
    honest = getattr(data_sharding_demo, name)
    wrong = {
        # another seed for each rank; one rank without its samples; a sampler that drops where it should pad
        "BatchPlan": lambda batch, samples, seed, rank=0, size=1: honest(batch, samples, seed + rank, rank, size),
        "evaluation_batches": lambda data, size, device, rank, n: honest(data[:-1], size, device, rank, n),
        "DistributedSampler": lambda *args, **options: honest(*args, **options | {"drop_last": True}),
    }
    monkeypatch.setattr(data_sharding_demo, name, wrong[name])
    with pytest.raises(SystemExit) as ended:
        play(data_sharding_demo.ShardingConfig(ranks=3))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and words in line


# ------------------------------------------------------------------------------------- a user's mistakes


@pytest.mark.parametrize(("script", "arguments", "words"), [
    ("collective_ops", ["--only", "allreduce"], ["'allreduce'", "did you mean all_reduce?"]),
    ("collective_ops", ["--onyl", "reduce"], ["onyl", "did you mean only?"]),
    ("point_to_point", ["--only", "send"], ["'send'", "blocking"]),
    ("ring_all_reduce", ["--sizes", "4K"], ["sizes = '4K'", "two or more"]),
    ("ring_all_reduce", ["--repeats", "0"], ["repeats = 0", "at least 1"]),
    ("ring_all_reduce", ["--plot", "/nowhere/x.png"], ["plot = /nowhere/x.png", "folder"]),
    ("data_sharding_demo", ["--batch", "7"], ["7", "does not divide among 2"]),
    ("data_sharding_demo", ["--samples", "0"], ["samples = 0", "at least 1"]),
])  # fmt: skip
def test_mistakes_are_one_line_on_every_rank(group, script, arguments, words):
    for code, _, err in group(2)(ON_RANKS.run, script, arguments, timeout=60):
        (line,) = [line for line in err.splitlines() if "error: " in line]
        assert code == 2 and "Traceback" not in err
        assert all(word in line for word in words), line


@pytest.mark.parametrize("script", ["collective_ops", "point_to_point", "ring_all_reduce"])
def test_one_process_alone(group, script):
    ((code, out, err),) = group(1)(ON_RANKS.run, script, [])
    (line,) = [line for line in err.splitlines() if "error: " in line]
    assert (code, out) == (2, "") and "torchrun --nproc-per-node=" in line and "Traceback" not in err


def test_under_torchrun(launch):
    finished = launch("collectives/collective_ops.py", "--only", "all_gather,barrier,device_mesh", nproc=2)
    assert "3 operations on 2 ranks" in finished.stdout and "Warning" not in finished.stderr
