# exercise 4: Resume exactly
"""Stop a training, start it again, and get the same numbers, bit for bit.

A checkpoint with only the weights starts again with a bump in the loss, and often nobody notices. What else
decides the next loss? Read `Trainer` below and list everything that a step reads *and* that earlier steps
have changed. Some of it is the same on all ranks, so that one copy is enough; some of it is each rank's own.

Write `save` and `restore`. The check trains on 2 ranks, saves after 7 steps, goes on for 10 more, and then
lets a new Trainer with another seed restore the checkpoint and do the same 10 steps: all losses must be
*equal*, not close.

What you need: `state_dict()` and `load_state_dict()`, `torch.get_rng_state()` and `torch.set_rng_state()`,
`torch.save(object, path)` and `torch.load(path)`, and `dist.barrier()` where one rank must not run ahead of
another.
"""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Trainer:
    """A training as it stands between two steps. Leave it as it is."""

    def __init__(self, seed: int) -> None:
        images, labels = load_digits(return_X_y=True)
        self.images, self.labels = torch.tensor(images).float() / 16, torch.tensor(labels)
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
        self.ddp_model = DistributedDataParallel(self.model)  # shares the parameters of self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.step = 0
        torch.manual_seed(seed + 1 + dist.get_rank())  # from here on: other dropout on every rank

    def train_step(self) -> float:
        """One step on this rank's share of the batch; the loss of this rank, before the update."""
        first = (self.step * dist.get_world_size() + dist.get_rank()) * 24
        mine = torch.arange(first, first + 24) % len(self.images)
        loss = F.cross_entropy(self.ddp_model(self.images[mine]), self.labels[mine])
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.item()


def save(trainer: Trainer, folder: Path) -> None:
    """Write everything that `restore` needs into `folder`, which exists. All ranks call it together."""
    # solution
    torch.save(torch.get_rng_state(), folder / f"rng_{dist.get_rank()}.pt")
    if dist.get_rank() == 0:
        states = {name: getattr(trainer, name).state_dict() for name in ("model", "optimizer", "schedule")}
        torch.save({**states, "step": trainer.step}, folder / "checkpoint.pt")
    dist.barrier()  # nobody reads, or reports success, before all is written
    # task: raise NotImplementedError("save")
    # end


def restore(trainer: Trainer, folder: Path) -> None:
    """Bring a new `trainer` into the state that `save` has seen. All ranks call it together."""
    # solution
    checkpoint = torch.load(folder / "checkpoint.pt")
    for name in ("model", "optimizer", "schedule"):
        getattr(trainer, name).load_state_dict(checkpoint[name])
    trainer.step = checkpoint["step"]
    torch.set_rng_state(torch.load(folder / f"rng_{dist.get_rank()}.pt"))
    # task: raise NotImplementedError("restore")
    # end
