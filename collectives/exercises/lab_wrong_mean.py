# exercise 5: Lab: a score that depends on the number of ranks
"""The loss falls, but something is wrong.

    torchrun --nproc-per-node=2 collectives/exercises/tasks/lab_wrong_mean.py

The training is right: its weights are the same on 1, 2 and 3 ranks, to twelve digits. But the validation loss that
belongs to them is another one on 3 ranks than on 2, and another one again with a different batch size. All ranks
agree on it, and nobody has noticed since the differences are small. It was found when two teams compared a result.

How to look: do not read the code first. Evaluate 24 samples in batches of 4 on 2 ranks, then 25 samples, then 1, each
time on one rank as well (`--nproc-per-node=1`). Where is the number right, and what is special there? Then ask of every
mean in `evaluate`: how many samples does it stand for? And of every sample: how often is it counted?

Repair `evaluate`. It is graded at 2 and 3 ranks against the mean over all samples in one process, to 1e-12, also where
there are fewer samples than ranks.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.data
from torch import Tensor, nn


def make_data(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs (samples, 8) of three kinds, and the kinds (samples,): the first value is large, or the second, …"""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, 3, (samples,), generator=generator)
    return torch.randn(samples, 8, generator=generator).double() / 2 + 3 * F.one_hot(kinds, 8), kinds


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Tensor, kinds: Tensor, batch_size: int) -> tuple[float, float]:
    """The mean loss and the accuracy over all samples, the same on all ranks; each rank computes a part of them.

    inputs: (samples, 8) and kinds: (samples,), at least one, the same on all ranks. batch_size: samples at a time.
    """
    # solution
    # Sums can be added up, means cannot; and what is left over goes to some ranks, instead of some samples to all.
    total = torch.zeros(3, dtype=torch.float64)
    for part in torch.arange(len(kinds))[dist.get_rank() :: dist.get_world_size()].split(batch_size):
        logits = model(inputs[part])
        loss = F.cross_entropy(logits, kinds[part], reduction="sum")
        total += torch.stack([loss, (logits.argmax(1) == kinds[part]).sum(), torch.tensor(len(part))])
    dist.all_reduce(total)
    return (total[0] / total[2]).item(), (total[1] / total[2]).item()
    # task: sampler = torch.utils.data.DistributedSampler(kinds, shuffle=False)
    # task: losses, accuracies = [], []
    # task: for part in torch.tensor(list(sampler)).split(batch_size):
    # task:     logits = model(inputs[part])
    # task:     losses.append(F.cross_entropy(logits, kinds[part]))
    # task:     accuracies.append((logits.argmax(1) == kinds[part]).double().mean())
    # task: means = torch.stack([torch.stack(losses).mean(), torch.stack(accuracies).mean()])
    # task: dist.all_reduce(means)
    # task: means /= dist.get_world_size()
    # task: return means[0].item(), means[1].item()
    # end


def main() -> None:
    dist.init_process_group("gloo")
    rank, n = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Linear(8, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    validation = make_data(99, seed=1)
    for step in range(50):
        inputs, kinds = (part.chunk(n)[rank] for part in make_data(48, seed=2 + step))
        F.cross_entropy(model(inputs), kinds).backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= n
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            loss, accuracy = evaluate(model, *validation, batch_size=10)
            if rank == 0:
                print(f"step {step + 1:3}  validation loss {loss:.6f}  accuracy {accuracy:.6f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
