# exercise 1: Scale the step
"""What must `training_step` return, so that the Trainer steps with the gradient of the global batch?

    make grade M=lightning ARGS="scale_the_step"

What is wanted is the gradient of the *mean over all valid tokens of the global batch*: those of all ranks and all
micro-batches of a step. Padding and prompts are not valid (-100 among the targets), so micro-batches differ in how many
tokens they have; one of them may have none at all. `training_step` sees one micro-batch at a time. How many valid
tokens the whole step has, on all ranks, is known to the loader, which made the batch; here it says so in each
micro-batch.

What happens to the loss that you return (`lightning/train.py` lives with the same; `deepspeed/who_divides.py` measures
it):

- the Trainer divides it by `accumulate_grad_batches`, and calls backward. It does so in every micro-batch: also at the
  end of an epoch, where a step may have fewer of them than that;
- gradients of the micro-batches add up, and DDP takes their *mean* over the ranks.

A plain `return F.cross_entropy(…)`, a mean, is right as long as all micro-batches have equally many tokens, and the
epoch ends with a whole step.

Write `training_step`. Graded on 2 and 3 ranks: weights after SGD's steps against those of one process which has the
whole batches, to 1e-12 in fp64.
"""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

IGNORED = -100


class Lesson(LightningModule):
    """A classifier of tokens, trained with SGD."""

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.model, self.learning_rate = model, learning_rate

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), self.learning_rate)

    def training_step(self, batch: tuple[Tensor, Tensor, int], batch_idx: int) -> Tensor:
        """The loss of a micro-batch, as the Trainer is to have it.

        batch: inputs (tokens, 8), targets (tokens,) int64, and the number of valid tokens of this step, on all ranks
        and in all micro-batches. self.model(inputs) gives logits (tokens, classes).
        """
        inputs, targets, tokens_of_step = batch
        # solution
        loss_sum = F.cross_entropy(self.model(inputs), targets, ignore_index=IGNORED, reduction="sum")
        # DDP takes the mean over ranks where the sum is wanted; the Trainer divides by the accumulation, always.
        factor = self.trainer.world_size * self.trainer.accumulate_grad_batches
        return loss_sum * factor / tokens_of_step
        # task: # A sum of losses, times what? self.trainer knows its world_size and its accumulate_grad_batches.
        # task: raise NotImplementedError("training_step")
        # end
