# exercise 5: Lab: two ranks, but no faster
"""The loss falls, but something is wrong.

    torchrun --nproc-per-node=2 ddp/exercises/tasks/lab_two_ranks_no_faster.py

This script runs without a warning, its replicas stay equal to the last bit, and its loss falls. But the team
that uses it says: "On two GPUs a step sees 96 samples, so we expected fewer steps to the same loss than on
one GPU with 48. There is no difference at all."

How to look: do not read the code first. Measure. A global batch of 96 consists of 96 samples. Which ones did
each rank take in the first step? Print something that identifies a sample (its number, or the sum of its
pixels), with the rank in front, and compare. Then find the line that is to blame, and repair it. Afterwards
look at the second epoch as well: it should bring the same samples in another order.

The check hands a data set to `train` that writes down who reads what. Keep the signature, and load the data
in this process (no workers).
"""

import itertools

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists, which it would keep alive: see common/ranks.py
import torch.nn.functional as F
import torch.utils.data
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Digits(torch.utils.data.Dataset):
    """Handwritten digits: item i is (image of 64 pixels, label)."""

    def __init__(self) -> None:
        images, labels = load_digits(return_X_y=True)
        self.images, self.labels = torch.tensor(images).float() / 16, torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index], self.labels[index]


def train(dataset: torch.utils.data.Dataset, steps: int, global_size: int) -> list[float]:
    """Train for `steps` steps on `global_size` samples each, of all ranks together; this rank's losses."""
    torch.manual_seed(0)  # all replicas start with the same weights
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    share = global_size // dist.get_world_size()
    # solution
    # Every rank drew its order from the same seed, the one that makes the weights equal. The sampler shuffles
    # with one seed as well, but then deals the samples out: each rank gets its own.
    sampler = torch.utils.data.DistributedSampler(dataset, shuffle=True, drop_last=True)
    loader = torch.utils.data.DataLoader(dataset, batch_size=share, sampler=sampler, drop_last=True)
    # task: loader = torch.utils.data.DataLoader(dataset, batch_size=share, shuffle=True, drop_last=True)
    # end
    losses: list[float] = []
    for epoch in itertools.count():
        # solution
        sampler.set_epoch(epoch)  # without it every epoch comes in the same order
        # task:
        # end
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if dist.get_rank() == 0 and len(losses) % 20 == 0:
                print(f"epoch {epoch}  step {len(losses):3}  loss {loss.item():.3f}")
            if len(losses) == steps:
                return losses
    raise AssertionError("an endless loop has ended")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train(Digits(), steps=100, global_size=96)
    dist.barrier()
    dist.destroy_process_group()
