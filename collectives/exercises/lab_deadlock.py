# exercise 4: Lab: it has run for weeks
"""The loss falls, and then somebody changes a number, and it hangs.

    torchrun --nproc-per-node=2 collectives/exercises/tasks/lab_deadlock.py

This script averages gradients with sends and receives of its own. It runs on 2 ranks. On 3 ranks it hangs, at the very
first step. And on 2 ranks it hangs as well when somebody makes use of the early stop, `train(steps=50, target=0.1)`.

How to look: do not read the code first. A hang is a question with a short answer: in which line does each rank wait,
and for whom? The grader tells you; in your own jobs `py-spy dump --pid` does, or the flight recorder
(collectives/debugging.md). Write down rank by rank what it waits for. Either the waiting goes around in a circle, or
somebody never comes.

Repair `sum_over_ranks` and `train`. A repair that runs but means something else does not pass: gradients are the mean
over all ranks, and all ranks stop together, after the first step in which *every* rank's loss is below the target.
Leave `build_model` and `my_share` as they are.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def my_share(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Inputs (16, 8) of three kinds, and the kinds (16,): the first value is large, or the second, or the third."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    kinds = torch.randint(0, 3, (16,), generator=generator)
    return torch.randn(16, 8, generator=generator).double() / 2 + 3 * F.one_hot(kinds, 8), kinds


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of all ranks' tensors, on all ranks; the argument stays as it is."""
    rank, n = dist.get_rank(), dist.get_world_size()
    # solution
    # The pairs met in another order on each rank: 0 waited for 1, 1 for 2, and 2 for 0. In a batch there is no order.
    parts = [tensor if peer == rank else torch.empty_like(tensor) for peer in range(n)]
    batch = [
        dist.P2POp(call, tensor if call is dist.isend else parts[peer], peer)
        for peer in range(n)
        for call in (dist.isend, dist.irecv)
        if peer != rank
    ]
    for request in dist.batch_isend_irecv(batch):
        request.wait()
    return torch.stack(parts).sum(0)  # in the same order on all ranks: the same bits
    # task: total = tensor.clone()
    # task: for distance in range(1, n):
    # task:     peer, received = (rank + distance) % n, torch.empty_like(tensor)
    # task:     if rank < peer:  # if both sent first, both would wait
    # task:         dist.send(tensor, peer)
    # task:         dist.recv(received, peer)
    # task:     else:
    # task:         dist.recv(received, peer)
    # task:         dist.send(tensor, peer)
    # task:     total += received
    # task: return total
    # end


def all_agree(mine: bool) -> bool:
    """Whether `mine` is true on all ranks. All of them must call it."""
    answer = torch.tensor(int(mine))
    dist.all_reduce(answer, op=dist.ReduceOp.MIN)
    return bool(answer)


def train(steps: int, target: float) -> tuple[nn.Module, list[float]]:
    """SGD until all ranks' losses are below `target`, for `steps` steps at most; the model and this rank's losses."""
    rank, n = dist.get_rank(), dist.get_world_size()
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses: list[float] = []
    for step in range(steps):
        inputs, kinds = my_share(step, rank)
        loss = F.cross_entropy(model(inputs), kinds)
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = sum_over_ranks(parameter.grad) / n
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if rank == 0 and step % 10 == 9:
            print(f"step {step + 1:3}  loss {loss.item():.3f}")
        # solution
        # `and` does not look at its right side when the left one is false: the ranks above the target went on to
        # the next step. Everybody asks, always.
        if all_agree(loss.item() < target):
            break
        # task: if loss.item() < target and all_agree(True):
        # task:     break
        # end
    return model, losses


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train(steps=50, target=0.0)
    dist.barrier()
    dist.destroy_process_group()
