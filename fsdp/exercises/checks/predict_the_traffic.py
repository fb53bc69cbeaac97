"""The check of the exercise predict_the_traffic.py; run by tools/exercises.py."""

from types import ModuleType
from typing import Any

import torch
from grading import expect
from shared import Collectives
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

WORLD_SIZES = (2, 4)  # 4: copies


def check(module: ModuleType, rank: int, world_size: int) -> None:
    # (copies, reshard, micro-batches, parameters in bf16)
    shared_by_all = [(1, True, 1, False), (1, False, 1, True), (1, True, 3, True), (1, False, 3, False)]
    hybrid = [(2, True, 1, False), (2, False, 3, True)] if world_size == 4 else []
    for copies, reshard, micro_batches, low in shared_by_all + hybrid:
        model, counter = measured(copies, reshard, micro_batches, low, world_size)
        blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
        root = sum(p.numel() for p in model.parameters()) - sum(blocks)
        gather_bytes = 2 if low else 4
        traffic = module.predict(root, blocks, world_size, copies, reshard, micro_batches, gather_bytes, 4)
        where = (
            f"{'FULL_SHARD' if reshard else 'SHARD_GRAD_OP'}, ranks={world_size}, copies={copies}, "
            f"micro_batches={micro_batches}, gather_bytes={gather_bytes}"
        )
        counts = {
            "all-gathers": "FULL_SHARD gathers a block twice in each micro-batch, and the root once",
            "reduce-scatters": "one for each unit, in the last micro-batch: gradients add up on each rank until then",
            "all-reduces": "one for each unit, and only where there is more than one copy",
        }
        for name, hint in counts.items():
            predicted, found = getattr(traffic, name.replace("-", "_")), counter.count(name[:-1])
            expect(predicted == found, f"{where}: you predict {predicted} {name}", f"{found}, as measured", hint)
        sent = dict.fromkeys(("all-gather", "reduce-scatter", "all-reduce"), 0.0)
        for name, nbytes, ranks in counter.log:
            if name == "all-reduce":
                sent[name] += 2 * nbytes * (copies - 1) / copies
            else:
                sent[name] += nbytes * (ranks - 1) / ranks
        total = round(sum(sent.values()))
        hint = "all-gathers in gather_bytes, the others in reduce_bytes; (k - 1) / k of what, with which k?"
        if traffic.bytes_sent == round(sum(nbytes for _, nbytes, _ in counter.log)):
            hint = "a rank sends (k - 1) / k of the whole: it keeps its own part"
        elif copies > 1:
            hint = "within a copy k is ranks / copies; between copies travels a shard, k is the copies, and both ways"
        expect(
            traffic.bytes_sent == total,
            f"{where}: you predict {traffic.bytes_sent:,} bytes sent by a rank",
            f"{total:,}: {', '.join(f'{round(n):,} in {name}s' for name, n in sent.items() if n)}",
            hint,
        )


class Residual(nn.Module):
    """Three blocks between two layers, all of whose rows divide by 2 and by 4."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.enter(x)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.leave(hidden)


def measured(copies: int, reshard: bool, micro_batches: int, low: bool, world_size: int) -> tuple[Any, Collectives]:
    """The sharded model, and what a step of it has communicated."""
    model: Any = Residual()
    mesh = init_device_mesh("cpu", (copies, world_size // copies), mesh_dim_names=("dp_replicate", "dp_shard"))
    policy = MixedPrecisionPolicy(torch.bfloat16 if low else None, torch.float32)
    options: dict[str, Any] = {"mesh": mesh if copies > 1 else mesh["dp_shard"], "mp_policy": policy}
    for block in model.blocks:
        fully_shard(block, reshard_after_forward=reshard, **options)
    fully_shard(model, reshard_after_forward=False, **options)
    with Collectives() as counter:
        for number in range(micro_batches):
            model.set_requires_gradient_sync(number == micro_batches - 1)
            model(torch.ones(3, 4)).float().pow(2).sum().backward()
    return model, counter
