"""The lab whose faults are hangs: the grader says in which line each rank waits."""

import re
from pathlib import Path

import graded
import pytest

import exercises  # isort: skip  (graded puts tools/ on the path)
import grading  # isort: skip

(LAB,) = exercises.choose(exercises.find(graded.ROOT, "collectives"), ["lab_deadlock"])
pytestmark = pytest.mark.slow  # they wait
HANG_S = 10.0  # the ranks stand still after half a second; no longer, because the test waits all that time


def test_the_untouched_deadlock_hangs(tmp_path: Path) -> None:
    result = graded.grade_task("collectives", LAB, tmp_path, HANG_S)
    assert (result.status, result.world_size) == (grading.HANGS, 2), result.message
    assert "(sum_over_ranks)" in result.message and "(all_agree)" in result.message  # one rank here, one there


def test_the_other_deadlock_hangs_when_the_first_is_repaired(tmp_path: Path) -> None:
    repaired = "        if all_agree(loss.item() < target):\n            break\n"
    (fault,) = re.findall(r"        # task: (if .*)\n", LAB.source.read_text())
    (tmp_path / LAB.source.name).write_text(LAB.task.replace(f"        {fault}\n            break\n", repaired))
    (result,) = exercises.grade([LAB], tmp_path, HANG_S)
    assert (result.status, result.world_size) == (grading.HANGS, 3), result.message
    assert result.message.count("(sum_over_ranks)") == 3  # all in a circle
