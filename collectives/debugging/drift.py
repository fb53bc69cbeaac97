"""One rank's gradient is not averaged, once: nothing complains, the loss falls, and the replicas are no replicas.

torchrun --nproc-per-node=2 collectives/debugging/drift.py                     # trains on, with unequal weights
torchrun --nproc-per-node=2 collectives/debugging/drift.py --check true        # the guard ends it at the next step
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from reporting import say
from torch.distributed.elastic.multiprocessing.errors import record

from common.config import parse
from common.ranks import fail, join
from common.replica_check import check_replicas

STEPS, BAD_STEP = 20, 5


@dataclass
class DriftConfig:
    check: bool = False
    """Compare all weights after every step (common/replica_check.py; in train.py: --train.check_replicas_every)."""


@record
def main(config: DriftConfig) -> None:
    ranks = join("cpu", timeout_s=10)
    if ranks.world_size < 2:
        fail("one replica cannot drift from others; start several with torchrun --nproc-per-node=2")
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)  # equal on all ranks: equal seeds
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    torch.manual_seed(1 + ranks.rank)  # and each has samples of its own
    inputs = torch.randn(64, 8)
    targets = inputs.sum(dim=1, keepdim=True)
    for step in range(STEPS):
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        for parameter in model.parameters():
            bad = step == BAD_STEP and ranks.rank == ranks.world_size - 1
            gradient = parameter.grad.clone() if bad else parameter.grad  # bad: the average goes into a copy
            dist.all_reduce(gradient)
            gradient /= ranks.world_size
        optimizer.step()
        optimizer.zero_grad()
        if config.check:
            check_replicas(model, step)
        losses = torch.stack([loss.detach()])
        dist.all_reduce(losses)
        if ranks.is_main and step in (0, BAD_STEP, STEPS - 1):
            say(0, f"step {step:2}: loss {losses.item() / ranks.world_size:.4f}, and no error")
    weights = ranks.all_gather(model.weight[0, 0].item())
    if ranks.is_main:
        say(0, f"the first weight, by rank: {' '.join(f'{weight:.6f}' for weight in weights)}")
    ranks.leave()


if __name__ == "__main__":
    main(parse(DriftConfig))
