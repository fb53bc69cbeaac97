# exercise 3: Accumulate correctly
"""Gradient accumulation with DDP: the right loss, and one communication a step.

The micro-batches of real text do not all hold the same number of valid targets: padding, and the prompt in
fine-tuning, are masked with -100. What one wants is the gradient of

    loss = sum of the losses of all valid tokens / number of valid tokens        (both over the global batch)

whatever the batch is cut into. A mean per micro-batch, averaged over micro-batches and ranks, is something
else: it gives a token in a short micro-batch more weight than one in a long micro-batch. And it is nan for a
micro-batch without any valid token.

Two facts about DistributedDataParallel:

- it *averages* gradients over the ranks, so the sum that you want arrives divided by the world size;
- it all-reduces in every backward, unless `with model.no_sync():` says otherwise. Whether a backward will
  communicate is decided in the *forward* that leads to it. Accumulated gradients need to travel only once,
  with the last one.

Write `accumulate`. Measured are: the gradient against one process with the whole batch (1e-12 in fp64, on 2
ranks and on 3), the returned loss, and how often DDP communicates: once per bucket and step.

    torchrun --nproc-per-node=2 ddp/exercises/tasks/accumulate_correctly.py     # equal losses, one all-reduce
"""

from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists, which it would keep alive: see common/ranks.py
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

IGNORED = -100


def accumulate(model: DistributedDataParallel, micro_batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Leave the gradient of the mean loss over the global batch's valid targets in `.grad`; return that mean.

    micro_batches: this rank's (inputs, targets), at least one; model(inputs) is (batch, classes), targets are
    (batch,) int64, -100 where there is nothing to predict. All ranks have equally many micro-batches. The
    result is the same scalar on all ranks, without a graph.
    """
    # solution
    valid = torch.stack([(targets != IGNORED).sum() for _, targets in micro_batches]).sum()
    dist.all_reduce(valid)  # of the global batch: once a step, and of one number
    total = torch.zeros((), dtype=torch.float64)
    for index, (inputs, targets) in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        with nullcontext() if is_last else model.no_sync():  # around the forward too
            loss = F.cross_entropy(model(inputs), targets, ignore_index=IGNORED, reduction="sum")
            (loss * dist.get_world_size() / valid).backward()  # DDP divides by the world size
        total += loss.detach()
    dist.all_reduce(total)
    return total / valid
    # task: # As one often sees it, wrong in three ways:
    # task: #     for inputs, targets in micro_batches:
    # task: #         loss = F.cross_entropy(model(inputs), targets, ignore_index=IGNORED)
    # task: #         (loss / len(micro_batches)).backward()
    # task: raise NotImplementedError("accumulate")
    # end


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(8, 4))
    calls = []

    def count(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        calls.append(bucket.index())
        return allreduce_hook(dist.group.WORLD, bucket)

    model.register_comm_hook(None, count)  # DDP calls it once for every bucket that it communicates
    torch.manual_seed(dist.get_rank())
    targets = [torch.tensor([1, 2, 3]), torch.tensor([IGNORED, IGNORED, 0])]
    loss = accumulate(model, [(torch.randn(3, 8), target) for target in targets])
    print(f"rank {dist.get_rank()}: loss {loss.item():.4f}, {len(calls)} all-reduce(s) by DDP\n", end="")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
