"""The check of the exercise accumulate_correctly.py; run by tools/exercises.py."""

from types import ModuleType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from grading import expect
from shared import gradients, largest_difference
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel


def small_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def check(module: ModuleType, rank: int, world_size: int) -> None:
    """Three micro-batches a rank; their valid targets differ, and one has none at all."""
    generator = torch.Generator().manual_seed(4)
    everyone = []
    for owner in range(world_size):
        for index in range(3):
            inputs = torch.randn(4, 5, generator=generator, dtype=torch.float64)
            targets = torch.randint(0, 4, (4,), generator=generator)
            masked = 4 if (owner, index) == (1, 0) else (owner + 2 * index) % 4
            targets[:masked] = -100
            everyone.append((inputs, targets))
    one_process = small_model()
    all_inputs, all_targets = (torch.cat(parts) for parts in zip(*everyone, strict=True))
    expected_loss = F.cross_entropy(one_process(all_inputs), all_targets, ignore_index=-100)
    expected_loss.backward()
    expected = gradients(one_process)

    model = DistributedDataParallel(small_model())
    buckets: list[int] = []

    def count(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        buckets.append(bucket.index())
        return allreduce_hook(dist.group.WORLD, bucket)

    model.register_comm_hook(None, count)
    for step in range(2):  # DDP arranges its buckets anew after the first backward
        buckets.clear()
        loss = module.accumulate(model, everyone[3 * rank : 3 * rank + 3])
        found = gradients(model.module)
        model.zero_grad()
        expect(
            len(buckets) > 0,
            "DDP did not communicate at all",
            "one all-reduce per bucket and step",
            "the last micro-batch must be outside no_sync",
        )
        expect(
            loss is not None and not torch.isnan(torch.as_tensor(loss)),
            f"step {step}: accumulate returned {loss} on rank {rank}",
            "a number",
            "the mean over no valid target is 0/0: take the sum of the losses, and divide once",
        )
        name, difference = largest_difference(found, expected)
        hint = "sum of losses x world size / valid targets of the global batch; count them with an all_reduce"
        expect(
            difference <= 1e-12,
            f"step {step}: the gradient of {name} on rank {rank} is off by {difference:.1e}",
            "that of the mean over all valid targets of the global batch, to 1e-12",
            hint,
        )
        expect(
            len(buckets) == len(set(buckets)),
            f"step {step}: {len(buckets)} all-reduces of {len(set(buckets))} bucket for 3 micro-batches",
            "one all-reduce per bucket and step",
            "is the forward inside no_sync as well? It is the forward that decides",
        )
        expect(
            abs(float(loss) - expected_loss.item()) <= 1e-12,
            f"step {step}: accumulate returned {loss} on rank {rank}",
            f"{expected_loss.item():.15f} on all ranks",
            "sum the losses over micro-batches and over ranks, then divide by the global count",
        )
