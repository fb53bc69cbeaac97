# ruff: noqa: E501  (the table of mistakes is one line each)
"""The exercises of from_scratch/: solutions pass, untouched tasks do not, each usual mistake gets the message meant for it."""

import sys
from pathlib import Path

import graded
import pytest
from launching import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import exercises
import grading

ALL = exercises.find(ROOT, "from_scratch")
LABS = [exercise for exercise in ALL if graded.is_lab(exercise)]


@pytest.mark.parametrize("exercise", ALL, ids=lambda e: e.name)
def test_the_solution_passes(exercise: exercises.Exercise) -> None:
    result = graded.grade_solution(exercise)
    assert result.status == grading.PASSED, result.message


@pytest.mark.parametrize("exercise", ALL, ids=lambda e: e.name)
def test_the_untouched_task_does_not(exercise: exercises.Exercise, tmp_path: Path) -> None:
    graded.assert_untouched(exercise, graded.grade_task("from_scratch", exercise, tmp_path))


@pytest.mark.parametrize("exercise", LABS, ids=lambda e: e.name)
def test_a_lab_runs_green_with_a_falling_loss(exercise: exercises.Exercise, tmp_path: Path) -> None:
    graded.assert_lab_looks_well("from_scratch", exercise, tmp_path)


MISTAKES = {  # exercise, text of the solution, what to put there, what the learner must be told
    "both backwards": ("copy_and_reduce", "        return gradient\n", "        return CopyToRanks.backward(ctx, gradient)\n", "all gradients are 2 times too large"),
    "no f": ("copy_and_reduce", "CopyToRanks.apply(x)", "x", "this rank's use of the input"),
    "no g": ("copy_and_reduce", "ReduceFromRanks.apply(F.linear(hidden, second))", "F.linear(hidden, second)", "the part of this rank alone"),
    "g too early": ("copy_and_reduce", "ReduceFromRanks.apply(F.linear(hidden, second))", "F.linear(ReduceFromRanks.apply(hidden), second)", "the output on rank"),
    "f twice": ("copy_and_reduce", "        return x.view_as(x)\n", "        dist.all_reduce(x.clone())\n        return x.view_as(x)\n", "f costs nothing forward"),
    "sum": ("bucketed_hooks", "            bucket.flat /= dist.get_world_size()\n", "", "2 times too much"),
    "not copied back": ("bucketed_hooks", "parameter.grad.copy_(view)", "pass", "still this rank's own"),
    "views stay": ("bucketed_hooks", "        bucket.views[parameter].copy_(parameter.grad)", "        if bucket.flat.count_nonzero() < bucket.flat.numel():\n            bucket.views[parameter].copy_(parameter.grad)", "step 0 was right"),
    "last alone": ("bucketed_hooks", "        if not self.synchronise:\n            return\n", "        if not self.synchronise:\n            parameter.grad.zero_()\n            return\n", "the last micro-batch alone"),
    "always": ("bucketed_hooks", "        if not self.synchronise:\n            return\n", "", "inside of no_sync"),
    "waits in the hook": ("bucketed_hooks", "dist.all_reduce(bucket.flat, async_op=True)\n", "dist.all_reduce(bucket.flat, async_op=True)\n            bucket.work.wait()\n", "backward waited"),
    "not asynchronous": ("bucketed_hooks", "dist.all_reduce(bucket.flat, async_op=True)\n", 'dist.all_reduce(bucket.flat) or type("Done", (), {"wait": print})()\n', "backward waited"),
    "each alone": ("bucketed_hooks", "if bucket.ready == len(bucket.views):", "if True:", "one all-reduce a bucket"),
    "no gather": ("zero_step", "        all_gather(row, self.mine.detach())\n", "        row[: sum(p.numel() for p in self.parameters)] = torch.cat([p.flatten() for p in self.parameters])\n        row.view(-1, len(self.mine))[dist.get_rank()] = self.mine\n", "must come by an all-gather"),
    "whole state": ("zero_step", ".chunk(n)[dist.get_rank()].clone()", ".clone()", "bytes of optimizer state"),
    "other piece": ("zero_step", "        self.mine.grad = self._piece([parameter.grad for parameter in self.parameters])", "        self.mine.grad = self._piece([parameter.grad for parameter in self.parameters[::-1]])", "of the same elements"),
    "averaged again": ("zero_step", "        self.inner.step()\n", "        dist.all_reduce(self.mine.grad.clone())\n        self.inner.step()\n", "one all-gather of"),
    "one more": ("one_f_one_b", "min(ranks - rank - 1, micro_batches)", "min(ranks - rank, micro_batches)", "needs no warm-up"),
    "no warm-up": ("one_f_one_b", "min(ranks - rank - 1, micro_batches)", "0", "holds up to 1 micro-batches"),
    "wrong end": ("one_f_one_b", "min(ranks - rank - 1, micro_batches)", "min(rank, micro_batches)", "for ever wait rank 0 before B0"),
    "warm-up too long": ("one_f_one_b", "min(ranks - rank - 1, micro_batches)", "ranks - rank - 1", "every forward and every backward once"),
    "backward first": ("one_f_one_b", '[("F", warm_up + number), ("B", number)]', '[("B", number), ("F", warm_up + number)]', "the forward of a micro-batch before its backward"),
    "memory of all": ("one_f_one_b", "min(ranks - rank - 1, micro_batches)", "micro_batches", "holds up to 2 micro-batches"),
    "plain sum": ("merge_attention", "mine * output + theirs * other, both", "output + other, both", "a plain sum"),
    "plain mean": ("merge_attention", "mine * output + theirs * other, both", "(output + other) / 2, both", "a plain mean"),
    "overflow": ("merge_attention", "torch.logaddexp(log_sum, other_log_sum)", "(log_sum.exp() + other_log_sum.exp()).log()", "take it of differences alone"),
    "nothing seen": ("merge_attention", "(part - both).exp().nan_to_num(0)", "(part - both).exp()", "-inf - -inf is nan"),
    "sum forgotten": ("merge_attention", "theirs * other, both", "theirs * other, log_sum", "the log_sum is"),
    "no maximum": ("vocabulary_parallel_loss", "logits - largest.unsqueeze(1)", "logits", "before exp"),
    "own maximum": ("vocabulary_parallel_loss", "    dist.all_reduce(largest, op=dist.ReduceOp.MAX)\n", "", "the same on all ranks"),
    "ignored counts": ("vocabulary_parallel_loss", "    column = targets - ", "    targets = targets.clamp(min=0)\n    column = targets - ", "counts as class 0"),
    "target everywhere": ("vocabulary_parallel_loss", "sum_over_ranks(own * is_mine)", "sum_over_ranks(own)", "there once, and else 0"),
    "sum twice": ("vocabulary_parallel_loss", "        return gradient  #", "        return gradient * dist.get_world_size()  #", "2 times too large"),
    "no graph": ("vocabulary_parallel_loss", "sum_over_ranks(shifted.exp().sum(1))", "sum_over_ranks(shifted.detach().exp().sum(1))", "what cut the graph"),
    "gathered": ("vocabulary_parallel_loss", "    shifted = logits", "    dist.all_gather([torch.empty_like(logits) for _ in range(dist.get_world_size())], logits.detach())\n    shifted = logits", "three all-reduces of one number a token"),
    "set to none": ("lab_drifting_replicas", "optimizer.zero_grad(set_to_none=False)", "optimizer.zero_grad(set_to_none=True)", "still what the optimizer reads"),
    "no zeros": ("lab_drifting_replicas", "optimizer.zero_grad(set_to_none=False)", "pass", "at the start of a step"),
    "one by one": ("lab_drifting_replicas", "        works.pop().wait()\n", "        works.pop().wait()\n        dist.all_reduce(flat.clone())\n", "one a step"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_its_message(mistake: str, tmp_path: Path) -> None:
    name, right, wrong, told = MISTAKES[mistake]
    (exercise,) = exercises.choose(ALL, [name])
    graded.assert_told(graded.grade_mistake(exercise, right, wrong, tmp_path), told)
