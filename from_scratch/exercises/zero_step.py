# exercise 3: ZeRO-1: each rank keeps a piece of the optimizer
"""n ranks that all keep AdamW's averages keep the same numbers n times. Here each keeps 1/n of them.

    torchrun --nproc-per-node=2 from_scratch/exercises/tasks/zero_step.py

AdamW looks at each element alone: what it does to one does not depend on the others. So the step can be shared out
(ZeRO stage 1, https://arxiv.org/abs/1910.02054). Put all parameters into one flat row, cut it into n pieces of equal
size, the last ones filled up with zeros, and

1. each rank has an AdamW that knows its piece of the row and nothing else: 1/n of the state,
2. in a step it takes its piece of the gradient, and steps,
3. an all-gather brings everyone everyone's pieces, from which the parameters are written back.

Write `ShardedAdamW`. Gradients are already averaged over the ranks, as after DDP. Graded at 2, 3 and 4 ranks, with
numbers of elements that n does not divide, and with a piece that is all filling: parameters equal to those of a plain
AdamW over five steps, to 1e-12 in fp64; the bytes of state that each rank keeps; the bytes that travel.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# Renamed in torch 2.13. all_gather(output, mine): output (n * size,), mine (size,)
all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


class ShardedAdamW:
    """AdamW over 1/n of the elements of `parameters`, which are equal on all ranks and all have gradients.

    `inner` is this rank's torch.optim.AdamW; settings go to it: lr, weight_decay, betas …
    """

    def __init__(self, parameters: list[nn.Parameter], **settings: float) -> None:
        self.parameters = parameters
        # solution
        self.mine = nn.Parameter(self._piece(parameters))
        self.inner = torch.optim.AdamW([self.mine], **settings)
        # task: # A piece is a parameter of its own. torch.optim makes its state in the first step, in that shape.
        # task: raise NotImplementedError("ShardedAdamW")
        # end

    # solution
    def _piece(self, tensors: list[Tensor]) -> Tensor:
        """This rank's piece of the row that these tensors make: (ceil(elements / n),), a copy."""
        n = dist.get_world_size()
        row = torch.cat([tensor.detach().flatten() for tensor in tensors])
        return F.pad(row, (0, -len(row) % n)).chunk(n)[dist.get_rank()].clone()

    # task:
    # end
    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters, in place and on all ranks, from their gradients. All ranks call it."""
        # solution
        self.mine.grad = self._piece([parameter.grad for parameter in self.parameters])
        self.inner.step()
        row = self.mine.new_empty(len(self.mine) * dist.get_world_size())
        all_gather(row, self.mine.detach())
        sizes = [parameter.numel() for parameter in self.parameters]
        for parameter, part in zip(self.parameters, row[: sum(sizes)].split(sizes), strict=True):
            parameter.copy_(part.view_as(parameter))
        # task: raise NotImplementedError("step")
        # end

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Linear(5, 5)  # 30 elements: AdamW's state would be 240 bytes
    optimizer = ShardedAdamW(list(model.parameters()), lr=0.1)
    for _ in range(5):
        model(torch.ones(5)).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = [t for entries in optimizer.inner.state.values() for t in entries.values() if t.dim()]
    weights = sum(parameter.sum().item() for parameter in model.parameters())
    print(f"rank {dist.get_rank()}: {sum(t.nbytes for t in state)} bytes of state, weights {weights}\n", end="")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
