# ruff: noqa: E501  (the table of mistakes is one line each)
"""The exercises of ddp/: solutions pass, untouched tasks do not, and each usual mistake gets the message meant for it."""

import subprocess
import sys
from pathlib import Path

import graded
import pytest
from launching import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import exercises
import grading

ALL = exercises.find(ROOT, "ddp")
LABS = [exercise for exercise in ALL if graded.is_lab(exercise)]


@pytest.mark.parametrize("exercise", ALL, ids=lambda e: e.name)
def test_the_solution_passes(exercise: exercises.Exercise) -> None:
    result = graded.grade_solution(exercise)
    assert result.status == grading.PASSED, result.message


@pytest.mark.parametrize("exercise", ALL, ids=lambda e: e.name)
def test_the_untouched_task_does_not(exercise: exercises.Exercise, tmp_path: Path) -> None:
    graded.assert_untouched(exercise, graded.grade_task("ddp", exercise, tmp_path))


@pytest.mark.parametrize("exercise", LABS, ids=lambda e: e.name)
def test_a_lab_runs_green_with_a_falling_loss(exercise: exercises.Exercise, tmp_path: Path) -> None:
    graded.assert_lab_looks_well("ddp", exercise, tmp_path)


MISTAKES = {  # exercise, text of the solution, what to put there, what the learner must be told
    "stride": ("shard_the_data", "range(first, first + share)", "range(step * global_size + rank, (step + 1) * global_size, world_size)", "another order"),
    "no step": ("shard_the_data", "step * global_size + rank", "rank", "the samples 24 to 47"),
    "remainder": ("shard_the_data", "if global_size % world_size:", "if False:", "silent remainder"),
    "sum": ("average_the_gradients", "parameter.grad /= dist.get_world_size()", "pass", "2 times too much"),
    "alone": ("average_the_gradients", "dist.all_reduce(parameter.grad)", "parameter.grad *= dist.get_world_size()", "of this rank alone"),
    "weights": ("average_the_gradients", "dist.all_reduce(parameter.grad)", "dist.all_reduce(parameter.data)", "itself has changed"),
    "tied": ("average_the_gradients", "in model.parameters():", "in (p for m in model.modules() for p in m._parameters.values() if p is not None):", "each gradient once"),
    "zeros": ("average_the_gradients", "if parameter.grad is not None:", "parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad\n        if True:", "had no gradient and has one now"),
    "mean of means": ("accumulate_correctly", "loss * dist.get_world_size() / valid", "loss / (targets != IGNORED).sum().clamp(min=1) / len(micro_batches)", "off by"),
    "nan": ("accumulate_correctly", 'reduction="sum")', 'reduction="mean")', "0/0"),
    "always sync": ("accumulate_correctly", "nullcontext() if is_last else model.no_sync()", "nullcontext()", "3 all-reduces"),
    "never sync": ("accumulate_correctly", "nullcontext() if is_last else model.no_sync()", "model.no_sync()", "did not communicate"),
    "sync decided too late": ("accumulate_correctly", "        with nullcontext() if is_last else model.no_sync():  # around the forward too\n            loss", "        if True:\n            loss", "the forward that decides"),
    "local loss": ("accumulate_correctly", "    dist.all_reduce(total)\n", "", "accumulate returned"),
    "no rng": ("resume_exactly", "    torch.set_rng_state(", "    str(", "one file per rank"),
    "rng of rank 0": ("resume_exactly", 'torch.load(folder / f"rng_{dist.get_rank()}.pt")', 'torch.load(folder / "rng_0.pt")', "on rank 1 the rng"),
    "no optimizer": ("resume_exactly", '    for name in ("model", "optimizer", "schedule"):', '    for name in ("model", "schedule"):', "the optimizer is not"),
    "no schedule": ("resume_exactly", '    for name in ("model", "optimizer", "schedule"):', '    for name in ("model", "optimizer"):', "the schedule is not"),
    "no step kept": ("resume_exactly", 'trainer.step = checkpoint["step"]', "pass", "the step is not"),
    "seed by rank": ("lab_two_ranks_no_faster", "DistributedSampler(dataset, shuffle=True, drop_last=True)", "DistributedSampler(dataset, seed=dist.get_rank(), drop_last=True)", "different samples"),
    "no set_epoch": ("lab_two_ranks_no_faster", "sampler.set_epoch(epoch)", "sampler.set_epoch(0)", "learns of a new epoch only"),
    "whole batch each": ("lab_two_ranks_no_faster", "share = global_size // dist.get_world_size()", "share = global_size", "divided by the world size"),
    "every micro-batch": ("lab_overlap_by_hand", "        if is_last:\n", "        if True:\n", "hint"),
    "sum not mean": ("lab_overlap_by_hand", "            parameter.grad /= world_size\n", "", "away from the training of one process"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_its_message(mistake: str, tmp_path: Path) -> None:
    name, right, wrong, told = MISTAKES[mistake]
    (exercise,) = exercises.choose(ALL, [name])
    graded.assert_told(graded.grade_mistake(exercise, right, wrong, tmp_path), told)


def test_make_words_work_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "exercises.py")]
    options = ["ddp", "shard_the_data", "--tasks", str(tmp_path)]
    for run, code, words in (("write", 0, "wrote"), ("grade", 1, "not started")):
        finished = subprocess.run([*command, run, *options], capture_output=True, text=True)
        assert finished.returncode == code and words in finished.stdout, finished.stderr
