# exercise 2: Reduce-scatter and all-gather around a ring
"""The two halves of an all-reduce, each in n - 1 messages of 1/n of the tensor.

    torchrun --nproc-per-node=3 collectives/exercises/tasks/ring_reduce_scatter.py

The tensor is cut into n chunks. In the first half the chunks travel around the ring of ranks, and each rank adds its
own part to what comes by. After n - 1 steps a chunk has seen everybody, and is the whole sum; choose where each one
starts so that on rank r this is chunk r. That is a reduce-scatter, and FSDP stops here. In the second half the whole
chunks travel once more, and each rank keeps a copy: an all-gather. Both together are an all-reduce, in which every
rank sends 2 (n - 1) / n of the tensor: no way to do it needs fewer bytes.

Write the two halves; `pass_on` is there. Draw it for three ranks first: which chunk leaves rank r in step s, and which
one arrives? Graded at 2, 3 and 4 ranks, with sizes that n does not divide and with fewer elements than ranks: the sums,
to whom messages go, how many, and their bytes.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def pass_on(gone: Tensor, come: Tensor) -> None:
    """Send `gone` to the next rank and fill `come` from the one before, both at once; empty tensors are not sent."""
    rank, n = dist.get_rank(), dist.get_world_size()
    calls = [(dist.isend, gone, (rank + 1) % n), (dist.irecv, come, (rank - 1) % n)]
    both = [dist.P2POp(call, tensor, peer) for call, tensor, peer in calls if tensor.numel()]
    for request in dist.batch_isend_irecv(both) if both else ():
        request.wait()


def ring_reduce_scatter(chunks: list[Tensor]) -> None:
    """Make chunks[rank] the sum of all ranks' chunks[rank]; the other chunks may hold anything afterwards.

    chunks: as many as ranks, 1-D, with the same sizes on all ranks. They are changed in place.
    """
    # solution
    n, rank = dist.get_world_size(), dist.get_rank()
    for step in range(n - 1):
        come = chunks[(rank - step - 2) % n]  # what leaves is what was added to in the step before
        received = torch.empty_like(come)
        pass_on(chunks[(rank - step - 1) % n], received)
        come += received
    # task: # The last chunk that arrives here must be chunk `rank`; so which one arrives in step s?
    # task: raise NotImplementedError("ring_reduce_scatter")
    # end


def ring_all_gather(chunks: list[Tensor]) -> None:
    """Fill every chunks[r], in place, with that of rank r. At first a rank has its own, and anything in the rest."""
    # solution
    n, rank = dist.get_world_size(), dist.get_rank()
    for step in range(n - 1):
        pass_on(chunks[(rank - step) % n], chunks[(rank - step - 1) % n])
    # task: raise NotImplementedError("ring_all_gather")
    # end


def all_reduce(tensor: Tensor) -> None:
    """Sum a contiguous tensor over all ranks, in place."""
    chunks = list(tensor.view(-1).tensor_split(dist.get_world_size()))  # views; sizes differ by one at most
    ring_reduce_scatter(chunks)
    ring_all_gather(chunks)


def main() -> None:
    dist.init_process_group("gloo")
    tensor = torch.arange(7) + 10 * dist.get_rank()
    before = tensor.tolist()
    all_reduce(tensor)
    print(f"rank {dist.get_rank()}: {before} → {tensor.tolist()}\n", end="")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
