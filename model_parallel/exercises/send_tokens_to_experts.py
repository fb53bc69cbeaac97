# exercise 3: Send tokens to their experts
"""Expert parallelism: tokens travel to the rank of their expert, as many as there are, and the results come back.

    torchrun --nproc-per-node=2 model_parallel/exercises/tasks/send_tokens_to_experts.py     # tokens by expert and rank

Of E experts rank r of n has E/n: the numbers r E/n and following. A router has chosen an expert for each token. How
many tokens go to which expert is known to each rank for its own tokens only, and is another number in every step.
Nothing shall be dropped, and nothing padded. So:

1. sort the tokens by expert; then they are sorted by rank, too;
2. an all-to-all of *counts*: each rank tells each other one how many tokens come for each of its experts;
3. an all-to-all of *tokens*, of the sizes that are known now. They arrive by rank of origin, and from each origin by
   expert;
4. every expert works on its tokens;
5. an all-to-all the way back, sizes exchanged, and the order in which the tokens were.

`all_to_all_single_autograd(x, receive, send, dist.group.WORLD)` sends rows of x: the first `send[0]` to rank 0, the
next `send[1]` to rank 1 and so on. It returns those that arrive, `receive[0]` of them from rank 0 and so on; both are
lists of int. It hands gradients back, by one more all-to-all, in which all ranks must take part: also one whose experts
got no token at all. For the counts, through which no gradient goes, there is `dist.all_to_all_single(output, input)`.

Write `apply_experts`. Graded at 2 and 3 ranks against one process, to 1e-12 in fp64: output, gradients of tokens and of
experts; the messages, and the rows in them; with ranks that have more tokens than others or none, and with one expert
that gets everything.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists, which it would keep alive: see common/ranks.py
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd


def apply_experts(tokens: Tensor, chosen: Tensor, experts: int, compute: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Each token's result from its expert: (tokens, width), in the order of `tokens`. All ranks call it.

    tokens: (tokens, width), of this rank; there may be none. chosen: (tokens,) int64, the number of each one's expert.
    experts: how many there are on all ranks, a multiple of n. compute(number, rows (any, width)) gives (any, width); it
    knows this rank's experts alone, and takes zero rows, too.
    """
    # solution
    rank, n = dist.get_rank(), dist.get_world_size()
    order = chosen.argsort(stable=True)
    going = torch.bincount(chosen, minlength=experts)
    coming = torch.empty_like(going)  # by rank of origin, then by expert of this rank
    dist.all_to_all_single(coming, going)
    send, receive = (counts.view(n, -1).sum(1).tolist() for counts in (going, coming))
    arrived = all_to_all_single_autograd(tokens[order], receive, send, dist.group.WORLD)
    own = torch.arange(experts).view(n, -1)[rank]
    expert = own.repeat(n).repeat_interleave(coming)  # of each row that has arrived
    results = torch.zeros_like(arrived)
    for number in own.tolist():  # with zero rows as well: a result without a graph would end backward here
        results[expert == number] = compute(number, arrived[expert == number])
    returned = all_to_all_single_autograd(results, send, receive, dist.group.WORLD)
    return returned[order.argsort()]
    # task: # Sort, send counts, send tokens, compute, send results, undo the sorting.
    # task: raise NotImplementedError("apply_experts")
    # end


def main() -> None:
    dist.init_process_group("gloo")
    experts = 2 * dist.get_world_size()
    torch.manual_seed(dist.get_rank())
    tokens, chosen = torch.randn(5, 3), torch.randint(0, experts, (5,))
    worked: list[str] = []

    def compute(number: int, rows: Tensor) -> Tensor:
        worked.append(f"expert {number}: {len(rows)} tokens")
        return rows * (number + 1)

    found = apply_experts(tokens, chosen, experts, compute)
    wrong = (found - tokens * (chosen.unsqueeze(1) + 1)).abs().max()
    print(f"rank {dist.get_rank()}: {', '.join(worked)}; off by {wrong:.1e}\n", end="")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
