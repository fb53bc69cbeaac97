"""What the ranks of a `group` run for the tests of data parallelism, and the one process to compare with.

The first rank compares with the training of one process, which it does itself; all compare with each other, bit by bit.
"""

import functools
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from equality import STEPS
from torch import nn
from torch.nn.utils import clip_grad_norm_
from tp_on_ranks import Differences, batch, small

import data_parallel as dp  # isort: skip  (tp_on_ranks puts from_scratch/ on the path)
import mesh  # isort: skip

from common.optimizer import OptimizerConfig, build_optimizer
from common.replica_check import differing_replicas
from common.transformer import Transformer

SAMPLES, SEQUENCE, CLIP = (
    48,
    16,
    0.1,
)  # every gradient is clipped; 48 samples: 2, 3 and 4 ranks with 1 or 4 micro-batches each
KINDS = {
    "naive": dp.NaiveDataParallel,
    "overlapped": dp.OverlappedDataParallel,
    "bucketed": lambda module, group=None: dp.BucketedDataParallel(module, group, bucket_bytes=40_000),
}


def optimizer_for(parameters, name: str = "adamw") -> torch.optim.Optimizer:
    """The one that the scripts use: no weight decay for vectors."""
    config = OptimizerConfig(name, lr=3e-3 if name == "adamw" else 0.1, weight_decay=0.1)
    return build_optimizer(parameters, config, torch.device("cpu"))


def micro_batches(config, step: int, rank: int, ranks: int, accumulation: int):
    """This rank's micro-batches: pairs of tokens and targets (samples, sequence)."""
    mine = (t[:, :SEQUENCE].chunk(ranks)[rank] for t in batch(config, step, SAMPLES))
    return list(zip(*(t.chunk(accumulation) for t in mine), strict=True))


@functools.cache
def one_process(dtype: torch.dtype, name: str, steps: int = STEPS, **changes) -> tuple[list, dict, dict]:
    """(loss, gradients, norm) of every step, the first weights and the last ones."""
    config = small(**changes)
    model = Transformer(config, seed=1).to(dtype)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, rows = optimizer_for(model.parameters(), name), []
    for step in range(steps):
        [(tokens, targets)] = micro_batches(config, step, 0, 1, 1)
        loss = model(tokens, targets) / tokens.numel()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        norm = clip_grad_norm_(model.parameters(), CLIP)
        assert norm > 2 * CLIP, "clipping would change nothing"
        rows.append((loss.detach(), gradients, norm))
        optimizer.step()
        optimizer.zero_grad()
    return rows, first, {name: p.detach() for name, p in model.named_parameters()}


@dataclass
class Strategy:
    """One way of training, as `beside_one_process` drives it. `gradients` and `parameters` are whole, by name."""

    forward: Callable
    no_sync: Callable
    finish: Callable
    clip: Callable
    step: Callable
    zero_grad: Callable
    gradients: Callable
    parameters: Callable


def beside_one_process(strategy: Strategy, accumulation: int, dtype: torch.dtype, name: str, **changes) -> dict:
    """Train; the largest differences on the first rank, and on all ranks whether the replicas are equal to the bit."""
    rank, ranks, config = dist.get_rank(), dist.get_world_size(), small(**changes)
    tokens_per_step, mine, first_gradients = SAMPLES * SEQUENCE, [], None
    for step in range(STEPS):
        loss_sum = torch.zeros((), dtype=torch.float64)
        batches = micro_batches(config, step, rank, ranks, accumulation)
        for number, (tokens, targets) in enumerate(batches):
            with nullcontext() if number == len(batches) - 1 else strategy.no_sync():
                loss = strategy.forward(tokens, targets)
                (loss * ranks / tokens_per_step).backward()
                strategy.finish()
            loss_sum += loss.detach()
        dist.all_reduce(loss_sum)
        if step == 0:
            first_gradients = {name: g.clone() for name, g in strategy.gradients().items()}
        mine.append((loss_sum / tokens_per_step, strategy.clip()))
        strategy.step()
        strategy.zero_grad()
    parameters = strategy.parameters()
    bits = {name: p.double().view(torch.int64).sum().item() for name, p in parameters.items()}
    everyone: list = [None] * ranks
    dist.all_gather_object(everyone, bits)
    seen = {"replicas equal": all(other == bits for other in everyone)}
    if rank == 0:
        differences = Differences()
        rows, first, last = one_process(dtype, name, **changes)
        for (loss, norm), (expected_loss, _, expected_norm) in zip(mine, rows, strict=True):
            differences.note("loss", loss, expected_loss)
            differences.note("norm", norm, expected_norm)
        assert first_gradients.keys() == last.keys() == parameters.keys()
        for name in last:
            differences.note("gradients", first_gradients[name], rows[0][1][name])
            differences.note("parameters", parameters[name], last[name])
        seen["moved"] = min((parameters[name] - first[name]).abs().max().item() for name in last)
        seen |= differences
    return seen


