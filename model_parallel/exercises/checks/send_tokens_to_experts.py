"""The check of the exercise send_tokens_to_experts.py; run by tools/exercises.py."""

from types import ModuleType

import torch
from grading import expect
from shared import Collectives, close, off, random, wrong
from torch import Tensor


class Experts:
    """Those of one rank: matrices (width, width) by number. Counts the rows that each was given."""

    def __init__(self, weights: Tensor, own: range, where: str) -> None:
        self.weights = {number: weights[number].detach().clone().requires_grad_() for number in own}
        self.rows = dict.fromkeys(own, 0)
        self.own, self.where = own, where

    def compute(self, number: int, rows: Tensor) -> Tensor:
        expect(
            number in self.own,
            f"{self.where}: expert {number} was asked for",
            f"experts {self.own.start} and {self.own.stop - 1} on this rank",
            "rank r of n has the experts r E/n and following",
        )
        self.rows[number] += len(rows)
        return torch.tanh(rows @ self.weights[number])


def check(module: ModuleType, rank: int, world_size: int) -> None:
    experts, width = 2 * world_size, 4
    own = range(2 * rank, 2 * rank + 2)
    sizes = [5 + 3 * r for r in range(world_size)]  # tokens of each rank
    generator = torch.Generator().manual_seed(5)
    spread = [torch.randint(0, experts, (size,), generator=generator) for size in sizes]
    cases = {
        "tokens for all experts": spread,
        "all tokens for the last expert": [torch.full((size,), experts - 1) for size in sizes],
        "no token on the last rank": [*spread[:-1], spread[-1][:0]],
    }
    for case, everyone in cases.items():
        where = f"{case}, rank {rank}"
        weights = random(experts, width, width, seed=6).requires_grad_()
        tokens = [random(len(chosen), width, seed=7 + r).requires_grad_() for r, chosen in enumerate(everyone)]
        probes = [random(len(chosen), width, seed=20 + r) for r, chosen in enumerate(everyone)]
        results = [
            torch.tanh(torch.einsum("ti,tij->tj", rows, weights[chosen]))
            for rows, chosen in zip(tokens, everyone, strict=True)
        ]
        sum((result * probe).sum() for result, probe in zip(results, probes, strict=True)).backward()

        mine = tokens[rank].detach().clone().requires_grad_()
        here = Experts(weights, own, where)
        with Collectives() as counter:
            output = module.apply_experts(mine, everyone[rank], experts, here.compute)
        expect(
            len(counter.log) == counter.count("alltoall"),
            f"{where}: {counter.names()}",
            "all-to-alls only",
            "a token goes to one rank, and no other has to see it",
        )
        load = torch.bincount(torch.cat(everyone), minlength=experts).tolist()
        for number in own:
            expect(
                here.rows[number] == load[number],
                f"{where}: expert {number} got {here.rows[number]} rows",
                f"{load[number]}, of all ranks",
                "rows arrive by rank of origin, and from each origin by expert: the counts say how many of each",
            )
        expect(
            close(output, results[rank]),
            f"{where}: the output is off by {off(output, results[rank]):.1e}",
            "for each token what its expert makes of it, to 1e-12",
            "is each row computed by its own expert, and each sorting undone? x[order][order.argsort()] is x",
        )
        expect(
            output.requires_grad,
            f"{where}: the output has no graph",
            "a graph on every rank: in backward all of them take part in the all-to-alls",
            "let an expert without tokens compute with zero rows, and send rows with the autograd function",
        )
        sent, arriving = [size for _, size in counter.log], sum(load[number] for number in own)
        expect(
            sent == [experts, len(mine), arriving],
            f"{where}: {len(sent)} messages, of {sent} rows",
            f"3: {experts} counts, {len(mine)} tokens, {arriving} results",
            "first how many come, in one message, then just these, and as many back",
        )
        with Collectives() as counter:
            (output * probes[rank]).sum().backward()
        hint = "is each step one through which gradients flow? dist.all_to_all_single is none"
        expect(
            close(mine.grad, tokens[rank].grad),
            f"{where}: the gradient of the tokens {wrong(mine.grad, tokens[rank].grad)}",
            "that of one process, to 1e-12",
            hint,
        )
        for number in own:
            found, right = here.weights[number].grad, weights.grad[number]
            expect(
                close(found, right) or (found is None and load[number] == 0),
                f"{where}: the gradient of expert {number} {wrong(found, right)}",
                "what the tokens of all ranks give, to 1e-12",
                hint,
            )
        expect(len(counter.log) == 2, f"{where}: backward {counter.names()}", "two all-to-alls", hint)
