"""The check of the exercise lab_overlap_by_hand.py; run by tools/exercises.py."""

from types import ModuleType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from grading import expect
from shared import CountAllReduce, largest_difference
from torch import Tensor

WORLD_SIZES = (2, 3)


def check(module: ModuleType, rank: int, world_size: int) -> None:
    for micro_batches in (1, 2, 4):
        with CountAllReduce() as counter:
            model, losses = module.train(steps=5, micro_batches=micro_batches)
        where = f"after 5 steps with {micro_batches} micro-batch{'es' * (micro_batches > 1)}"
        found = {name: parameter.detach() for name, parameter in model.named_parameters()}
        for name, value in found.items():
            of_rank_0 = value.clone()
            dist.broadcast(of_rank_0, src=0)
            apart = (value - of_rank_0).abs().max()
            dist.all_reduce(apart, op=dist.ReduceOp.MAX)
            expect(
                apart.item() == 0,
                f"{where} the ranks' {name} differ by up to {apart.item():.1e}",
                "the same weights on all ranks",
                "what exactly is averaged in the last micro-batch, and what has been added up before it?",
            )
        name, difference = largest_difference(found, one_process_sgd(module, 5))
        expect(
            difference <= 1e-12,
            f"{where} {name} is {difference:.1e} away from the training of one process",
            "the same weights, to 1e-12",
            "the sum over micro-batches of loss / micro_batches, averaged over the ranks, is the global mean",
        )
        numbers = 5 * sum(value.numel() for value in found.values())
        expect(
            counter.elements == numbers,
            f"{where} {counter.elements} numbers travelled",
            f"{numbers}: each gradient once a step",
            "communicate with the last micro-batch only",
        )
        expect(len(losses) == 5, f"{len(losses)} losses", "5, one a step", "keep what train returns")


def one_process_sgd(module: ModuleType, steps: int) -> dict[str, Tensor]:
    """The weights that one process gets from the same global batches."""
    model = module.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(steps):
        images, labels = module.global_batch(step)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