def check(answers: list[dict], losses=1e-12, parameters=1e-12, moved=1e-3) -> None:
    """Judge the answers of all ranks, in the test.

    fp64 sums in another order differ by some 1e-16, and AdamW amplifies that a little; losses, norms and gradients are
    of order 1. Every parameter must have moved: AdamW's first step alone moves the largest element by its rate, 3e-3.
    """
    assert all(seen["replicas equal"] for seen in answers), answers
    seen = answers[0]
    assert seen["moved"] > moved, seen
    assert max(seen["loss"], seen["norm"], seen["gradients"]) <= losses, seen
    assert seen["parameters"] <= parameters, seen


def train(kind: str, accumulation: int, dtype=torch.float64, name: str = "adamw", none: bool = True, **changes) -> dict:
    """Some steps; another seed on every rank, of which the first one's counts."""
    model = Transformer(small(**changes), seed=1 + dist.get_rank()).to(dtype)
    wrapped, optimizer = KINDS[kind](model), optimizer_for(model.parameters(), name)
    strategy = Strategy(
        wrapped, wrapped.no_sync, wrapped.finish,
        lambda: clip_grad_norm_(model.parameters(), CLIP),
        optimizer.step, lambda: optimizer.zero_grad(set_to_none=none),
        lambda: {name: p.grad for name, p in model.named_parameters()},
        lambda: {name: p.detach() for name, p in model.named_parameters()},
    )  # fmt: skip
    return beside_one_process(strategy, accumulation, dtype, name, **changes)


def train_with(kind: str, accumulation: int, options: dict) -> dict:
    return train(kind, accumulation, **options)


# ---------------------------------------------------------------- counts and order


class _Watched:
    """A Work that says when it was waited for."""

    def __init__(self, work: dist.Work, events: list) -> None:
        self.work, self.events = work, events

    def wait(self) -> None:
        self.events.append("wait")
        self.work.wait()


@contextmanager
def watched(owner, name: str, events: list, label: str | None = None):
    """Note every call of a collective that stands in module `owner`, and every wait for one."""
    right = getattr(owner, name)

    def call(*args, async_op=False, **kwargs):
        events.append(label or name)
        work = right(*args, async_op=async_op, **kwargs)
        return _Watched(work, events) if async_op else work

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, right)


def collectives(kind: str, accumulation: int, hold_back: bool) -> tuple[int, int]:
    """Gradient all-reduces in one step: as the wrapper counts them, and as torch.distributed sees them."""
    model, events = Transformer(small(), seed=1).double(), []
    wrapped = KINDS[kind](model)
    with watched(dist, "all_reduce", events):
        parts = micro_batches(small(), 0, dist.get_rank(), dist.get_world_size(), accumulation)
        for number, (tokens, targets) in enumerate(parts):
            last = number == accumulation - 1
            with wrapped.no_sync() if hold_back and not last else nullcontext():
                wrapped(tokens, targets).backward()
                wrapped.finish()
    return wrapped.collectives, events.count("all_reduce")


def order_of_events(kind: str) -> list[str]:
    """The events of one backward: gradients ("embedding", "head"), all-reduces, their ends."""
    model, events = Transformer(small(), seed=1).double(), []
    for name in ("embedding", "head"):  # the last and the first gradient to be ready
        parameter = getattr(model, name).weight
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: events.append(name))
    wrapped = KINDS[kind](model)
    [(tokens, targets)] = micro_batches(small(), 0, dist.get_rank(), dist.get_world_size(), 1)
    loss = wrapped(tokens, targets)
    with watched(dist, "all_reduce", events):
        loss.backward()
        events.append("backward ends")
        wrapped.finish()
    return events


# ---------------------------------------------------------------- unusual models


