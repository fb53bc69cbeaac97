"""The check of the exercise evaluate_together.py; run by tools/exercises.py."""

from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from grading import expect
from shared import EXACT, plural
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class Watched(nn.Module):
    """A model that sends nothing, and writes down how many samples each call of it brings."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return self.model(x)


def check(module: ModuleType, rank: int, world_size: int) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    mesh = init_device_mesh("cpu", (world_size,))
    sharded = build()
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    for samples, batch_size in ((24, 4), (25, 4), (26, 13), (7, 1), (1, 4)):
        torch.manual_seed(samples)
        inputs, targets = torch.randn(samples, 8).double(), torch.randint(0, 3, (samples,))
        with torch.no_grad():
            losses = F.cross_entropy(build()(inputs), targets, reduction="none")
        where = f"{plural(samples, 'sample')} in batches of {batch_size}"
        # Without shards first: ranks that call their model less often would leave the others waiting.
        watched = Watched(build())
        found = module.evaluate(watched, inputs, targets, batch_size)
        everyone: list[Any] = [None] * world_size
        dist.all_gather_object(everyone, watched.calls)
        longest = -(-samples // world_size)
        batches = -(-longest // batch_size)
        calls = [len(each) for each in everyone]
        expect(
            len(set(calls)) == 1,
            f"{where}: the ranks call the model {calls} times",
            f"{batches} times each",
            "a forward of a sharded model gathers: the rank that calls it once more would wait for ever",
        )
        largest = max(max(each, default=0) for each in everyone)
        expect(
            largest <= batch_size,
            f"{where}: {plural(largest, 'sample')} at a time",
            f"at most {batch_size}",
            "that is what fits into memory",
        )
        expect(
            calls[0] <= batches,
            f"{where}: each rank calls the model {plural(calls[0], 'time')}, with {sum(everyone[0])} samples on rank 0",
            f"{batches}, for shares of at most {longest}",
            "share the samples out: a rank that evaluates all of them saves nothing",
        )
        right = losses.mean().item()
        hint = "every sample once, none filled in; sum losses and counts over batches and ranks, and divide once"
        first = losses[: len(losses) // world_size * world_size]
        twice = torch.cat([losses, losses[: -samples % world_size]])
        if len(first) and abs(found - first.mean().item()) <= EXACT:
            hint = f"this is the mean over {len(first)} samples: what is left over counts as well"
        elif abs(found - twice.mean().item()) <= EXACT and samples % world_size:
            hint = f"this is the mean over {len(twice)} samples: those that fill up a share count twice"
        expect(
            abs(found - right) <= EXACT,
            f"{where}: evaluate gives {found:.12f} on rank {rank}",
            f"{right:.12f}, as one process does",
            hint,
        )
        found = module.evaluate(sharded, inputs, targets, batch_size)
        expect(
            abs(found - right) <= EXACT,
            f"{where}: with the model sharded evaluate gives {found:.12f} on rank {rank}",
            f"{right:.12f}, as without",
            "the model that is handed in is the one to call",
        )
