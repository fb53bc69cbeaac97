"""Exercises on a small room of its own: solution, untouched task, wrong answer, crash and hang are told apart."""

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import exercises
import grading
from docs_markdown import DocsError

SOURCE = '''# exercise 1: Sum over the ranks
"""Give the sum of the rank numbers."""

import torch
import torch.distributed as dist


def sum_of_ranks():
    # solution
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total)
    return total.item()
    # task: # all_reduce adds up
    # task: if True:
    # task:     raise NotImplementedError("sum_of_ranks")
    # end
'''
CHECK = """
from grading import expect

WORLD_SIZES = (2, 3)

def check(module, rank, world_size):
    right = world_size * (world_size - 1) // 2
    found = module.sum_of_ranks()
    expect(found == right, f"{found} on rank {rank}", str(right), "all ranks")
"""


@pytest.fixture
def room(tmp_path: Path) -> Path:
    folder = tmp_path / "room" / "exercises"
    (folder / "checks").mkdir(parents=True)
    (folder / "sum_up.py").write_text(SOURCE)
    (folder / "checks" / "sum_up.py").write_text(CHECK)
    return tmp_path


def graded(room: Path, answer: str | None, timeout_s: float = 60.0) -> exercises.Grade:
    """The grade of the solution (None), or of a task file in which the body of the function is `answer`."""
    if answer is not None:
        tasks = room / "tasks"
        tasks.mkdir(exist_ok=True)
        (tasks / "sum_up.py").write_text(SOURCE.split("    # solution")[0] + answer)
    (result,) = exercises.grade(exercises.find(room, "room"), None if answer is None else room / "tasks", timeout_s)
    return result


def test_the_task_has_the_task_lines_in_place_of_the_solution(room: Path) -> None:
    (exercise,) = exercises.find(room, "room")
    assert (exercise.number, exercise.title) == (1, "Sum over the ranks")
    expected = '    # all_reduce adds up\n    if True:\n        raise NotImplementedError("sum_of_ranks")\n'
    assert exercise.task == SOURCE.split("    # solution")[0] + expected


def test_a_bare_task_line_leaves_nothing(room: Path) -> None:
    assert exercises.make_task("a\n# solution\nb\n# task:\n# end\nc", "x.py") == "a\nc"
    assert exercises.make_task("# solution\nb\n# task: p\n# task:\n# task: q\n# end", "x.py") == "p\n\nq"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("# solution\nx\n# task: y\n", "without `# end`"),
        ("# solution\nx\n# end\n", "x.py:3"),
        ("# task: y\n", "outside a solution"),
        ("# solution\n# solution\n", "inside the one of line 1"),
        ("# solution\nx\n# task: y\nz\n# end\n", "x.py:4"),
        ("x\n", "nothing to do"),
    ],
)
def test_broken_markers_are_errors(text: str, problem: str) -> None:
    with pytest.raises(DocsError) as caught:
        exercises.make_task(text, "x.py")
    assert problem in str(caught.value)


def test_the_solution_passes_on_all_world_sizes(room: Path) -> None:
    result = graded(room, None)
    assert (result.status, result.world_size) == (grading.PASSED, 3)


def test_the_untouched_task_is_not_started(room: Path) -> None:
    found = exercises.find(room, "room")
    exercises.write(room, "room", found, room / "tasks", force=False)
    (result,) = exercises.grade(found, room / "tasks")
    assert result.status == grading.NOT_STARTED


def test_a_missing_task_file_says_what_to_do(room: Path) -> None:
    (result,) = exercises.grade(exercises.find(room, "room"), room / "nowhere")
    assert result.status == grading.NOT_STARTED and "make exercise" in result.message


@pytest.mark.parametrize(
    ("answer", "status", "told"),
    [
        ("    print('look here')\n    return dist.get_rank()\n", "wrong", "0 on rank 0\nexpected: 1\nhint:     all"),
        ("    return 1 + 6 * dist.get_rank()\n", "wrong", "7 on rank 1\nexpected: 1"),  # rank 0 has it right
        ("    return undefined\n", "crashed", "NameError: name 'undefined' is not defined (line 9: return undefined)"),
        ("    return (\n", "crashed", "SyntaxError"),
        ("    import os\n    os._exit(3)\n", "crashed", "without a word"),
        ("    raise SystemExit(0)\n", "crashed", "SystemExit"),
    ],
)
def test_what_is_wrong_is_said(room: Path, answer: str, status: str, told: str) -> None:
    result = graded(room, answer)
    assert result.status == status and told in result.message
    if "look here" in answer:
        assert "look here" in exercises.report([result])


HANGS = """    total = torch.tensor(1)
    if dist.get_rank() == 0:
        dist.all_reduce(total)  # line 11
    return 1
"""


def test_a_hang_is_ended_and_explained(room: Path) -> None:
    started = time.monotonic()
    result = graded(room, HANGS, timeout_s=8.0)
    assert result.status == grading.HANGS
    assert "a collective that not all ranks entered" in result.message
    assert "rank 0 is in line 11 (sum_of_ranks); rank 1 went past it" in result.message
    assert time.monotonic() - started < 60
    result = graded(room, "    while True:\n        pass\n", timeout_s=4.0)
    assert result.status == grading.HANGS and "endless loop" in result.message


def test_a_file_that_the_learner_has_edited_is_kept(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, tasks = exercises.find(room, "room"), room / "tasks"
    exercises.write(room, "room", found, tasks, force=False)
    path = tasks / "sum_up.py"
    fresh = path.read_text()
    path.write_text(fresh + "# mine\n")
    exercises.write(room, "room", found, tasks, force=False)
    assert path.read_text() == fresh + "# mine\n" and "kept" in capsys.readouterr().out
    exercises.write(room, "room", found, tasks, force=True)
    assert path.read_text() == fresh
    # A task of an older version that nobody has edited is renewed.
    (room / "room" / "exercises" / "sum_up.py").write_text(SOURCE.replace("adds up", "sums"))
    exercises.write(room, "room", exercises.find(room, "room"), tasks, force=False)
    assert "sums" in path.read_text()


def test_the_report_counts(room: Path) -> None:
    results = [graded(room, None), graded(room, "    return -1\n")]
    text = exercises.report(results)
    assert text.endswith("1 of 2 passed") and "sum_up: wrong at 2 ranks" in text


def test_a_wrong_name_lists_what_there_is(room: Path) -> None:
    with pytest.raises(DocsError, match="there are: sum_up"):
        exercises.choose(exercises.find(room, "room"), ["sum"])
    with pytest.raises(DocsError, match="rooms with exercises: room"):
        exercises.find(room, "attic")
