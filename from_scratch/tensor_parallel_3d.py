"""Tensor parallelism on a grid: one linear layer cut in three directions at once.

One matrix product has three dimensions: tokens, inputs, outputs. Agarwal's algorithm, which 3-D tensor parallelism
(https://arxiv.org/abs/2105.14450) and AxoNN (https://arxiv.org/abs/2305.13525) build on, cuts each along one axis of
a grid of x × y × z ranks:

    outputs along x, inputs along y, tokens along z
    input   (tokens / z, inputs / y)     the same on all x
    weight  (outputs / x / z, inputs / y)    every number on one rank only
    output  (tokens / z, outputs / x)    the same on all y

    forward     weight    all-gather over z
                output    all-reduce over y of      input @ weight.T
    backward    d input   all-reduce over x of      d output @ weight
                d weight  reduce-scatter over z of  d output.T @ input

So each axis is a strategy known by another name. x alone is the column-parallel layer, y alone the row-parallel one,
z alone is FSDP. An output is laid out as the input of a layer whose x and y have changed places: layers alternate, and
a grid of n × 1 × 1 is Megatron's pair of column and row. In 2105.14450 the activations too are cut along the axis on
which they are equal here: an all-reduce becomes a reduce-scatter and, later, an all-gather, of together as many bytes.

    python from_scratch/tensor_parallel_3d.py                # bytes a rank sends for each grid of 8 ranks
"""

import argparse
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from tensor_parallel import all_gather, all_reduce, cut, reduce_scatter
from torch import Tensor, nn
from torch.distributed import ProcessGroup


@dataclass
class Grid:
    """This rank's group along each axis, and the bytes it has sent, counted as a ring would send them."""

    x: ProcessGroup
    y: ProcessGroup
    z: ProcessGroup
    sent: Counter = field(default_factory=Counter)

    def swapped(self) -> "Grid":
        """The same grid with x and y exchanged, for every second layer; it shares the count."""
        return Grid(self.y, self.x, self.z, self.sent)

    def all_reduce(self, t: Tensor, axis: ProcessGroup) -> Tensor:
        self.sent["all_reduce"] += 2 * (axis.size() - 1) * t.nbytes // axis.size()
        return all_reduce(t, axis) if axis.size() > 1 else t

    def all_gather(self, t: Tensor, axis: ProcessGroup) -> Tensor:
        self.sent["all_gather"] += (axis.size() - 1) * t.nbytes  # t is one part
        return all_gather(t, 0, axis) if axis.size() > 1 else t

    def reduce_scatter(self, t: Tensor, axis: ProcessGroup) -> Tensor:
        self.sent["reduce_scatter"] += (axis.size() - 1) * t.nbytes // axis.size()
        return reduce_scatter(t, 0, axis) if axis.size() > 1 else t


def make_grid(x: int, y: int, z: int) -> Grid:
    """Arrange all ranks in a grid; neighbouring ranks, with the fastest links, lie along x. Every rank must call it.

    Raises:
        ValueError: x·y·z is not the number of ranks.
    """
    if x * y * z != dist.get_world_size():
        found = f"a grid of {x}x{y}x{z} has {x * y * z} places for {dist.get_world_size()} ranks"
        raise ValueError(f"{found}; expected as many; choose x, y and z to match")
    places = torch.arange(x * y * z).view(z, y, x)
    # Each axis has one group for every line of the grid; all ranks take part in making all of them.
    lines = [places.movedim(dim, -1).reshape(-1, places.shape[dim]).tolist() for dim in (2, 1, 0)]
    return Grid(*(dist.new_subgroups_by_enumeration(groups)[0] for groups in lines))


def cut_input(whole: Tensor, grid: Grid) -> Tensor:
    """This rank's part (tokens / z, width / y) of activations (tokens, width)."""
    return cut(cut(whole, 0, grid.z), 1, grid.y)


class _Linear3D(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_part, grid):
        weight = grid.all_gather(weight_part, grid.z)
        # Kept for backward. FSDP would gather it again there: x·y ranks have cut it small enough.
        ctx.save_for_backward(x, weight)
        ctx.grid = grid
        return grid.all_reduce(x @ weight.T, grid.y)  # each y has summed over its own inputs only

    @staticmethod
    def backward(ctx, gradient):
        (x, weight), grid = ctx.saved_tensors, ctx.grid
        grad_x = grid.all_reduce(gradient @ weight, grid.x)  # each x knows of its own outputs only
        grad_weight = grid.reduce_scatter(gradient.T @ x, grid.z)  # each z saw its own tokens only
        return grad_x, grad_weight, None


class Linear3D(nn.Module):
    """y = x @ weight.T on the grid, from the whole weight (outputs, inputs), equal on all ranks.

    x: (tokens / z, inputs / y) → (tokens / z, outputs / x).
    """

    def __init__(self, weight: Tensor, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.weight = nn.Parameter(cut_weight(weight.detach(), grid))

    def forward(self, x: Tensor) -> Tensor:
        return _Linear3D.apply(x, self.weight, self.grid)


def cut_weight(whole: Tensor, grid: Grid) -> Tensor:
    """This rank's part (outputs / x / z, inputs / y) of a weight, or of its gradient, (outputs, inputs)."""
    return cut(cut(cut(whole, 0, grid.x), 1, grid.y), 0, grid.z)


def bytes_sent(tokens: int, inputs: int, outputs: int, x: int, y: int, z: int, item: int) -> int:
    """Bytes each rank sends for one layer, forward and backward, in rings; item: bytes of one number."""
    forward = 2 * (y - 1) * tokens * outputs // (x * y * z)  # all-reduce of (tokens / z, outputs / x) over y
    backward = 2 * (x - 1) * tokens * inputs // (x * y * z)  # all-reduce of (tokens / z, inputs / y) over x
    weight = 2 * (z - 1) * inputs * outputs // (x * y * z)  # gathered, and its gradient scattered
    return (forward + backward + weight) * item


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes a rank sends for a feed-forward pair on every grid.")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens that the whole grid works on")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--ffn_width", type=int, default=16384)
    args = parser.parse_args()
    print(f"{args.width} -> {args.ffn_width} -> {args.width}, {args.tokens} tokens, bf16, forward and backward")
    divisors = [d for d in range(1, args.ranks + 1) if args.ranks % d == 0]
    grids = [(x, y, args.ranks // x // y) for x in divisors for y in divisors if args.ranks % (x * y) == 0]
    pairs = {
        (x, y, z): bytes_sent(args.tokens, args.width, args.ffn_width, x, y, z, 2)
        + bytes_sent(args.tokens, args.ffn_width, args.width, y, x, z, 2)  # x and y swapped
        for x, y, z in grids
    }
    one_dimensional = pairs[args.ranks, 1, 1]
    print("    grid   MB a rank sends   relative to column + row")
    for (x, y, z), sent in sorted(pairs.items(), key=lambda item: item[1]):
        print(f"{f'{x}x{y}x{z}':>8} {sent / 1e6:>17.1f} {sent / one_dimensional:>26.2f}")


if __name__ == "__main__":
    main()
