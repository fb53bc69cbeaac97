# exercise 4: Evaluate together
"""A validation set that the ranks cannot share evenly, and a model that no rank can call alone.

    torchrun --nproc-per-node=3 fsdp/exercises/tasks/evaluate_together.py       # the loss of one process, and an end

With DDP each rank may evaluate as many batches as it likes: a forward sends nothing. A forward of a sharded model
gathers parameters, block by block, and all ranks that share them have to be there. If rank 0 has 4 batches and rank 1
has 3, rank 0 waits in its fourth for ever. The usual ways out are wrong each in their own way:

- to drop what is left over loses samples, other ones at each number of ranks;
- to fill up the shares with samples that some other rank has counts these twice;
- to let rank 0 evaluate alone hangs at once.

What is right: ranks with fewer batches join in, with something that does not count. And the mean is that over all
samples: losses are summed, counts are summed, and divided is once, at the end.

Write `evaluate`. Graded at 2 and 3 ranks, against one process to 1e-12 in fp64, also with fewer samples than ranks:
the mean loss, how often each rank calls the model, and with how many samples.
"""

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists, which it would keep alive: see common/ranks.py
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

IGNORED = -100


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Tensor, targets: Tensor, batch_size: int) -> float:
    """The mean loss over all samples, the same on all ranks; each rank computes a share of them.

    inputs: (samples, 8) and targets: (samples,) int64, at least one sample, the same on all ranks. model(inputs of at
    most batch_size samples) gives logits (samples, classes), and communicates. `F.cross_entropy(…,
    ignore_index=IGNORED)` leaves out targets of -100.
    """
    # solution
    rank, n = dist.get_rank(), dist.get_world_size()
    mine = torch.arange(len(targets))[rank::n]
    longest = -(-len(targets) // n)  # the share of rank 0
    total = torch.zeros(2, dtype=torch.float64)  # loss, samples
    for start in range(0, longest, batch_size):
        part = mine[start : start + batch_size]
        x, y = inputs[part], targets[part]
        if len(part) == 0:  # the others have one batch more: this rank takes part in it
            x, y = inputs[:1], torch.full_like(targets[:1], IGNORED)
        total[0] += F.cross_entropy(model(x), y, ignore_index=IGNORED, reduction="sum")
        total[1] += len(part)
    dist.all_reduce(total)
    return (total[0] / total[1]).item()
    # task: # How many batches has the rank with most of them? What do the others do meanwhile?
    # task: raise NotImplementedError("evaluate")
    # end


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    inputs, targets = torch.randn(25, 8), torch.randint(0, 3, (25,))
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    alone = F.cross_entropy(model(inputs), targets).item()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    loss = evaluate(model, inputs, targets, batch_size=4)
    print(f"rank {dist.get_rank()}: mean loss {loss:.6f}, by one process {alone:.6f}\n", end="")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
