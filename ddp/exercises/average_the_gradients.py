# exercise 2: Average the gradients
"""Data parallelism in one function: after backward, every rank gets the mean of all ranks' gradients.

    torchrun --nproc-per-node=2 ddp/exercises/tasks/average_the_gradients.py

All ranks start with the same weights, and each computes the gradient of the mean loss over its own share of
the batch. The shares are equal in size, so the gradient of the whole batch is the mean of these gradients. If
each rank puts that mean into `.grad`, all optimizers take the same step, and the weights stay equal for ever.

DistributedDataParallel does this in buckets and while backward is still running. Here it may be slow, but
right:

- equal to one process that sees the whole batch, to 1e-12 in fp64, on 2 ranks and on 3;
- a parameter that has no gradient (frozen, or not used) still has none afterwards. Zeros are not the same:
  AdamW would then decay that weight;
- a weight that is used in two places (tied embeddings) is one parameter, and travels once;
- what is averaged is the gradients. The weights stay as they are.

You need `dist.all_reduce(tensor)`, which replaces `tensor` by the *sum* over all ranks, on all ranks.
"""

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists, which it would keep alive: see common/ranks.py
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn


def average_gradients(model: nn.Module) -> None:
    """Replace the `.grad` of every parameter by its mean over all ranks. All ranks call it together."""
    # solution
    for parameter in model.parameters():  # gives a tied weight once
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
    # task: raise NotImplementedError("average_gradients")
    # end


def main() -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images).float() / 16, torch.tensor(labels)

    torch.manual_seed(0)  # the same weights on every rank
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    share = 240 // world_size
    for step in range(100):
        mine = (torch.arange(share) + step * 240 + rank * share) % len(images)
        loss = F.cross_entropy(model(images[mine]), labels[mine])
        loss.backward()
        average_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and step % 20 == 19:
            print(f"step {step + 1:3}  loss of rank 0 {loss.item():.3f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
