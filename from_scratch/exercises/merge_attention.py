# exercise 5: Merge two parts of an attention
"""Softmax over keys that are not in one place: the core of ring attention, and of FlashAttention.

    torchrun --nproc-per-node=2 from_scratch/exercises/tasks/merge_attention.py

The sequence is cut among the ranks, and each query must see the keys and values of all. They travel around a ring
(https://arxiv.org/abs/2310.01889), and each query gets its attention in parts. A softmax is no sum: each part is
divided by the sum of exponentials of *its own* scores. But when a part comes with the logarithm of that sum,

    output = sum over its keys of exp(score) value / exp(log_sum),     log_sum = log(sum over its keys of exp(score))

then two parts can be merged, exactly: the output of both together, and its log_sum, so that the result is a part again.

Write `merge`. Three things are to be had in mind:

- A score of 800 is allowed, and exp(800) is infinite. Never compute exp of a log_sum, only of a difference of two.
- A query may see nothing of a part, because all its keys lie in the future: output 0, log_sum minus infinity. Merged
  with it, the other part stays as it is, without a nan.
- Both parts may be such: then so is the result.

Graded on merges in one process, and in a causal ring attention (below, done) at 2, 3 and 4 ranks, against the softmax
over all keys, to 1e-12 in fp64. (Training needs a backward as well; it takes the keys around the ring once more.)
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys, and the logarithm of its sum of exponentials; 0 and -inf where none is visible.

    query: (queries, size), key and value: (keys, size), visible: (queries, keys) bool → (queries, size), (queries,)
    """
    scores = (query @ key.T / math.sqrt(query.shape[1])).masked_fill(~visible, -math.inf)
    return scores.softmax(1).nan_to_num(0) @ value, scores.logsumexp(1)


def merge(output: Tensor, log_sum: Tensor, other: Tensor, other_log_sum: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over the keys of both parts, and its log_sum. Outputs: (queries, size); log_sums: (queries,)."""
    # solution
    both = torch.logaddexp(log_sum, other_log_sum)  # subtracts the larger one before it takes exponentials
    # Each part was divided by its own sum, and now has to be by that of both. -inf - -inf is nan: here nothing is 0.
    mine, theirs = ((part - both).exp().nan_to_num(0).unsqueeze(1) for part in (log_sum, other_log_sum))
    return mine * output + theirs * other, both
    # task: # In plain numbers: what must each output be multiplied by?
    # task: raise NotImplementedError("merge")
    # end


def ring_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of a sequence that is cut among the ranks, in order: all (sequence / n, size), this rank's."""
    rank, n, length = dist.get_rank(), dist.get_world_size(), len(query)
    output, log_sum = torch.zeros_like(query), torch.full_like(query[:, 0], -math.inf)
    travelling = torch.stack((key, value))
    mine = torch.arange(length) + rank * length
    for step in range(n):
        positions = torch.arange(length) + (rank - step) % n * length  # whose keys these are
        part = attend(query, *travelling, visible=positions <= mine.unsqueeze(1))
        output, log_sum = merge(output, log_sum, *part)
        received = torch.empty_like(travelling)
        around = [(dist.isend, travelling, (rank + 1) % n), (dist.irecv, received, (rank - 1) % n)]
        for request in dist.batch_isend_irecv([dist.P2POp(*call) for call in around]):
            request.wait()
        travelling = received
    return output


def main() -> None:
    dist.init_process_group("gloo")
    rank, n = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 4 * n, 8, dtype=torch.float64)
    whole, _ = attend(query, key, value, torch.ones(4 * n, 4 * n, dtype=torch.bool).tril())
    found = ring_attention(*(part.chunk(n)[rank] for part in (query, key, value)))
    print(f"rank {rank}: off by {(found - whole.chunk(n)[rank]).abs().max():.1e}\n", end="")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