class Odd(nn.Module):
    """A frozen layer, one that only some ranks use, one that none uses, a tied weight, a buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.frozen = nn.Linear(5, 5), nn.Linear(5, 5)
        self.sometimes, self.never, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.tied = nn.Linear(5, 5)
        self.tied.weight = self.first.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("shift", torch.rand(5))

    def forward(self, x, use: bool):
        x = self.frozen(self.first(x).tanh())
        x = self.sometimes(x) if use else x
        return self.last(self.tied(x) + self.shift)


def odd(kind: str, accumulation: int = 1) -> tuple[dict, list, dict]:
    """Largest differences of the gradients of a model with oddities, which parameters have none, and equality."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model, reference = Odd(rank).double(), Odd(0).double()
    wrapped, seen = KINDS[kind](model), Differences()
    equal = {name: torch.equal(t, dict(reference.state_dict())[name]) for name, t in model.state_dict().items()}
    inputs = torch.rand(ranks, accumulation, 3, 5, generator=torch.Generator().manual_seed(7)).double()

    def use(r: int, part: int) -> bool:  # with accumulation rank 1 uses it in a micro-batch before the last one only
        return r == 0 if accumulation == 1 else r == 1 and part == 0

    for _ in range(2):  # the second time buckets hold old values
        for part in range(accumulation):
            with wrapped.no_sync() if part < accumulation - 1 else nullcontext():
                wrapped(inputs[rank, part], use(rank, part)).square().sum().backward()
                wrapped.finish()
        for r in range(ranks):
            for part in range(accumulation):
                (reference(inputs[r, part], use(r, part)).square().sum() / ranks).backward()
        expected = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in reference.named_parameters()}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                seen.note(name, parameter.grad, expected[name])
        without = [name for name, p in model.named_parameters() if p.grad is None]
        model.zero_grad()
        reference.zero_grad()
    return dict(seen), without, equal


def mixed_dtypes() -> list[tuple[list[str], bool]]:
    """The buckets of a model in two dtypes: dtypes in each, and whether gradients are the mean."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double(), nn.Linear(4, 4), nn.Linear(4, 4).double())
    wrapped = dp.BucketedDataParallel(model)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sum((rank + 1) * p.sum() for p in model.parameters()).backward()
    wrapped.finish()
    mean = (ranks + 1) / 2
    assert sum(len(parameters) for parameters, _ in wrapped.buckets) == 8
    return [
        (sorted({str(p.dtype) for p in (*parameters, flat)}), all(bool((p.grad == mean).all()) for p in parameters))
        for parameters, flat in wrapped.buckets
    ]


def subgroups(kind: str) -> tuple[list[float], str | None]:
    """Three ranks, of which 1 and 2 train together: gradients there, and whether their replicas agree."""
    together = dist.new_group([1, 2])
    rank = dist.get_rank()
    if rank == 0:
        return [], None
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, rank)
    wrapped = KINDS[kind](model, together)
    wrapped(torch.full((1, 2), float(rank))).sum().backward()
    wrapped.finish()
    return [model.weight.grad[0, 0].item(), model.weight[0, 0].item()], differing_replicas(model, together)


def second_backward(kind: str) -> str:
    model = nn.Linear(2, 2)
    wrapped = KINDS[kind](model)
    try:
        for _ in range(2):
            wrapped(torch.ones(1, 2)).sum().backward()
    except RuntimeError as error:
        return str(error)
    finally:
        wrapped.finish()
    return "nothing"


def views(set_to_none: bool) -> list[bool]:
    """After each of three steps: do all gradients lie in buckets?"""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    wrapped, answers = dp.BucketedDataParallel(model), []
    [(_, flat)] = wrapped.buckets
    for _ in range(3):
        model(torch.ones(1, 4)).sum().backward()
        wrapped.finish()
        answers.append(
            {p.grad.untyped_storage().data_ptr() for p in model.parameters()} == {flat.untyped_storage().data_ptr()}
        )
        model.zero_grad(set_to_none=set_to_none)
    return answers


# ---------------------------------------------------------------- mesh


def grid(sizes: dict[str, int]) -> tuple[dict, dict]:
    """This rank's coordinates, and for each group the sum of its ranks' numbers, and its size."""
    built = mesh.build_mesh(**sizes)
    sums = {}
    for name, group in built.groups.items():
        total = torch.tensor(dist.get_rank())
        dist.all_reduce(total, group=group)
        sums[name] = (total.item(), group.size())
    return built.coordinates, sums


def groups_made(sizes: dict[str, int]) -> int:
    """How many groups a mesh creates; each is a communicator, and takes time when a job starts."""
    made, new_group = [], dist.new_group
    dist.new_group = lambda ranks: made.append(ranks) or new_group(ranks)
    try:
        mesh.build_mesh(**sizes)
    finally:
        dist.new_group = new_group
    return len(made)


def refused_grid(sizes: dict[str, int]) -> str:
    try:
        mesh.build_mesh(**sizes)
    except ValueError as error:
        return str(error)
    return "nothing"
