"""What is expected of the exercises; run by tools/exercises.py on the number of ranks given here."""

import math
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from grading import expect
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the lesson: as if this file stood beside its scripts

from environment import deepspeed
from settings import state_bytes

WORLD_SIZES = {"decay_the_matrices": (2,)}  # the others: 2 and 3

# fp32, numbers of order 1, sums of some dozens of them: errors stay below 1e-6; the mistakes are off by 1e-2 and more.
CLOSE = 1e-5


def start(rank: int, world_size: int) -> None:
    """Tell DeepSpeed who this rank is, and that the process group is there."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    deepspeed.utils.logger.setLevel("ERROR")  # "untested optimizer" is no news to the learner
    deepspeed.init_distributed(verbose=False)


def engine_settings(stage: int, accumulation: int, world_size: int, low: bool = False) -> dict[str, Any]:
    """DeepSpeed's settings: no clipping, and in stage 3 no parameter stays whole."""
    return {
        "train_batch_size": accumulation * world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": low},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def engine_of(model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, whole also in stage 3."""
    found = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().clone()
    return found


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference; infinite for nan or another shape."""
    if found.shape != expected.shape or (found - expected).isnan().any():
        return math.inf
    return (found - expected).abs().max().item()


# ------------------------------------------------------------------------------------------ exercise 1


def check_bytes_per_rank(module: ModuleType, rank: int, world_size: int) -> None:
    start(rank, world_size)
    for stage, low in [(stage, low) for stage in (0, 1, 2, 3) for low in (False, True) if stage or not low]:
        parameters, measured = weigh(stage, low, world_size)
        predicted = module.bytes_per_rank(parameters, stage, world_size, 2 if low else 4)
        for kind, found in measured.items():
            said = getattr(predicted, kind)
            expect(
                said == found,
                f"stage {stage} in {'bf16' if low else 'fp32'} on {world_size} ranks: you predict {said:,} bytes of "
                f"{kind} for {parameters} parameters",
                f"{found:,}, as measured",
                hint_on_bytes(kind, stage, low, parameters, world_size, said),
            )


def weigh(stage: int, low: bool, world_size: int) -> tuple[int, dict[str, int]]:
    """(parameters, what a rank of DeepSpeed's engine keeps in the second step, between its micro-batches)."""
    # Matrices that are equal, as many as 2 and 3 divide: no cut goes through one, where stage 2 would keep it whole.
    model = nn.Sequential(*[nn.Linear(12, 12, bias=False) for _ in range(6)])
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    engine = engine_of(model, optimizer, engine_settings(stage, 2, world_size, low))
    x = torch.ones(1, 12, dtype=torch.bfloat16 if low else torch.float32)
    for _ in range(2):
        engine.backward(engine(x).sum())
        engine.step()
    engine.backward(engine(x).sum())
    return parameters, state_bytes(engine)


def hint_on_bytes(kind: str, stage: int, low: bool, parameters: int, ranks: int, said: int) -> str:
    if kind == "master":
        if stage == 0:
            return "in stage 0, in fp32, torch's optimizer updates the weights themselves: there is no copy"
        if said == 0:
            return "from stage 1 on DeepSpeed keeps a copy in fp32 as well"
        return "the copy is the optimizer's: in fp32 whatever the weights are in, and cut up from stage 1 on"
    if kind == "moments":
        if stage and said == 8 * parameters:
            return "stage 1 is where what belongs to the optimizer is cut up"
        return "AdamW has two moments for each parameter, in fp32 whatever the weights are in"
    first = 2 if kind == "gradients" else 3
    if said == (2 if low else 4) * (parameters // ranks if stage < first else parameters):
        return f"{kind} are cut up from stage {first} on, and not before"
    return f"{kind} have {2 if low else 4} bytes each here: the precision of what the model computes with"


# ------------------------------------------------------------------------------------------ exercise 2


def check_scale_the_loss(module: ModuleType, rank: int, world_size: int) -> None:
    start(rank, world_size)
    accumulation = 4
    for stage, scale_wrt_gas in ((1, False), (1, True), (2, True), (3, False)):
        batches = token_batches(world_size, accumulation)
        alone = small_model()
        losses = [F.cross_entropy(alone(x), y, reduction="sum") for each in batches for x, y in each]
        tokens = sum(int((y != module.IGNORED).sum()) for each in batches for _, y in each)
        (torch.stack(losses).sum() / tokens).backward()
        right = {name: parameter.grad.clone() for name, parameter in alone.named_parameters()}

        model = small_model()
        # With a learning rate of 1 the gradient is what the step takes away, whoever computed and reduced it.
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        engine = engine_of(model, optimizer, engine_settings(stage, accumulation, world_size))
        before = values(model)
        module.train_step(engine, batches[rank], scale_wrt_gas)
        after = values(model)
        found = {name: before[name] - after[name] for name in before}

        where = f"stage {stage}, scale_wrt_gas={scale_wrt_gas}, {world_size} ranks, {accumulation} micro-batches"
        expect(
            engine.global_steps == 1,
            f"{where}: the optimizer has done {engine.global_steps} steps",
            "one",
            "engine.step() after every backward: it counts micro-batches, and acts on the last",
        )
        flat, flat_right = (torch.cat([each[name].flatten() for name in right]) for each in (found, right))
        difference = off(flat, flat_right)
        expect(
            difference <= CLOSE,
            f"{where}: the gradient is off by {difference:.1e}",
            "that of the mean over all valid tokens, as one process has it",
            hint_on_factor(flat, flat_right, tokens, world_size, accumulation),
        )


def small_model() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def token_batches(world_size: int, accumulation: int) -> list[list[tuple[Tensor, Tensor]]]:
    """For each rank its micro-batches of 12 tokens, of which more and more do not count; in one of them, none does."""
    generator = torch.Generator().manual_seed(5)
    batches: list[list[tuple[Tensor, Tensor]]] = []
    for rank in range(world_size):
        batches.append([])
        for number in range(accumulation):
            inputs, targets = torch.randn(12, 8, generator=generator), torch.randint(0, 3, (12,), generator=generator)
            ignored = 12 if (rank, number) == (1, 1) else 4 * rank + number
            targets[:ignored] = -100
            batches[-1].append((inputs, targets))
    return batches


def hint_on_factor(found: Tensor, right: Tensor, tokens: int, world_size: int, accumulation: int) -> str:
    """What a gradient means that has the right direction; else what may be wrong with the direction."""
    factor = ((found @ right) / (right @ right)).item()
    if off(found, factor * right) > CLOSE:
        return (
            "not even its direction is right: a token weighs more where there are few. Sums of losses, and one number "
            "of tokens for all ranks and micro-batches"
        )
    names = {
        1 / world_size: "too small by the number of ranks: the engine takes the mean over them, the sum is wanted",
        1 / accumulation: "too small by the number of micro-batches: with scale_wrt_gas=True the engine divides, too",
        1 / accumulation / world_size: "too small by ranks × micro-batches: the engine divides by both",
        accumulation: "too large by the number of micro-batches: nobody divides by them with scale_wrt_gas=False",
        tokens: "too large by the number of tokens in the global batch: the mean is wanted",
        0: "there is none: has engine.step() been called after every backward?",
    }
    for value, hint in names.items():
        if abs(factor - value) <= 1e-3 * max(value, 1e-2):
            return hint
    return f"it is {factor:.4g} times what it should be; ranks, micro-batches, tokens: what gives that number?"


# ------------------------------------------------------------------------------------------ exercise 3


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


def check_decay_the_matrices(module: ModuleType, rank: int, world_size: int) -> None:
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
