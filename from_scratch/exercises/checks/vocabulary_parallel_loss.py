"""The check of the exercise vocabulary_parallel_loss.py; run by tools/exercises.py."""

import math
from types import ModuleType

import torch
import torch.nn.functional as F
from grading import expect
from shared import Collectives, close, off, random

WORLD_SIZES = (2, 3, 4)


def check(module: ModuleType, rank: int, world_size: int) -> None:
    tokens, vocabulary = 10, 24
    plain = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(1))
    masked = plain.clone()
    masked[[0, 3, 9]] = -100
    for what, scale, targets in (
        ("small logits", 1.0, plain),
        ("logits of ten thousands", 1e4, plain),
        ("targets of which some are -100", 1.0, masked),
        ("targets that are all -100", 1.0, torch.full_like(plain, -100)),
    ):
        whole = (random(tokens, vocabulary, seed=2) * scale).requires_grad_()
        expected = F.cross_entropy(whole, targets, ignore_index=-100, reduction="sum")
        expected.backward()
        right = whole.grad.chunk(world_size, 1)[rank]
        mine = whole.detach().chunk(world_size, 1)[rank].clone().requires_grad_()
        with Collectives() as counter:
            loss = module.parallel_loss(mine, targets)
            forward = counter.bytes
            loss.backward()
        hint = "is the largest logit the same on all ranks? Is each target's logit there once, and else 0?"
        counted = F.cross_entropy(whole.detach(), targets.clamp(min=0), reduction="sum")
        if not math.isfinite(loss.item()):
            hint = "subtract the largest logit of all ranks before exp"
        elif close(loss.detach(), counted) and (targets < 0).any():
            hint = "a target of -100 counts as class 0 here: its token must add nothing"
        # The sum of losses of up to 1e5 each: 1e-12 of that, and else of 1.
        expect(
            close(loss.detach() / scale, expected.detach() / scale),
            f"{what}: the loss on rank {rank} is {loss.item()}",
            f"{expected.item()}, as one process has it",
            hint,
        )
        hint = "the gradient of a logit is its softmax, minus 1 for the target: what cut the graph?"
        if close(mine.grad, world_size * right):
            hint = f"{world_size} times too large: sum_over_ranks already hands gradients on as they must be"
        elif close(mine.grad, right / world_size):
            hint = f"{world_size} times too small: every rank has the whole loss"
        expect(
            close(mine.grad, right),
            f"{what}: the gradient of rank {rank}'s logits is off by {off(mine.grad, right):.1e}",
            "its columns of the whole gradient, to 1e-12",
            hint,
        )
        expect(
            len(counter.log) <= 3 and counter.bytes <= 3 * tokens * 8,
            f"{what}: {counter.names()}: {forward} bytes forward, {counter.bytes - forward} backward",
            f"three all-reduces of one number a token: {3 * tokens * 8} bytes, all of them forward",
            f"the logits themselves are {whole.nbytes} bytes: reduce them to a number a token first",
        )
