# exercise 1: The plan of a block
"""Tensor parallelism for a whole transformer block, said in one dictionary.

    torchrun --nproc-per-node=2 model_parallel/exercises/tasks/plan_of_a_block.py     # errors, messages, bytes kept

`parallelize_module(block, mesh, plan)` changes a module in place: plan is {name of a submodule: style}. Styles say how
a layer is cut, and what comes in and goes out of it:

- `ColwiseParallel()`: cut by outputs. Every rank has the whole input, and computes some of the outputs, alone;
- `RowwiseParallel()`: cut by inputs. Every rank has some of the inputs, those that it has computed; what comes out is a
  sum over the ranks, and an all-reduce adds it up;
- a layer that is not in the plan stays whole on all ranks.

Layers make pairs: cut by outputs, then something that works on each output (or each head) alone, then cut by inputs. So
a pair costs one all-reduce forward. It costs one backward too, for the gradient of what came in. But three layers with
the same input, each with a style of its own, send three. `PrepareModuleInput` for the module that contains them tells
once what comes in: `input_layouts=(Replicate(),)`, what it is, and `desired_input_layouts=(Replicate(),)`, what shall
become of it; then gradients are added up before they are sent.

Write `make_plan`. `Attention` counts its heads from the weights that it has, so a rank can have some of them. Graded at
2 and 3 ranks against one process (1e-12 in fp64): output, gradients of the input and of all weights; the numbers that a
rank keeps; two all-reduces forward and two backward.
"""

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists, which it would keep alive: see common/ranks.py
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

HEAD_SIZE = 4


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        projected = (layer(hidden) for layer in (self.query, self.key, self.value))
        heads = [each.unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2) for each in projected]
        return self.output(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(hidden)) * self.up(hidden))


class Block(nn.Module):
    """(batch, sequence, width) to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(width), Attention(width)
        self.ffn_norm, self.ffn = nn.RMSNorm(width), FeedForward(width)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        return hidden + self.ffn(self.ffn_norm(hidden))


def make_plan() -> dict[str, ParallelStyle]:
    """How `Block` is cut: names of submodules, such as "ffn.up", and their styles."""
    # solution
    enter = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),))
    return {
        "attention": enter,
        "attention.query": ColwiseParallel(),
        "attention.key": ColwiseParallel(),
        "attention.value": ColwiseParallel(),
        "attention.output": RowwiseParallel(),
        "ffn": enter,
        "ffn.gate": ColwiseParallel(),
        "ffn.up": ColwiseParallel(),
        "ffn.down": RowwiseParallel(),
    }
    # task: # Which layers begin a pair, and which one ends it? Where do several take the same input?
    # task: raise NotImplementedError("make_plan")
    # end


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    block, hidden = Block(24), torch.randn(2, 5, 24)
    alone = block(hidden)
    parallelize_module(block, mesh, make_plan())
    with CommDebugMode() as sent:
        output = block(hidden)
        output.sum().backward()
    messages = ", ".join(f"{count} {operation}" for operation, count in sent.get_comm_counts().items())
    print(f"rank {dist.get_rank()}: off by {(output - alone).abs().max():.1e}; {messages}\n", end="")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
