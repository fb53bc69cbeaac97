"""The exercises of all lessons: solutions pass, untouched tasks do not, each usual mistake gets its own message."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import graded
import pytest
from launching import ROOT

import exercises  # isort: skip  (graded puts tools/ on the path)
import grading  # isort: skip

ALL = {(room.name, e.name): e for room in sorted(ROOT.iterdir()) if (room / "exercises").is_dir()
       for e in exercises.find(ROOT, room.name)}  # fmt: skip
HANGS = {("collectives", "lab_deadlock")}  # as it is found; see tests/collectives/test_deadlock_lab.py


def mistakes(room: str) -> dict[str, tuple[str, str, str, str]]:
    """Of tests/ROOM/exercise_mistakes.py: exercise, text of the solution, what to put there, what must be said."""
    spec = importlib.util.spec_from_file_location(f"mistakes_{room}", ROOT / "tests" / room / "exercise_mistakes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MISTAKES


MISTAKES = {(room, name): row for room in sorted({room for room, _ in ALL}) for name, row in mistakes(room).items()}


FIRST = {(room, row[0]): (room, name) for (room, name), row in reversed(MISTAKES.items())}  # one for each exercise


# One task that has not been started, and one lab, which is wrong as it is found.
UNTOUCHED = [("ddp", "shard_the_data"), next(key for key in ALL if graded.is_lab(ALL[key]) and key not in HANGS)]


def each(keys, ordinary=None):
    """One test for each key; those that are not among `ordinary`, if that is given, are slow."""
    marked = [
        pytest.param(room, name, id=f"{room}: {name}", marks=() if ordinary is None or (room, name) in ordinary
                     else pytest.mark.slow)
        for room, name in keys
    ]  # fmt: skip
    return pytest.mark.parametrize(("room", "name"), marked)


def test_every_exercise_has_mistakes():
    assert {(room, row[0]) for (room, _), row in MISTAKES.items()} == set(ALL)


@each(list(ALL))
def test_the_solution_passes(room: str, name: str) -> None:
    result = graded.grade_solution(ALL[room, name])
    assert result.status == grading.PASSED, result.message


@each([key for key in ALL if key not in HANGS], ordinary=UNTOUCHED)
def test_the_untouched_task_does_not(room: str, name: str, tmp_path: Path) -> None:
    graded.assert_untouched(ALL[room, name], graded.grade_task(room, ALL[room, name], tmp_path))


@each([key for key, exercise in ALL.items() if graded.is_lab(exercise)], ordinary=())
def test_a_lab_runs_green_with_a_falling_loss(room: str, name: str, tmp_path: Path) -> None:
    graded.assert_lab_looks_well(room, ALL[room, name], tmp_path)


@each(list(MISTAKES), ordinary=set(FIRST.values()))
def test_a_mistake_gets_its_message(room: str, name: str, tmp_path: Path) -> None:
    exercise, right, wrong, told = MISTAKES[room, name]
    graded.assert_told(graded.grade_mistake(ALL[room, exercise], right, wrong, tmp_path), told)


def test_make_words_work_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "exercises.py")]
    options = ["ddp", "shard_the_data", "--tasks", str(tmp_path)]
    for run, code, words in (("write", 0, "wrote"), ("grade", 1, "not started")):
        finished = subprocess.run([*command, run, *options], capture_output=True, text=True)
        assert finished.returncode == code and words in finished.stdout, finished.stderr
