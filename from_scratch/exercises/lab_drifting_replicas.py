# exercise 7: Lab: drifting replicas
"""The loss falls, but something is wrong.

    torchrun --nproc-per-node=2 from_scratch/exercises/tasks/lab_drifting_replicas.py

Data parallelism by hand, in its best form: every gradient is a view into one flat tensor, so nothing needs to be
copied, and a single all-reduce, started by the last hook while backward ends, serves them all. It passed its
test, which compared the weights after one step with those of one process, to twelve digits, with and without
gradient accumulation. The loss falls on every rank. The model that comes out of it is as good as if there were but
one rank.

How to look: do not read the code first. Print, on every rank, one number made from the weights (their sum, say) with
all its digits, after every step. When do the ranks part? What has happened by then that had not before? Then ask two
tensors where they lie (`tensor.data_ptr()`): the one that travels, and the one that the optimizer reads.

Repair `train`; keep what is good about it, one all-reduce a step. The check compares the weights of the ranks with each
other, and with those of one process (1e-12 in fp64), and counts what travels. Leave `build_model` and `global_batch`
as they are.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    """Inputs (48, 8) of three kinds, and the kinds (48,): the first value is large, or the second, or the third."""
    generator = torch.Generator().manual_seed(step)
    kinds = torch.randint(0, 3, (48,), generator=generator)
    return torch.randn(48, 8, generator=generator).double() / 2 + 3 * F.one_hot(kinds, 8), kinds


def train(steps: int, micro_batches: int, learning_rate: float = 0.2) -> tuple[nn.Module, list[float]]:
    """SGD with each rank's share of a batch cut into `micro_batches`; the model and this rank's losses."""
    rank, n = dist.get_rank(), dist.get_world_size()
    model = build_model()
    parameters = list(model.parameters())
    flat = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)  # backward adds into .grad in place

    is_last, ready, works = False, 0, []

    def on_gradient(_: nn.Parameter) -> None:
        nonlocal ready
        if is_last:  # of the micro-batches: the others only add up
            ready += 1
            if ready == len(parameters):
                works.append(dist.all_reduce(flat, async_op=True))

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(on_gradient)

    optimizer = torch.optim.SGD(parameters, lr=learning_rate)
    losses = []
    for step in range(steps):
        inputs, kinds = (part.chunk(n)[rank] for part in global_batch(step))
        parts = list(zip(inputs.chunk(micro_batches), kinds.chunk(micro_batches), strict=True))
        total, ready = 0.0, 0
        for index, (some_inputs, some_kinds) in enumerate(parts):
            is_last = index == micro_batches - 1
            loss = F.cross_entropy(model(some_inputs), some_kinds) / micro_batches
            (loss / n).backward()  # the all-reduce sums
            total += loss.item()
        works.pop().wait()
        optimizer.step()
        # solution
        # By default .grad becomes None, and the next backward makes new tensors: the optimizer reads those, while the
        # all-reduce goes on with a flat tensor that nobody writes to or reads. Zeros leave the views where they are.
        optimizer.zero_grad(set_to_none=False)
        # task: optimizer.zero_grad()
        # end
        losses.append(total)
        if rank == 0 and step % 10 == 9:
            print(f"step {step + 1:3}  loss {total:.3f}")
    return model, losses


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train(steps=50, micro_batches=2)
    dist.barrier()
    dist.destroy_process_group()
