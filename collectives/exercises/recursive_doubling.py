# exercise 3: Small messages: recursive doubling
"""An all-reduce in log2 n messages: more bytes than the ring, but for short messages much sooner done.

    torchrun --nproc-per-node=4 collectives/exercises/tasks/recursive_doubling.py

The ring's 2 (n - 1) messages cost 2 (n - 1) times the latency, however short they are: on 64 ranks 126 of them for
a single number, such as a gradient norm. Recursive doubling needs six. In round k each rank swaps its *whole* tensor
with the rank whose number differs in bit k (`rank ^ 2**k` in Python), and both add what they got. After one round each
holds the sum of two ranks, then of four, then of eight …

With α seconds a message and β bytes a second, S bytes cost log2 n (α + S / β) this way, and 2 (n - 1) (α + S / (n β))
around a ring. From which size on is the ring faster on 4 ranks? Libraries switch between such algorithms by size.

Write `all_reduce`. On a number of ranks that is no power of two some ranks would have no partner: raise a ValueError
that names the number, on every rank and before anything is sent. (Libraries let the surplus ranks send to a partner
first, and get the result at the end.) Graded at 2, 3 and 4 ranks: the sum; that it has the same bits everywhere; the
number of messages and their bytes.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce(tensor: Tensor) -> None:
    """Sum `tensor` over all ranks, in place. All ranks call it, with equal shapes and types.

    Raises ValueError when the number of ranks is not a power of two.
    """
    # solution
    n, rank = dist.get_world_size(), dist.get_rank()
    if n & (n - 1):
        raise ValueError(f"recursive doubling on {n} ranks; expected a power of two; use a ring instead")
    received = torch.empty_like(tensor)
    distance = 1
    while distance < n:
        peer = rank ^ distance
        both = [dist.P2POp(dist.isend, tensor, peer), dist.P2POp(dist.irecv, received, peer)]
        for request in dist.batch_isend_irecv(both):
            request.wait()
        tensor += received  # not before both have ended: until then the tensor is being read
        distance *= 2
    # task: # Swap with dist.batch_isend_irecv: if both partners call dist.send first, both wait.
    # task: raise NotImplementedError("all_reduce")
    # end


def main() -> None:
    dist.init_process_group("gloo")
    tensor = torch.tensor([1, 10 * dist.get_rank()])
    all_reduce(tensor)
    print(f"rank {dist.get_rank()}: {tensor.tolist()}\n", end="")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
