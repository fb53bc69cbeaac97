"""The check of the exercise choose_the_units.py; run by tools/exercises.py."""

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from grading import expect
from shared import EXACT, Collectives, off, plural
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule


def check(module: ModuleType, rank: int, world_size: int) -> None:
    layers = 3

    def build() -> Any:
        torch.manual_seed(1)
        return module.TiedModel(vocabulary=12, width=8, blocks=layers).double()

    alone, model = build(), build()
    plain = torch.optim.AdamW(alone.parameters(), lr=0.1)
    mesh = init_device_mesh("cpu", (world_size,))
    optimizer = module.shard(model, mesh, learning_rate=0.1)
    names = {child: name for name, child in model.named_modules()}
    units = {names[m] or "the model" for m in model.modules() if isinstance(m, FSDPModule)}
    expected = {f"blocks.{number}" for number in range(layers)}
    expect(
        "the model" in units,
        f"the units are {', '.join(sorted(units)) or 'none'}",
        "one for each block, and the model",
        "the model is called last, and takes the parameters that no unit has: embedding, norm, head",
    )
    expect(
        expected <= units,
        f"the units are {', '.join(sorted(units))}: all of a forward's parameters in one message",
        f"{', '.join(sorted(expected))} and the model",
        "fully_shard(block) for each block, before the model itself",
    )
    more = sorted(units - expected - {"the model"})
    hint = "each unit costs messages of its own"
    if {"embedding", "head"} & set(more):
        hint = "embedding and head are one parameter, needed whole by both: leave them to the model's own unit"
    expect(not more, f"{', '.join(more)} is a unit too", "blocks and the model", hint)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    expect(
        held == {id(parameter) for parameter in model.parameters()},
        "the optimizer holds parameters that the model has no more",
        "the shards (DTensors)",
        "fully_shard replaces the model's parameters: make the optimizer after it",
    )
    tokens = torch.arange(12)
    for step in range(3):
        F.cross_entropy(alone(tokens), tokens.roll(1)).backward()
        share = tokens.chunk(world_size)[rank]
        with Collectives() as counter:
            F.cross_entropy(model(share), tokens.roll(1)[share]).backward()
        for one in (plain, optimizer):
            one.step()
            one.zero_grad()
        gathers, scatters = counter.count("all-gather"), counter.count("reduce-scatter")
        hint = "backward begins with the last block: freed after its forward, it is gathered again at once"
        if gathers < 2 * layers:
            hint = "the other blocks, too, stay whole from forward to backward: that is the memory one wants to save"
        expect(
            (gathers, scatters) == (2 * layers, layers + 1),
            f"step {step}: {plural(gathers, 'all-gather')} and {plural(scatters, 'reduce-scatter')}",
            f"{2 * layers} and {layers + 1} with {layers} blocks",
            hint,
        )
        for (name, parameter), right in zip(model.named_parameters(), alone.parameters(), strict=True):
            difference = off(parameter.detach().full_tensor(), right.detach())
            expect(
                difference <= EXACT,
                f"after step {step}, {name} is {difference:.1e} away from the training of one process",
                "the same weights, to 1e-12",
                "an AdamW with this learning rate and torch's defaults, over all parameters",
            )
