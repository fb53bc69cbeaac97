# exercise 6: Lab: overlap by hand
"""The loss falls, but something is wrong.

    torchrun --nproc-per-node=2 ddp/exercises/tasks/lab_overlap_by_hand.py

Someone wrote data parallelism by hand, and cleverly: hooks average each gradient as soon as backward has
computed it, and with gradient accumulation only the last micro-batch communicates. The loss falls on every
rank. It is as fast as DDP. It passed its test, which had one micro-batch per step.

How to look: do not read the code first. What must be true of data parallelism after any number of steps,
whatever the data? Measure it after 1 step, and with 1, 2 and 4 micro-batches: compute one number from the
parameters on each rank (their sum, say), and print it with all its digits. Then ask of every tensor that
travels what it holds at that moment.

Repair `train`; keep what is good about it, that a step communicates each gradient once. The check compares
the ranks' weights with each other and with those of one process (1e-12 in fp64), and counts what travels.
Leave `build_model` and `global_batch` as they are.
"""

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists, which it would keep alive: see common/ranks.py
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

IMAGES, LABELS = (torch.from_numpy(array) for array in load_digits(return_X_y=True))


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).double()


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    """The images (96, 64) and labels (96,) of a step."""
    chosen = torch.arange(step * 96, step * 96 + 96) % len(LABELS)
    return IMAGES[chosen] / 16, LABELS[chosen]


def train(steps: int, micro_batches: int, learning_rate: float = 0.5) -> tuple[nn.Module, list[float]]:
    """SGD with each rank's share of a batch cut into `micro_batches`; the model and this rank's losses."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = build_model()
    is_last = False  # of the micro-batches of a step: now we communicate

    # solution
    # A tensor hook sees the gradient of *this* backward; what earlier micro-batches left in .grad never
    # travelled. The hook of the parameter comes after the gradient was added to .grad, and sees the sum.
    def average(parameter: nn.Parameter) -> None:
        if is_last:
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(average)
    # task: def average(gradient: Tensor) -> Tensor:
    # task:     if is_last:
    # task:         gradient = gradient.clone()
    # task:         dist.all_reduce(gradient)
    # task:         gradient /= world_size
    # task:     return gradient
    # task:
    # task: for parameter in model.parameters():
    # task:     parameter.register_hook(average)
    # end

    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    losses = []
    for step in range(steps):
        images, labels = (part.chunk(world_size)[rank] for part in global_batch(step))
        parts = list(zip(images.chunk(micro_batches), labels.chunk(micro_batches), strict=True))
        total = 0.0
        for index, (some_images, some_labels) in enumerate(parts):
            is_last = index == micro_batches - 1
            loss = F.cross_entropy(model(some_images), some_labels) / micro_batches
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        if rank == 0 and step % 10 == 9:
            print(f"step {step + 1:3}  loss {total:.3f}")
    return model, losses


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train(steps=50, micro_batches=4)
    dist.barrier()
    dist.destroy_process_group()
