# ruff: noqa: E501  (the table of mistakes is one line each)
"""The exercises of collectives/: solutions pass, untouched tasks do not, each usual mistake gets the message meant for it."""

import re
import sys
from pathlib import Path

import graded
import pytest
from launching import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import exercises
import grading

ALL = exercises.find(ROOT, "collectives")
LABS = [exercise for exercise in ALL if graded.is_lab(exercise)]
HANG_S = 10.0  # the ranks stand still after half a second; no longer, because the test waits all that time


@pytest.mark.parametrize("exercise", ALL, ids=lambda e: e.name)
def test_the_solution_passes(exercise: exercises.Exercise) -> None:
    result = graded.grade_solution(exercise)
    assert result.status == grading.PASSED, result.message


@pytest.mark.parametrize("exercise", [e for e in ALL if e.name != "lab_deadlock"], ids=lambda e: e.name)
def test_the_untouched_task_does_not(exercise: exercises.Exercise, tmp_path: Path) -> None:
    graded.assert_untouched(exercise, graded.grade_task("collectives", exercise, tmp_path))


@pytest.mark.parametrize("exercise", LABS, ids=lambda e: e.name)
def test_a_lab_runs_green_with_a_falling_loss(exercise: exercises.Exercise, tmp_path: Path) -> None:
    graded.assert_lab_looks_well("collectives", exercise, tmp_path)


def test_the_untouched_deadlock_hangs(tmp_path: Path) -> None:
    (lab,) = exercises.choose(ALL, ["lab_deadlock"])
    result = graded.grade_task("collectives", lab, tmp_path, HANG_S)
    assert (result.status, result.world_size) == (grading.HANGS, 2), result.message
    assert "(sum_over_ranks)" in result.message and "(all_agree)" in result.message  # one rank here, one there


def test_the_other_deadlock_hangs_when_the_first_is_repaired(tmp_path: Path) -> None:
    (lab,) = exercises.choose(ALL, ["lab_deadlock"])
    repaired = "        if all_agree(loss.item() < target):\n            break\n"
    (fault,) = re.findall(r"        # task: (if .*)\n", lab.source.read_text())
    (tmp_path / lab.source.name).write_text(lab.task.replace(f"        {fault}\n            break\n", repaired))
    (result,) = exercises.grade([lab], tmp_path, HANG_S)
    assert (result.status, result.world_size) == (grading.HANGS, 3), result.message
    assert result.message.count("(sum_over_ranks)") == 3  # all in a circle


MISTAKES = {  # exercise, text of the solution, what to put there, what the learner must be told
    "root to each": ("tree_broadcast", "    have = 1 ", "    for peer in range(1, n):\n        if number == 0:\n            dist.send(tensor, (peer + root) % n)\n        elif number == peer:\n            dist.recv(tensor, root)\n    have = n ", "takes 3 rounds"),
    "root 0": ("tree_broadcast", "n = dist.get_world_size()\n    number = (dist.get_rank() - root) % n", "n, root = dist.get_world_size(), 0\n    number = dist.get_rank()", "holds the tensor of rank 0"),
    "library": ("tree_broadcast", "    have = 1 ", "    dist.broadcast(tensor, root)\n    have = n ", "a call of broadcast"),
    "nothing": ("tree_broadcast", "    have = 1 ", "    have = n ", "holds the tensor of rank 1"),
    "other chunk": ("ring_reduce_scatter", "chunks[(rank - step - 2) % n]  # what leaves is what was added to in the step before\n        received = torch.empty_like(come)\n        pass_on(chunks[(rank - step - 1) % n], received)", "chunks[(rank - step - 1) % n]\n        received = torch.empty_like(come)\n        pass_on(chunks[(rank - step) % n], received)", "start at another rank"),
    "once too often": ("ring_reduce_scatter", "    for step in range(n - 1):\n        pass_on(", "    for step in range(n):\n        pass_on(", "sent 2 messages"),
    "stale chunk": ("ring_reduce_scatter", "pass_on(chunks[(rank - step) % n], chunks[", "pass_on(chunks[rank], chunks[", "has a wrong chunk"),
    "no addition": ("ring_reduce_scatter", "come += received", "come.copy_(received)", "follow one chunk"),
    "everybody": ("ring_reduce_scatter", "    n, rank = dist.get_world_size(), dist.get_rank()\n    for step in range(n - 1):\n        come", "    n, rank = dist.get_world_size(), dist.get_rank()\n    dist.all_reduce(chunks[rank].clone())\n    for step in range(n - 1):\n        come", "a call of allreduce"),
    "any number": ("recursive_doubling", "if n & (n - 1):", "if False:", "a ValueError that names the 3 ranks"),
    "no number": ("recursive_doubling", "on {n} ranks; expected", "cannot be done; expected", "a ValueError that names the 3 ranks"),
    "late error": ("recursive_doubling", "    if n & (n - 1):", "    if n & (n - 1):\n        dist.barrier()", "1 messages before the error"),
    "one round": ("recursive_doubling", "while distance < n:", "while distance < 2:", "the sum"),
    "no sum": ("recursive_doubling", "tensor += received", "tensor.copy_(received)", "add what the partner sent"),
    "each with each": ("recursive_doubling", "    while distance < n:\n        peer = rank ^ distance\n        both = [dist.P2POp(dist.isend, tensor, peer)", "    mine = tensor.clone()\n    for distance in range(1, n):\n        peer = rank ^ distance\n        both = [dist.P2POp(dist.isend, mine, peer)", "differ between ranks in their last bits"),
    "once more": ("recursive_doubling", "        distance *= 2\n", "        distance *= 2\n    for request in dist.batch_isend_irecv(both):\n        request.wait()\n", "messages of [28, 28] bytes"),
    "alone": ("lab_deadlock", "all_agree(loss.item() < target)", "all_agree(True) and loss.item() < target", "up to the first in which every"),
    "never": ("lab_deadlock", "all_agree(loss.item() < target)", "all_agree(False)", "every rank's loss"),
    "no exchange": ("lab_deadlock", "return torch.stack(parts).sum(0)", "return tensor * n", "those of one process"),
    "padded": ("lab_wrong_mean", "torch.arange(len(kinds))[dist.get_rank() :: dist.get_world_size()]", "torch.tensor(list(torch.utils.data.DistributedSampler(kinds, shuffle=False)))", "count twice"),
    "mean of means": ("lab_wrong_mean", "    dist.all_reduce(total)\n", "    total /= total[2].clone()\n    dist.all_reduce(total)\n", "do not average"),
    "no sample": ("lab_wrong_mean", "    dist.all_reduce(total)\n", "    total = total / total[2] * total[2] / len(kinds)\n    dist.all_reduce(total)\n", "0/0"),
    "rank alone": ("lab_wrong_mean", "    dist.all_reduce(total)\n", "", "as in one process"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_its_message(mistake: str, tmp_path: Path) -> None:
    name, right, wrong, told = MISTAKES[mistake]
    (exercise,) = exercises.choose(ALL, [name])
    graded.assert_told(graded.grade_mistake(exercise, right, wrong, tmp_path), told)
