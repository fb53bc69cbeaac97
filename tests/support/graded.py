"""What the tests of every lesson's exercises do: grade solutions, untouched tasks, and files with a mistake in them."""

import re
import sys
from pathlib import Path

from launching import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import exercises
import grading
import processes
import readme_commands

TIMEOUT_S = 90.0  # generous: a busy machine is not a hang


def is_lab(exercise: exercises.Exercise) -> bool:
    return exercise.name.startswith("lab_")


def grade_solution(exercise: exercises.Exercise) -> exercises.Grade:
    (result,) = exercises.grade([exercise], None, TIMEOUT_S)
    return result


def grade_task(room: str, exercise: exercises.Exercise, folder: Path, timeout_s: float = TIMEOUT_S) -> exercises.Grade:
    """The grade of the task as the learner finds it; written to `folder`."""
    exercises.write(ROOT, room, [exercise], folder, force=False)
    (result,) = exercises.grade([exercise], folder, timeout_s)
    return result


def grade_mistake(
    exercise: exercises.Exercise, right: str, wrong: str, folder: Path, timeout_s: float = TIMEOUT_S
) -> exercises.Grade:
    """The grade of the solution with `wrong` in the one place of `right`."""
    text = exercise.source.read_text()
    assert text.count(right) == 1, f"{text.count(right)} times in {exercise.name}: {right}"
    (folder / exercise.source.name).write_text(text.replace(right, wrong))
    (result,) = exercises.grade([exercise], folder, timeout_s)
    return result


def assert_untouched(exercise: exercises.Exercise, result: exercises.Grade) -> None:
    """A lab is wrong, with a hint; another task has not been started."""
    if is_lab(exercise):
        assert result.status == grading.WRONG and "hint:" in result.message, (result.status, result.message)
    else:
        assert result.status == grading.NOT_STARTED, (result.status, result.message)


def assert_told(result: exercises.Grade, told: str) -> None:
    assert result.status == grading.WRONG, (result.status, result.message)
    assert told in result.message


def assert_lab_looks_well(room: str, exercise: exercises.Exercise, folder: Path) -> None:
    """The lab's task ends without an error on 2 ranks, and its loss falls: that is what makes it a lab."""
    exercises.write(ROOT, room, [exercise], folder, force=False)
    command = ["torchrun", "--standalone", "--nproc-per-node=2", str(folder / exercise.source.name)]
    finished = processes.run(command, 120, ROOT, readme_commands.environment(folder, " ".join(command)))
    assert finished.exit_code == 0, finished.output
    losses = [float(loss) for loss in re.findall(r"loss ([0-9.]+)", finished.output)]
    assert len(losses) == 5 and losses[-1] < losses[0] / 3
