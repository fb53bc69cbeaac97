"""The check of the exercise lab_drifting_replicas.py; run by tools/exercises.py."""

from types import ModuleType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from grading import expect
from shared import EXACT, Collectives, off

WORLD_SIZES = (2, 3)


def check(module: ModuleType, rank: int, world_size: int) -> None:
    for steps, micro_batches in ((1, 1), (5, 1), (5, 2), (5, 4)):
        with Collectives() as counter:
            model, losses = module.train(steps=steps, micro_batches=micro_batches)
        where = f"steps={steps}, micro_batches={micro_batches}"
        expected = module.build_model()
        for step in range(steps):
            inputs, kinds = module.global_batch(step)
            F.cross_entropy(expected(inputs), kinds).backward()
            with torch.no_grad():
                for parameter in expected.parameters():
                    parameter -= 0.2 * parameter.grad
                    parameter.grad = None
        for (name, parameter), right in zip(model.named_parameters(), expected.parameters(), strict=True):
            of_rank_0 = parameter.detach().clone()
            dist.broadcast(of_rank_0, src=0)
            apart = (parameter.detach() - of_rank_0).abs().max()
            dist.all_reduce(apart, op=dist.ReduceOp.MAX)
            expect(
                apart.item() == 0,
                f"{where}: the ranks' {name} differ by up to {apart.item():.1e}",
                "the same weights on all ranks",
                "step 1 is right and step 2 is not: is what the all-reduce sums still what the optimizer reads?",
            )
            difference = off(parameter.detach(), right.detach())
            expect(
                difference <= EXACT,
                f"{where}: {name} is {difference:.1e} away from the training of one process",
                "the same weights, to 1e-12",
                "are all gradients zero at the start of a step, and is each divided by the world size once?",
            )
        numbers = sum(parameter.numel() for parameter in model.parameters())
        expect(
            counter.log == [("allreduce", 8 * numbers)] * steps,
            f"{where}: {len(counter.log)} messages, {counter.bytes} bytes",
            f"{steps} all-reduces, one a step, of {8 * numbers} bytes",
            "all gradients travel in one flat tensor, with the last micro-batch",
        )
        expect(len(losses) == steps, f"{len(losses)} losses", f"{steps}, one a step", "keep what train returns")
