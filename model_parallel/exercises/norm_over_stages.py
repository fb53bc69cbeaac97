# exercise 4: One norm over all stages
"""What pipeline stages have to settle before the optimizer steps: a weight that two of them have, and the norm.

    torchrun --nproc-per-node=3 model_parallel/exercises/tasks/norm_over_stages.py     # the norm, and the tied weight

Stages need nothing from each other to step: each has the gradients of its own layers. With two exceptions.

**A tied weight.** The first stage has the embedding, the last one the head, and if they are tied, that is one weight in
two places. Each stage's gradient holds what its own use of it gave. The weight's gradient is the sum, and both must
have it: then both copies take the same step, and stay equal for ever. The stages between have nothing to do with it,
and are in no message about it.

**The norm.** Clipping scales all gradients by max_norm / norm, if that is below 1, and the norm is that of *all*
gradients of the model. A stage that clips by its own norm changes the direction of the step, and only now and then,
which is hard to find. Squares add up over stages, norms do not; and a weight that is there twice counts once.

Write `finish_gradients`. From torch: `get_total_norm(gradients)`, the norm of a list, and `clip_grads_with_norm_(
parameters, max_norm, norm)`, which scales. Graded at 2 and 3 stages against `clip_grad_norm_` in one process, to 1e-12
in fp64: norm and gradients, clipped and not; and the messages: two on the first and last stage, one on others.
"""

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists, which it would keep alive: see common/ranks.py
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def finish_gradients(
    stage: nn.Module, tied: nn.Parameter | None, first_and_last: dist.ProcessGroup, max_norm: float
) -> Tensor:
    """Sum the tied gradient, clip all gradients in place; returns the norm before, of the whole model: a scalar.

    stage: the layers of this rank, which is the stage of that number; every parameter has a gradient. tied: the
    parameter of `stage` that the first and the last stage both have; None on stages between. first_and_last: a group of
    those two.
    """
    # solution
    if tied is not None:
        dist.all_reduce(tied.grad, group=first_and_last)
    counted_elsewhere = tied if dist.get_rank() > 0 else None
    gradients = [parameter.grad for parameter in stage.parameters() if parameter is not counted_elsewhere]
    square = get_total_norm(gradients) ** 2
    dist.all_reduce(square)
    norm = square.sqrt()
    clip_grads_with_norm_(stage.parameters(), max_norm, norm)
    return norm
    # task: # First the sum of the tied weight's gradient, then the norm: why in this order?
    # task: raise NotImplementedError("finish_gradients")
    # end


def main() -> None:
    dist.init_process_group("gloo")
    rank, n = dist.get_rank(), dist.get_world_size()
    first_and_last = dist.new_group([0, n - 1])  # all ranks must call it
    torch.manual_seed(rank)
    stage = nn.Sequential(nn.Embedding(5, 4) if rank in (0, n - 1) else nn.Identity(), nn.Linear(4, 4))
    for parameter in stage.parameters():
        parameter.grad = torch.randn_like(parameter)
    tied = stage[0].weight if rank in (0, n - 1) else None
    norm = finish_gradients(stage, tied, first_and_last, max_norm=1.0)
    print(
        f"rank {rank}: norm {norm:.6f}, sum of the tied gradient {0 if tied is None else tied.grad.sum():.6f}\n", end=""
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
