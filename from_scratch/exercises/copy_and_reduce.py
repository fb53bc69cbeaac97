# exercise 1: f and g: the two functions of tensor parallelism
"""Cut two linear layers among the ranks, and let gradients come out right.

    torchrun --nproc-per-node=2 from_scratch/exercises/tasks/copy_and_reduce.py     # output and gradients, two ways

Megatron-LM (https://arxiv.org/abs/1909.08053) cuts the first of two layers by its outputs (column-parallel) and the
second by its inputs (row-parallel). A rank computes some of the neurons in between, from the whole input, and with them
a part of the output: the whole output is a sum over the ranks. Two functions stand at the ends:

    f   before the first layer: the input goes to all ranks as it is
    g   after the second layer: the parts of the output are summed over the ranks

Autograd does not know that there are other ranks; you say what happens backward. Two sentences are enough:

- The input is *one* tensor, used by n ranks. Its gradient is the sum of what each use of it gives.
- The output is *one* tensor too, and every rank goes on with it alike. So each already has its whole gradient.

An all-reduce in both backward passes looks harmless, and its first loss is right: but gradients are n times too large,
which Adam hides. Graded at 2, 3 and 4 ranks against one process with the whole layers, to 1e-12 in fp64: the output,
the gradients of the input and of both weights, and the number of all-reduces. Never change a tensor that autograd
hands to you: it may be in use elsewhere.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class CopyToRanks(torch.autograd.Function):
    """f. The input is the same on all ranks; the gradient that comes back is this rank's."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        # solution
        return x.view_as(x)
        # task: raise NotImplementedError("CopyToRanks.forward")
        # end

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # solution
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total
        # task: raise NotImplementedError("CopyToRanks.backward")
        # end


class ReduceFromRanks(torch.autograd.Function):
    """g. The input is this rank's part of a sum; the gradient that comes back is the same on all ranks."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        # solution
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total
        # task: raise NotImplementedError("ReduceFromRanks.forward")
        # end

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # solution
        return gradient
        # task: raise NotImplementedError("ReduceFromRanks.backward")
        # end


def parallel_layers(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """`F.linear(F.gelu(F.linear(x, W1)), W2)`, whole on all ranks, from this rank's pieces of W1 and W2.

    x: (batch, in), the same on all ranks. first: (neurons / n, in), rows of W1; second: (out, neurons / n), the columns
    of W2 that belong to the same neurons.
    """
    # solution
    hidden = F.gelu(F.linear(CopyToRanks.apply(x), first))
    return ReduceFromRanks.apply(F.linear(hidden, second))
    # task: raise NotImplementedError("parallel_layers")
    # end


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    x = torch.randn(2, 3, requires_grad=True)
    pieces = torch.randn(12, 3), torch.randn(4, 12)
    F.linear(F.gelu(F.linear(x, pieces[0])), pieces[1]).sum().backward()
    alone, x.grad = x.grad, None
    rank, n = dist.get_rank(), dist.get_world_size()
    parallel_layers(x, pieces[0].chunk(n, 0)[rank], pieces[1].chunk(n, 1)[rank]).sum().backward()
    print(f"rank {rank}: the gradient of x, by one process and by {n}:\n{alone}\n{x.grad}\n", end="")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
