# exercise 2: Share the sequence
"""Context parallelism: who takes which tokens, so that causal attention is the same work for all?

    torchrun --nproc-per-node=2 model_parallel/exercises/tasks/share_the_sequence.py    # positions, and pairs computed

A token looks at those before it. If rank 0 of n has the first part of the sequence and rank n - 1 the last, the last
rank's queries see all keys, and those of rank 0 an n-th of them at most; all wait for the last. The remedy is to cut
the sequence into 2n pieces and give each rank two: one from the beginning, and one from the end, chosen so that all
ranks see equally much.

Keys and values are gathered: n ranks, each with two pieces, in the order of the *ranks*. They have to be brought into
the order of the *sequence*. Then each of a rank's two pieces looks at the keys up to its own end. What lies behind is
left out, not masked: a masked pair has been computed as well, and all would be in vain.

Write the two functions. `look` is given: attention of a piece over the keys up to its own last one. For gathering,
`all_gather_single_autograd(x, 0, dist.group.WORLD)` puts all ranks' x one after the other along the first dimension,
and hands gradients back to where they belong. Graded at 2 and 3 ranks against one process, to 1e-12 in fp64: output and
gradients of query, key and value; the pairs of query and key that each rank computes; one gathering forward, and one
reduce-scatter backward.
"""

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists, which it would keep alive: see common/ranks.py
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._functional_collectives import all_gather_single_autograd


def my_positions(length: int, rank: int, n: int) -> Tensor:
    """The positions that `rank` of n holds of a sequence: (length / n,) int64, two pieces of it, the earlier one first.

    length: a multiple of 2n. Together the ranks hold each position once.
    """
    # solution
    pieces = torch.arange(length).chunk(2 * n)
    return torch.cat((pieces[rank], pieces[2 * n - 1 - rank]))
    # task: # Two of 2n pieces: what do they have to add up to?
    # task: raise NotImplementedError("my_positions")
    # end


def look(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of the last positions of a sequence: query (batch, heads, q, size); key, value (batch, heads, k, size).

    The queries are those of the last q of k positions: query number i sees the keys 0 … k - q + i.
    """
    q, k = query.shape[2], key.shape[2]
    mask = torch.ones(q, k, dtype=torch.bool).tril(k - q)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention over the whole sequence; all are (batch, heads, length / n, size), of `my_positions`."""
    # solution
    rank, n = dist.get_rank(), dist.get_world_size()
    gathered = all_gather_single_autograd(torch.stack((key, value)), 0, dist.group.WORLD)
    early, late = gathered.unflatten(0, (n, 2)).chunk(2, dim=-2)  # (rank, key or value, batch, heads, piece, size)
    keys, values = torch.cat((*early, *late.flip(0)), dim=-2)  # the late pieces are those of the ranks n - 1 … 0
    outputs = []
    for queries, piece in zip(query.chunk(2, dim=2), (rank, 2 * n - 1 - rank), strict=True):
        seen = (piece + 1) * queries.shape[2]
        outputs.append(look(queries, keys[:, :, :seen], values[:, :, :seen]))
    return torch.cat(outputs, dim=2)
    # task: # Gather keys and values (in one message), put them in order, then look with each of the two pieces.
    # task: raise NotImplementedError("attend")
    # end


def main() -> None:
    dist.init_process_group("gloo")
    rank, n = dist.get_rank(), dist.get_world_size()
    mine = my_positions(12, rank, n)
    torch.manual_seed(0)
    whole = torch.randn(3, 1, 2, 12, 4)
    alone = F.scaled_dot_product_attention(*whole, is_causal=True)[:, :, mine]
    found = attend(*whole[:, :, :, mine])
    pairs = (mine + 1).sum().item()
    line = f"positions {mine.tolist()}, which see {pairs} of {12 * 13 // 2} pairs"
    print(f"rank {rank}: {line}; off by {(found - alone).abs().max():.1e}\n", end="")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
