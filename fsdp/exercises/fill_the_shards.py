# exercise 2: Fill the shards
"""A model that was never whole, and starts with the weights of one process all the same.

    torchrun --nproc-per-node=2 fsdp/exercises/tasks/fill_the_shards.py       # the same sum of weights at any number

A model that fits on no rank cannot be made on one. It is made on the *meta* device, where tensors have shapes and no
memory; then `fully_shard` cuts the shapes; then `model.to_empty(device=…)` gives the shards memory, in which stands
whatever stood there before. Now the values have to come from somewhere.

If each rank draws numbers for its own rows, the weights depend on the number of ranks; with one seed on all ranks even
the same rows stand on each of them. Neither stops the training, and nobody notices. What works: the value of a
parameter is a function of its name and the seed. Each rank makes one parameter whole, keeps its rows, and forgets the
rest. It takes the memory of one parameter, and not a single message.

What you need: `parameter.device_mesh` and `parameter.placements` of a DTensor, and `distribute_tensor(whole, mesh,
placements, src_data_rank=None)`, which cuts a tensor that all ranks hold; without `src_data_rank=None` it sends the one
of rank 0. Or `parameter.to_local()`, whose memory is the shard's, and the rule: rows are cut like `torch.chunk` cuts
them, and ranks for which no piece is left have none. And: not all that a model computes with is a parameter.

Write `fill`. Graded at 2, 3 and 4 ranks: every rank's rows against one process, bit for bit; no message; and that the
model then computes what one process computes, to 1e-12 in fp64.
"""

import hashlib

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists, which it would keep alive: see common/ranks.py
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


class Waves(nn.Module):
    """Numbers to waves of them: (batch,) to (batch, 2 × width). Has no parameters, and a table."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("frequencies", self.table(), persistent=False)  # in no checkpoint

    def table(self) -> Tensor:
        """The frequencies: (width,), on the default device, in fp64."""
        return 1.0 / 100 ** (torch.arange(self.width, dtype=torch.float64) / self.width)

    def forward(self, numbers: Tensor) -> Tensor:
        angles = numbers.unsqueeze(-1) * self.frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=-1)


class WaveModel(nn.Module):
    """(batch,) to (batch, 3), in fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.waves = Waves(4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.norm = nn.RMSNorm(8)
        self.head = nn.Linear(8, 3)
        self.double()

    def forward(self, numbers: Tensor) -> Tensor:
        hidden = self.waves(numbers)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(self.norm(hidden))


def initial_value(name: str, shape: torch.Size, seed: int) -> Tensor:
    """What the *whole* parameter `name` starts with: ones for norms, else normal numbers of its own; in fp64."""
    if "norm" in name:
        return torch.ones(shape, dtype=torch.float64, device="cpu")
    own_seed = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7])
    generator = torch.Generator("cpu").manual_seed(own_seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") / 3


def build(seed: int) -> WaveModel:
    """The model as a training makes it; `fill` does what is left to do."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with torch.device("meta"):
        model = WaveModel()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    fill(model, seed)
    return model


@torch.no_grad()
def fill(model: WaveModel, seed: int) -> None:
    """Give the sharded model, which is on the meta device, memory on the CPU and the values of one process."""
    # solution
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        whole = initial_value(name, parameter.shape, seed)  # of a DTensor: the shape of the whole
        parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None))
    model.waves.frequencies.copy_(model.waves.table())  # to_empty took the table's values, too
    # task: raise NotImplementedError("fill")
    # end


def main() -> None:
    dist.init_process_group("gloo")
    model = build(seed=0)
    total = torch.stack([p.to_local().sum() for p in model.parameters() if isinstance(p, DTensor)]).sum()
    dist.all_reduce(total)
    print(f"rank {dist.get_rank()}: all weights add up to {total.item():.12f}\n", end="")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
