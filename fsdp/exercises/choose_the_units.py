# exercise 1: Choose the units
"""What `fully_shard` is called on decides how much is whole at a time, and how many messages a step takes.

    torchrun --nproc-per-node=2 fsdp/exercises/tasks/choose_the_units.py    # your units, and three steps

Each call of `fully_shard(module)` makes a *unit*: all parameters of the module that are in no unit yet. They are
gathered together, in one message, when the module's forward begins, and their gradients leave in one message. So

- the model alone is a single unit: everything is whole while anything computes, and nothing is gathered ahead;
- a unit for each block, then the model, which takes what is left: one block is whole at a time, and the rest;
- a parameter belongs to one unit. A weight that two modules share (the embedding and the head, here) must be in a
  unit that is whole during both: torch refuses it in two, in the first forward.

After its forward a unit is freed, and gathered again for backward. The root, called last, is an exception: it stays
whole until its backward is done. And there is one block of which it makes no sense to free it: which one does backward
need first? `fully_shard(module, reshard_after_forward=False)` keeps it.

Write `shard`. Graded at 2 and 3 ranks: the units, the weights after three steps against one process (1e-12 in fp64),
and the messages of a step: 2 L all-gathers and L + 1 reduce-scatters with L blocks.
"""

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists, which it would keep alive: see common/ranks.py
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(torch.tanh(self.up(hidden)))


class TiedModel(nn.Module):
    """Predicts a token from one token: (batch,) int64 to logits (batch, vocabulary)."""

    def __init__(self, vocabulary: int, width: int, blocks: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


def shard(model: TiedModel, mesh: DeviceMesh, learning_rate: float) -> torch.optim.Optimizer:
    """Shard `model` in place among the ranks of `mesh` (one axis); return an AdamW of what it then consists of."""
    # solution
    last = len(model.blocks) - 1
    for number, block in enumerate(model.blocks):
        fully_shard(block, mesh=mesh, reshard_after_forward=number < last)  # backward begins with the last
    fully_shard(model, mesh=mesh)  # with embedding, norm and head: both uses of the tied weight
    return torch.optim.AdamW(model.parameters(), lr=learning_rate)  # of the shards, so not before
    # task: # Which units, in which order? And when does the optimizer come?
    # task: raise NotImplementedError("shard")
    # end


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = TiedModel(vocabulary=12, width=8, blocks=3)
    optimizer = shard(model, mesh, learning_rate=0.1)
    units = [name or "the model" for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    tokens = torch.arange(12)
    for step in range(3):
        loss = F.cross_entropy(model(tokens), tokens.roll(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step}  loss {loss.item():.4f}  units: {', '.join(units)}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
