# exercise 6: The loss of logits that nobody holds
"""Cross-entropy over a vocabulary that is cut among the ranks, with three numbers a token.

    torchrun --nproc-per-node=2 from_scratch/exercises/tasks/vocabulary_parallel_loss.py

Under tensor parallelism each rank has the logits of its part of the vocabulary. To gather them would send, and keep,
batch × sequence × vocabulary numbers: the largest tensor of the whole model. The loss of a token needs much less:

    loss = log(sum over the vocabulary of exp(logit)) - logit of the target

Both terms are sums over ranks of something that each can compute alone, and against overflow one more number: the
largest logit, over *all* ranks, subtracted from every logit. It cancels, so it needs no gradient. The target's logit
belongs to one rank; the others contribute 0.

Write `parallel_loss` with three all-reduces of one number a token. `sum_over_ranks` is a sum through which gradients
flow (g of tensor parallelism); for the maximum `dist.all_reduce(…, op=dist.ReduceOp.MAX)` will do. Graded at 2, 3 and 4
ranks against one process with all logits, to 1e-12 in fp64: the loss, the gradient of this rank's logits, and the bytes
that travel; also with logits of ten thousands, and with targets of -100, which do not count.
"""

import torch
import torch.distributed as dist
from torch import Tensor

IGNORED = -100


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient  # whole on every rank already


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of all ranks' x, the same on all ranks; each rank's x gets its gradient."""
    return _SumOverRanks.apply(x)


def parallel_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of the losses of all tokens whose target is not -100: a scalar, the same on all ranks.

    logits: (tokens, vocabulary / n): rank r has columns r * vocabulary / n and following. targets: (tokens,) int64,
    over the whole vocabulary, the same on all ranks.
    """
    # solution
    largest = logits.detach().amax(1)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    shifted = logits - largest.unsqueeze(1)
    total = sum_over_ranks(shifted.exp().sum(1))
    column = targets - dist.get_rank() * logits.shape[1]
    is_mine = (column >= 0) & (column < logits.shape[1])  # never for -100: columns of the ranks begin at 0
    own = shifted.gather(1, (column * is_mine).unsqueeze(1)).squeeze(1)
    of_target = sum_over_ranks(own * is_mine)
    return ((total.log() - of_target) * (targets != IGNORED)).sum()
    # task: # The largest logit, the sum of exponentials, the target's logit: what has each rank to say about them?
    # task: raise NotImplementedError("parallel_loss")
    # end


def main() -> None:
    dist.init_process_group("gloo")
    rank, n = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 12), torch.tensor([0, 5, IGNORED, 11])
    alone = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    found = parallel_loss(logits.chunk(n, 1)[rank], targets)
    print(f"rank {rank}: loss {found.item():.6f}, by one process {alone.item():.6f}\n", end="")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
