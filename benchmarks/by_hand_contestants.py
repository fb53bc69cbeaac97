"""The contestants of benchmarks/by_hand.py: what is written by hand and the library's own."""

import copy
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.nn.parallel import DistributedDataParallel

from common.transformer import ModelConfig, Transformer

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "from_scratch"), str(ROOT / "collectives")]  # lessons are scripts, not packages

from data_parallel import BucketedDataParallel, NaiveDataParallel, OverlappedDataParallel  # noqa: E402
from fully_sharded import finish as finish_by_hand  # noqa: E402
from fully_sharded import full_state_dict  # noqa: E402
from fully_sharded import fully_shard as fully_shard_by_hand  # noqa: E402
from ring_all_reduce import ring_all_reduce  # noqa: E402

SIZES = [4 * 2**10, 64 * 2**10, 2**20, 16 * 2**20]  # of the ring's messages, in bytes


MiB = 2**20


Batch = tuple[Tensor, Tensor]


class Linears(nn.Module):
    """Square matrices, one after the other: few, large gradients. Gives the sum of squared errors."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        for layer in self.layers:
            inputs = torch.tanh(layer(inputs))
        return F.mse_loss(inputs, targets, reduction="sum")


@dataclass(frozen=True)
class Case:
    """A model and a batch: `rows` of `width` numbers for Linears, `rows` × `sequence` tokens for a Transformer."""

    what: str
    build: Callable[[], nn.Module]
    rows: int
    bucket_bytes: int = 0
    width: int = 0
    sequence: int = 0

    def batch(self, rank: int) -> Batch:
        """This rank's own inputs and targets."""
        generator = torch.Generator().manual_seed(rank)
        if self.sequence:
            text = torch.randint(256, (self.rows, self.sequence + 1), generator=generator)
            return text[:, :-1].contiguous(), text[:, 1:].contiguous()
        inputs, targets = torch.randn(2, self.rows, self.width, generator=generator)
        return inputs, targets


CASES = {
    # 75 gradients of 64 bytes to 16 KiB, one bucket: a message costs its latency
    "deep": Case(
        "8 narrow blocks",
        lambda: Transformer(ModelConfig(width=16, layers=8, heads=2, kv_heads=2, ffn_width=48), seed=1),
        rows=1, sequence=16, bucket_bytes=MiB,
    ),
    # three gradients of 4 MiB and a small batch: a message costs its bytes
    "wide": Case("3 wide layers", lambda: Linears(1024, 3), rows=8, width=1024, bucket_bytes=4 * MiB),
    # the same with enough computation to hide communication behind
    "balanced": Case("6 layers, large batch", lambda: Linears(768, 6), rows=512, width=768, bucket_bytes=2 * MiB),
    # the model of all lessons: four blocks
    "tiny": Case("tiny, 4 blocks", lambda: Transformer(ModelConfig(preset="tiny"), seed=1), rows=2, sequence=64),
}  # fmt: skip


@dataclass
class Contestant:
    """One way to do the same work. The first of a comparison is the one that the others are held against."""

    name: str
    step: Callable[[], object]
    ended: Callable[[], dict[str, Tensor]]  # whole tensors by name, on every rank; may communicate
    reset: Callable[[], object] = lambda: None  # before each turn, off the clock
    alone: bool = False  # computes without communication: its parameters are nobody else's


def nothing() -> None:
    """There is nothing to wait for."""


