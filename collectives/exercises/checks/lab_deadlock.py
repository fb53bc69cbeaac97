"""The check of the exercise lab_deadlock.py; run by tools/exercises.py."""

from types import ModuleType

import torch
import torch.nn.functional as F
from grading import expect
from torch import nn

WORLD_SIZES = (2, 3)


def one_process(module: ModuleType, steps: int, target: float, world_size: int) -> tuple[nn.Module, list[list[float]]]:
    """The training of lab_deadlock by one process: the model, and the losses of every rank's share."""
    model = module.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses: list[list[float]] = [[] for _ in range(world_size)]
    for step in range(steps):
        optimizer.zero_grad()
        for rank in range(world_size):
            inputs, kinds = module.my_share(step, rank)
            loss = F.cross_entropy(model(inputs), kinds)
            (loss / world_size).backward()
            losses[rank].append(loss.item())
        optimizer.step()
        if max(share[-1] for share in losses) < target:
            break
    return model, losses


def check(module: ModuleType, rank: int, world_size: int) -> None:
    _, losses = one_process(module, 40, 0.0, world_size)
    # Between the largest and the smallest loss of step 10: some ranks are below it before others are.
    shares = [share[10] for share in losses]
    for target in (0.0, (min(shares) + max(shares)) / 2):
        where = f"train(steps=40, target={target:.4f})"
        expected, losses = one_process(module, 40, target, world_size)
        model, found = module.train(steps=40, target=target)
        expect(
            len(found) == len(losses[rank]),
            f"{where}: rank {rank} made {len(found)} steps",
            f"{len(losses[rank])} steps: up to the first in which every rank's loss is below the target",
            "all ranks stop together; ask them all in every step",
        )
        apart = max((p - q).abs().max().item() for p, q in zip(model.parameters(), expected.parameters(), strict=True))
        # Both are sums of n gradients in fp64; what differs is the order.
        expect(
            apart <= 1e-12,
            f"{where}: on rank {rank} the weights are {apart:.1e} away from those of one process",
            "the same weights, to 1e-12",
            "sum_over_ranks returns the sum of the tensors of all ranks, and leaves its argument alone",
        )
