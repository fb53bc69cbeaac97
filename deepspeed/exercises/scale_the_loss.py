# exercise 2: Scale the loss
"""What must stand before a loss, so that DeepSpeed's engine steps with the gradient of the global batch?

    make grade M=deepspeed ARGS="scale_the_loss"

What is wanted is the gradient of the *mean over all valid tokens of the global batch*: those of all ranks and all
micro-batches. It must not matter who has how many of them. Padding and prompts are not valid (-100 among the targets),
so the micro-batches of real data differ; one of them may have no valid token at all.

What the engine does to the loss that it is given:

- `engine.backward(loss)` divides it by the number of micro-batches (`gradient_accumulation_steps`), adds the gradients
  of the micro-batches up, and takes the *mean* over the ranks;
- `engine.backward(loss, scale_wrt_gas=False)` leaves out the first division, and nothing else.

Both are right for somebody: the first for a mean per micro-batch, all equally large; the second for a script that
divides by itself. With the factor that belongs to it each gives the same gradient. `deepspeed/who_divides.py` measures
the same for DDP, Lightning and Trainer.

Write `train_step`. Graded on 2 and 3 ranks, in stages 1 to 3 and in both ways: the gradient that the engine's optimizer
steps with against that of one process which has the whole batch, to 1e-5 (DeepSpeed has no fp64).
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def train_step(engine: Any, micro_batches: list[tuple[Tensor, Tensor]], scale_wrt_gas: bool) -> None:
    """One optimizer step on this rank's micro-batches; hands `scale_wrt_gas` on to `engine.backward`.

    inputs: (tokens, 8) and targets: (tokens,) int64, where IGNORED does not count; all ranks have equally many
    micro-batches. engine(inputs) gives logits (tokens, classes); engine.step() is to be called after every backward,
    and acts on the last.
    """
    # solution
    count = torch.stack([(targets != IGNORED).sum() for _, targets in micro_batches]).sum()
    dist.all_reduce(count)  # the valid tokens of the global batch, before the first backward
    factor = dist.get_world_size() / count.item()  # the engine takes the mean over ranks where the sum is wanted
    if scale_wrt_gas:
        factor *= len(micro_batches)  # which it is going to divide by
    for inputs, targets in micro_batches:
        loss_sum = F.cross_entropy(engine(inputs), targets, ignore_index=IGNORED, reduction="sum")
        engine.backward(loss_sum * factor, scale_wrt_gas=scale_wrt_gas)
        engine.step()
    # task: # A sum of losses in each micro-batch; what stands before it? Who knows how many tokens there are in all?
    # task: raise NotImplementedError("train_step")
    # end
