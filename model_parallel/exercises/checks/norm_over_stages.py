"""The check of the exercise norm_over_stages.py; run by tools/exercises.py."""

from types import ModuleType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from grading import expect
from shared import Collectives, close, wrong
from torch import Tensor, nn


class Chain(nn.Module):
    """An embedding, a layer for each stage, and a head, tied or with a weight of its own."""

    def __init__(self, stages: int, is_tied: bool) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.embedding = nn.Embedding(7, 5)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(stages))
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight if is_tied else nn.Parameter(self.embedding.weight.detach().clone())
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return self.head(hidden)


def check(module: ModuleType, rank: int, world_size: int) -> None:
    last = world_size - 1
    first_and_last = dist.new_group([0, last])
    tokens = torch.arange(7)
    # What a stage's backward leaves: with a weight of its own, the head's gradient is that of its use alone.
    apart, whole = Chain(world_size, is_tied=False), Chain(world_size, is_tied=True)
    for model in (apart, whole):
        (30 * F.cross_entropy(model(tokens), tokens.roll(1))).backward()
    names = [f"layers.{rank}.weight", f"layers.{rank}.bias"]
    names += ["embedding.weight"] * (rank == 0) + ["head.weight"] * (rank == last)
    mine = {name: parameter for name, parameter in apart.named_parameters() if name in names}
    before = {name: parameter.grad.clone() for name, parameter in mine.items()}
    summed = {name: parameter.grad.clone() for name, parameter in whole.named_parameters()}
    stage = nn.ParameterDict({name.replace(".", "_"): parameter for name, parameter in mine.items()})
    tied = {0: apart.embedding.weight, last: apart.head.weight}.get(rank)
    for max_norm in (1.0, 1e6):
        where = f"max_norm {max_norm:g}, stage {rank} of {world_size}"
        for name, parameter in whole.named_parameters():
            parameter.grad = summed[name].clone()
        norm = nn.utils.clip_grad_norm_(whole.parameters(), max_norm)
        for name, parameter in mine.items():
            parameter.grad = before[name].clone()
        with Collectives() as counter:
            found = torch.as_tensor(module.finish_gradients(stage, tied, first_and_last, max_norm))
        hint = "the root of the sum of all squares, each weight once, the tied one with the sum of its gradients"
        layer = [before[name] for name in names[:2]]
        if any(close(found, nn.utils.get_total_norm(own)) for own in (layer, [*layer, summed["embedding.weight"]])):
            hint = "this is the norm of this stage alone"
        elif close(found**2, norm**2 + summed["embedding.weight"].norm() ** 2):
            hint = "the tied weight is in it twice: one of its two stages must leave it out"
        expect(close(found, norm), f"{where}: the norm is {found.item():.9f}", f"{norm.item():.9f}", hint)
        for name, parameter in mine.items():
            right = dict(whole.named_parameters())[name.replace("head", "embedding")].grad
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_ has it
            hint = "all gradients of all stages are scaled by the same factor, max_norm / norm, if that is below 1"
            if parameter is tied and close(parameter.grad, before[name] * factor):
                hint = "this is what this stage's use of the weight gave: the weight's gradient is the sum of both"
            expect(
                close(parameter.grad, right),
                f"{where}: the gradient of {name} {wrong(parameter.grad, right)}",
                "that of one process after clip_grad_norm_, to 1e-12",
                hint,
            )
        sizes = [size for _, size in counter.log]
        expect(
            len(sizes) == counter.count("allreduce") and sizes == ([7, 1] if tied is not None else [1]),
            f"{where}: {counter.names()}, of {sizes} rows",
            f"all-reduces{', of the 7 rows of the tied gradient and' * (tied is not None)} of one number",
            "the squares of a stage can be added up before anything is sent",
        )