def trained(
    name: str,
    model: nn.Module,
    batch: Batch,
    wrapped: nn.Module,
    finish: Callable[[], object] = nothing,
    around: Callable[[], AbstractContextManager] = nullcontext,
    ended: Callable[[], dict[str, Tensor]] | None = None,
    alone: bool = False,
) -> Contestant:
    """Plain SGD on one batch: what is computed beside communication shall be little, and the same for all."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003, foreach=True)  # there is no fused one for DTensors
    targets = batch[1]
    samples = len(targets) if targets.is_floating_point() else targets.numel()  # a token is a sample

    def step() -> None:
        with around():
            (wrapped(*batch) / samples).backward()
        finish()
        optimizer.step()
        optimizer.zero_grad()

    def parameters() -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    return Contestant(name, step, ended or parameters, alone=alone)


def data_parallel(case: str, rank: int, kinds: list[str]) -> list[Contestant]:
    """Contestants by kind, each with a model of its own."""
    chosen, found = CASES[case], []
    model, batch = chosen.build(), chosen.batch(rank)
    for kind in kinds:
        mine = copy.deepcopy(model)
        if kind == "torch DDP":
            mib = chosen.bucket_bytes / MiB
            ddp = DistributedDataParallel(mine, bucket_cap_mb=mib, gradient_as_bucket_view=True)
            found.append(trained(kind, mine, batch, ddp))
        elif kind in ("naive", "overlapped"):
            by_hand = {"naive": NaiveDataParallel, "overlapped": OverlappedDataParallel}[kind](mine)
            found.append(trained(kind, mine, batch, by_hand, by_hand.finish))
        else:
            by_hand = BucketedDataParallel(mine, bucket_bytes=chosen.bucket_bytes)
            if kind == "buckets after backward":  # the same messages, but `finish` starts them all
                found.append(trained(kind, mine, batch, by_hand, by_hand.finish, by_hand.no_sync))
            elif kind == "no communication":
                found.append(trained(kind, mine, batch, by_hand, around=by_hand.no_sync, alone=True))
            else:
                found.append(trained(kind, mine, batch, by_hand, by_hand.finish))
    return found


def compare_ddp(case: str, rank: int) -> list[Contestant]:
    return data_parallel(case, rank, ["torch DDP", "bucketed by hand"])


def compare_naive(case: str, rank: int) -> list[Contestant]:
    return data_parallel(case, rank, ["naive", "overlapped", "bucketed"])


def compare_hidden(case: str, rank: int) -> list[Contestant]:
    return data_parallel(case, rank, ["buckets after backward", "bucketed by hand", "torch DDP", "no communication"])


def compare_fsdp(case: str, rank: int) -> list[Contestant]:
    chosen = CASES[case]
    batch = chosen.batch(rank)
    theirs, ours = chosen.build(), chosen.build()
    for model, fully_shard in ((theirs, torch_fully_shard), (ours, fully_shard_by_hand)):
        for block in model.blocks.values():
            fully_shard(block, reshard_after_forward=True)
        fully_shard(model, reshard_after_forward=False)  # its backward begins at once
    return [
        trained(
            "torch fully_shard", theirs, batch, theirs,
            ended=lambda: {name: parameter.full_tensor().detach() for name, parameter in theirs.named_parameters()},
        ),
        trained(
            "by hand", ours, batch, ours, lambda: finish_by_hand(ours), ended=lambda: full_state_dict(ours)
        ),
    ]  # fmt: skip


def compare_ring(case: str, rank: int) -> list[Contestant]:
    """`case` is a number of bytes. Each operation is done on the result of the one before."""
    # Whole numbers: on two ranks every sum of sums is exact, so that the buffers tell how many operations there were.
    start = (torch.arange(int(case) // 4) % 3 + rank).float()

    def contestant(name: str, operation: Callable[[Tensor], object]) -> Contestant:
        buffer = start.clone()
        return Contestant(name, lambda: operation(buffer), lambda: {"sum": buffer}, lambda: buffer.copy_(start))

    return [contestant("dist.all_reduce", dist.all_reduce), contestant("ring by hand", ring_all_reduce)]


COMPARISONS: dict[str, tuple[Callable[[str, int], list[Contestant]], list[str]]] = {
    "ddp": (compare_ddp, ["deep", "wide"]),
    "naive": (compare_naive, ["deep", "wide"]),
    "fsdp": (compare_fsdp, ["tiny"]),
    "ring": (compare_ring, [str(size) for size in SIZES]),
    "hidden": (compare_hidden, ["balanced"]),
}
