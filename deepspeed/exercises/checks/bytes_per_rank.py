"""The check of the exercise bytes_per_rank.py; run by tools/exercises.py."""

from types import ModuleType

import torch
from grading import expect
from shared import engine_of, engine_settings, start, state_bytes
from torch import nn


def check(module: ModuleType, rank: int, world_size: int) -> None:
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
