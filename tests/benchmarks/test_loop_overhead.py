"""The overhead benchmark compares two loops that do the same training, bit by bit, and ours is ddp/train.py's."""

import ast
import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from launching import SCRIPTS, OnRanks, assert_refused

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import loop_overhead  # noqa: E402  (needs the path above)
import report  # noqa: E402

from common.ranks import single_process  # noqa: E402

STEPS = 4
CHEATS = OnRanks("tests/benchmarks/loops_on_ranks.py")


@pytest.fixture
def contest(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    made = loop_overhead.Contest("mini", single_process("cpu"), STEPS, str(tmp_path))
    yield made
    made.run.finish()
    assert signal.getsignal(signal.SIGINT) is before  # given back


def advance(loop, steps: int) -> None:
    for _ in range(steps):
        next(loop)


def test_both_loops_end_with_the_same_bits(contest) -> None:
    advance(contest.ours(), STEPS)
    advance(contest.bare(), STEPS)
    ours, bare = dict(contest.our_model.named_parameters()), dict(contest.bare_model.named_parameters())
    for (name, parameter), start in zip(ours.items(), contest.start, strict=True):
        assert torch.equal(parameter, bare[name]), name
        assert not torch.equal(parameter, start), name
    assert contest.verdict() is None


def test_a_loop_that_does_less_is_found_out(contest) -> None:
    advance(contest.ours(), STEPS)
    advance(contest.bare(), STEPS - 1)
    assert "parameters differ" in contest.verdict()


def test_one_wrong_bit_is_found_out(contest) -> None:
    advance(contest.ours(), STEPS)
    advance(contest.bare(), STEPS)
    weight = contest.bare_model.norm.weight
    with torch.no_grad():
        weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    assert "parameters differ" in contest.verdict()


def test_loops_that_do_nothing_are_found_out(contest) -> None:
    assert contest.verdict() == "a parameter never moved"


def loop_of(path: Path, function: str) -> str:
    """The code of `for step in run.steps(…)` in a function, without comments, and without what ends a training."""
    tree = ast.parse(path.read_text())
    (body,) = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function]
    (loop,) = [n for n in ast.walk(body) if isinstance(n, ast.For) and "run.steps(" in ast.unparse(n.iter)]
    loop.body = [n for n in loop.body if ast.unparse(n) != "yield" and ast.unparse(n) != "(yield)"]
    return ast.unparse([n for n in loop.body if not (isinstance(n, ast.If) and "wants_evaluation" in ast.unparse(n))])


def test_our_loop_is_that_of_the_lesson() -> None:
    lesson = loop_of(ROOT / "ddp" / "train.py", "main")
    assert loop_of(ROOT / "benchmarks" / "loop_overhead.py", "ours") == lesson
    assert "backward()" in lesson and "run.log(" in lesson


def check_result(file, printed, strategy, processes) -> None:
    result = json.loads(file.read_text())
    assert result["strategy"] == strategy and result["world_size"] == processes
    (row,) = result["rows"]
    assert row["same_parameters"] is True and row["pairs"] == 3 and row["tokens_per_rank_and_step"] == 4 * 64
    for times in ("ours_step_seconds", "bare_step_seconds"):
        assert 0 < row[times]["lower_quartile"] <= row[times]["median"] <= row[times]["upper_quartile"]
    parts = row["parts_seconds_per_step"]
    assert all(seconds > 0 for seconds in parts.values())
    assert any("Run.log" in name for name in parts) and any("Loader" in name for name in parts)
    assert any("replica check" in name for name in parts) == (processes == 2)
    assert printed.count("our step against a bare loop") == 1  # rank 0 alone prints
    assert "both loops ended with the same parameters" in printed
    assert "grad norm" not in printed  # our loop's own lines went to the stand-in terminal
    assert str(file.parent) not in json.dumps(result)


OPTIONS = ["--sizes", "mini", "--pairs", "3", "--steps", "2"]


def test_two_ranks(group, tmp_path) -> None:
    file = tmp_path / "result.json"
    printed = group(2)(SCRIPTS.printed, "benchmarks/loop_overhead.py", [*OPTIONS, f"--output={file}"])
    check_result(file, "".join(printed), "DDP", 2)


@pytest.mark.slow
@pytest.mark.parametrize(("nproc", "strategy"), [(0, "no DDP"), (2, "DDP")])
def test_from_the_command_line(launch, tmp_path, nproc, strategy) -> None:
    file = tmp_path / "result.json"
    printed = launch("benchmarks/loop_overhead.py", *OPTIONS, f"--output={file}", nproc=nproc).stdout
    check_result(file, printed, strategy, max(1, nproc))


@pytest.mark.parametrize("cheat", ["ours", "bare"])
def test_one_bit_on_one_rank_ends_the_comparison_on_all(group, cheat) -> None:
    """The verdict of rank 1 is heard: no table is printed of loops that did not do the same training."""
    assert_refused(group(2)(CHEATS.compare, cheat), "comparing them is worth nothing")


def test_quartiles() -> None:
    assert report.quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "lower_quartile": 2.0, "upper_quartile": 4.0}
    assert report.quartiles([2.0]) == {"median": 2.0, "lower_quartile": 2.0, "upper_quartile": 2.0}
