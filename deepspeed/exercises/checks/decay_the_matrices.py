"""The check of the exercise decay_the_matrices.py; run by tools/exercises.py."""

from types import ModuleType

import torch
import torch.nn.functional as F
from grading import expect
from shared import CLOSE, deepspeed, engine_of, engine_settings, off, start, values
from torch import Tensor, nn

WORLD_SIZES = (2,)


class Sorted(nn.Module):
    """An embedding, norms, linear layers with a bias, one of them frozen: (batch,) int64 to (batch, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 12)
        self.frozen = nn.Linear(12, 12).requires_grad_(False)
        self.norm = nn.LayerNorm(12)
        self.up = nn.Linear(12, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.up(self.norm(self.frozen(self.embedding(tokens))))


MATRICES, VECTORS = {"embedding.weight", "up.weight"}, {"norm.weight", "norm.bias", "up.bias"}


def listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "empty"


def check(module: ModuleType, rank: int, world_size: int) -> None:
    start(rank, world_size)
    decay, learning_rate, tokens = 4.0, 0.1, torch.arange(6)
    for stage in (0, 3):
        settings = engine_settings(stage, 1, world_size)
        torch.manual_seed(6)
        alone = Sorted()
        with deepspeed.zero.Init(config_dict_or_path=settings, enabled=stage == 3):
            model = Sorted()
        with torch.no_grad():
            for parameter, right in zip(model.parameters(), alone.parameters(), strict=True):
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    parameter.copy_(right)
        where = "a model of stage 3" if stage else "a plain model"
        groups = module.decay_groups(model, decay)
        expect(
            len(groups) == 2,
            f"{where}: {len(groups)} groups",
            "two, matrices and vectors",
            "a group is a dictionary with params and weight_decay",
        )
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        found = [{names.get(id(parameter), "?") for parameter in group["params"]} for group in groups]
        expect(
            not any(name.startswith("frozen") for group in found for name in group),
            f"{where}: a group has frozen parameters",
            "only those with requires_grad",
            "they have no gradient, and decay would move them all the same in other optimizers",
        )
        hint = "matrices are what has two axes or more when it is whole"
        if stage == 3 and not found[0]:
            hint = "p.ndim is 1 for each of them while it is cut up; look at p.ds_shape"
        elif found == [VECTORS, MATRICES]:
            hint = "first the matrices, then the vectors"
        expect(
            found == [MATRICES, VECTORS],
            f"{where}: the groups are {'; '.join(listed(each) for each in found)}",
            f"{listed(MATRICES)}; {listed(VECTORS)}",
            hint,
        )
        everything = sum(parameter.numel() for parameter in alone.parameters())
        counted = module.count(model.parameters())
        expect(
            counted == everything,
            f"{where}: count gives {counted}",
            f"{everything}",
            "p.numel() is that of what is left of p here; when it is whole it has p.ds_numel",
        )
        # With SGD a step is w − lr · (gradient + decay · w): a weight that is not decayed shows, by 0.1 · 4 of itself.
        by_name = dict(alone.named_parameters())
        plain = torch.optim.SGD(
            [
                {"params": [by_name[name] for name in sorted(MATRICES)], "weight_decay": decay},
                {"params": [by_name[name] for name in sorted(VECTORS)]},
            ],
            lr=learning_rate,
        )
        F.cross_entropy(alone(tokens), tokens.roll(1)).backward()
        plain.step()
        engine = engine_of(model, torch.optim.SGD(groups, lr=learning_rate), settings)
        engine.backward(F.cross_entropy(engine(tokens), tokens.roll(1)))  # all ranks have the same tokens: equal means
        engine.step()
        for name, value in values(model).items():
            difference = off(value, by_name[name].detach())
            expect(
                difference <= CLOSE,
                f"{where}: after a step, {name} is {difference:.1e} away from that of one process",
                f"the same to {CLOSE:g}",
                f"is the weight decay {decay} with the matrices and 0 with the vectors?",
            )
