# exercise 1: Broadcast by a tree
"""Broadcast in log2 n rounds instead of n - 1, from sends and receives.

    torchrun --nproc-per-node=4 collectives/exercises/tasks/tree_broadcast.py

A root that sends to one rank after the other needs n - 1 rounds: all messages leave through its link, and the links
of the others are idle. But a rank that has the tensor can pass it on. After one round two ranks have it, after the
next one four, then eight …

Number the ranks from the root: 0 is the root itself, 1 the rank after it, around the end of the list if need be. In
round k the ranks below 2^k send to the ranks 2^k above them, where there is one. So any rank can be the root, and n
need not be a power of two.

Write `tree_broadcast` with `dist.send(tensor, dst)` and `dist.recv(tensor, src)`. Graded at 2, 3 and 4 ranks, from
every root: that all ranks hold the root's tensor, that n - 1 messages were sent, and that they need no more than
ceil(log2 n) rounds when a rank sends or receives one message in a round.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def tree_broadcast(tensor: Tensor, root: int) -> None:
    """Replace `tensor`, in place, by that of rank `root`. All ranks call it, with equal shapes and types."""
    # solution
    n = dist.get_world_size()
    number = (dist.get_rank() - root) % n  # counted from the root
    have = 1  # so many ranks, those with the lowest numbers, have the tensor
    while have < n:
        if number < have and number + have < n:
            dist.send(tensor, (number + have + root) % n)
        elif have <= number < 2 * have:
            dist.recv(tensor, (number - have + root) % n)
        have *= 2
    # task: # In each round: do I send, do I receive, or neither? To whom, or from whom?
    # task: raise NotImplementedError("tree_broadcast")
    # end


def main() -> None:
    dist.init_process_group("gloo")
    rank, n = dist.get_rank(), dist.get_world_size()
    for root in range(n):
        tensor = torch.tensor([10 * rank])
        tree_broadcast(tensor, root)
        print(f"rank {rank}: {tensor.item()} from rank {root}, {10 * root} expected\n", end="")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
