"""What the ranks of a `group` run for the tests of tensor parallelism, and the dense training to compare with.

The comparisons run on the ranks: each trains the whole model itself, and returns how far its part is from it.
"""

import functools
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from equality import STEPS
from torch.nn.utils import clip_grad_norm_

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "from_scratch"))

import grad_norm  # noqa: E402  (needs the path above)
import tensor_parallel as tp  # noqa: E402
import tensor_parallel_3d as tp3d  # noqa: E402

from common.transformer import ModelConfig, Transformer  # noqa: E402

SAMPLES, CLIP = 4, 0.1  # every gradient is clipped


def small(**changes) -> ModelConfig:
    """A model of some 30 000 weights, whose heads, neurons and vocabulary divide by 2 and 4; with width 36 by 3."""
    shape = dict(width=32, ffn_width=48, layers=2, heads=8, kv_heads=4)
    by_three = dict(heads=6, kv_heads=3, vocabulary=240) if changes.get("width") == 36 else {}
    return ModelConfig(**(shape | by_three | changes))


def batch(config: ModelConfig, step: int, samples: int = SAMPLES) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, targets) of one step; some targets do not count. 24 tokens divide by 2, 3 and 4, and by 4, 6 and 8."""
    generator = torch.Generator().manual_seed(step)
    tokens, targets = torch.randint(config.vocabulary, (2, samples, 24), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.1] = -100
    return tokens, targets


def optimizer_for(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)


@functools.cache
def dense(steps: int = STEPS, samples: int = SAMPLES, **changes) -> tuple[list, dict, dict]:
    """One process: (loss, gradients, norm) of every step, the first weights and the last ones."""
    config = small(**changes)
    model = Transformer(config, seed=1).double()
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, rows = optimizer_for(model), []
    for step in range(steps):
        tokens, targets = batch(config, step, samples)
        loss = model(tokens, targets) / tokens.numel()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        norm = clip_grad_norm_(model.parameters(), CLIP)
        assert norm > 2 * CLIP, "clipping would change nothing"
        rows.append((loss.detach(), gradients, norm))
        optimizer.step()
        optimizer.zero_grad()
    return rows, first, {name: p.detach() for name, p in model.named_parameters()}


class Differences(dict):
    """The largest absolute difference seen, by what was compared."""

    def note(self, what: str, a, b) -> None:
        gap = (torch.as_tensor(a) - torch.as_tensor(b)).abs().max().item()
        self[what] = max(self.get(what, 0.0), gap)


def part(name: str, whole: torch.Tensor) -> torch.Tensor:
    dim = tp.sharded_dimension(name)
    return whole if dim is None else tp.cut(whole, dim, dist.group.WORLD)


def train(sequence_parallel: bool, changes: dict, accumulation: int = 1) -> dict:
    """Some steps beside the dense model's: the largest differences of this rank."""
    config, group, seen = small(**changes), dist.group.WORLD, Differences()
    rows, first, last = dense(**changes)
    model = tp.parallelize(Transformer(config, seed=1).double(), group, sequence_parallel)
    assert {name for name, _ in model.named_parameters()} == set(first)
    optimizer = optimizer_for(model)
    for step, (loss, gradients, norm) in enumerate(rows):
        mean_loss = 0.0
        for tokens, targets in zip(*(t.chunk(accumulation) for t in batch(config, step)), strict=True):
            micro_loss = model(tokens, targets) / (tokens.numel() * accumulation)
            micro_loss.backward()
            mean_loss += micro_loss.detach()
        seen.note("loss", mean_loss, loss)
        for name, parameter in model.named_parameters():
            seen.note("gradients", parameter.grad, part(name, gradients[name]))
        seen.note("norm", tp.clip_grad_norm(model, CLIP, group), norm)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        seen.note("parameters", parameter.detach(), part(name, last[name]))
        seen.note("moved", parameter.detach(), part(name, first[name]))
    return dict(seen)


def clip(value: float, dtype: str, copies: int = 1) -> tuple[float, float]:
    """Clip two numbers on each rank to a norm of 1: the norm before, and a number after."""
    gradient = torch.full((2,), value, dtype=getattr(torch, dtype))
    norm = grad_norm.clip_grad_norm([(gradient, copies)], 1.0, dist.group.WORLD)
    return norm.item(), gradient[0].item()


def wrong_reduce() -> tuple[float, float]:
    """*g* with an all-reduce in backward: (difference of the first loss, head gradient / the dense one)."""
    right, group = tp.reduce_from_ranks, dist.group.WORLD
    tp.reduce_from_ranks = lambda x, g: tp._Conjugate.apply(
        x, lambda t: tp.all_reduce(t, g), lambda t: tp.all_reduce(t, g)
    )
    try:
        model = tp.parallelize(Transformer(small(), seed=1).double(), group)
        tokens, targets = batch(small(), 0)
        loss = model(tokens, targets) / tokens.numel()
        loss.backward()
    finally:
        tp.reduce_from_ranks = right
    expected, gradients, _ = dense(steps=1)[0][0]
    reference = part("head.weight", gradients["head.weight"])
    ratio = (model.head.weight.grad * reference).sum() / reference.pow(2).sum()
    return (loss.detach() - expected).abs().item(), ratio.item()


def conjugates() -> list[bool]:
    """Gather undoes scatter, both ways, forward and backward; bitwise, for nothing is added up."""
    group = dist.group.WORLD
    x = torch.randn(2, 12, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    through = tp.gather_from_ranks(tp.scatter_to_ranks(x, group), group)
    (through * weight).sum().backward()
    answers = [torch.equal(through, x), torch.equal(x.grad, weight)]
    # Of n equal copies the reduce-scatter makes n times a part; the gradients of the copies, too, come from all ranks.
    x.grad = None
    around = tp.gather_sequence(tp.scatter_sequence(x, group), group)
    (around * weight).sum().backward()
    n = group.size()
    return [*answers, torch.allclose(around, n * x, rtol=1e-15), torch.allclose(x.grad, n * weight, rtol=1e-15)]


def logits() -> tuple[float, float]:
    """Without targets: how far the whole logits, and a gradient through them, are from the dense model's."""
    config, group = small(), dist.group.WORLD
    one, many = Transformer(config, 1).double(), tp.parallelize(Transformer(config, 1).double(), group)
    tokens, _ = batch(config, 0)
    a, b = one(tokens), many(tokens)
    a.pow(2).sum().backward()
    b.pow(2).sum().backward()
    name = "blocks.0.attention.query.weight"
    gradient = part(name, one.get_parameter(name).grad)
    return (a - b).abs().max().item(), (gradient - many.get_parameter(name).grad).abs().max().item()


def collectives(sequence_parallel: bool) -> tuple[dict, dict, tuple, tuple]:
    """Collectives in a forward and in a backward; the shapes that the first norm and the first head function see."""
    model = tp.parallelize(Transformer(small(), seed=1).double(), dist.group.WORLD, sequence_parallel)
    counts, shapes = Counter(), []
    real = {"all_reduce": dist.all_reduce, "all_gather": dist.all_gather}
    real_scatter = tp._reduce_scatter

    def counting(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    block = model.blocks["0"]
    block.attention_norm.register_forward_hook(lambda _, inputs, out: shapes.append(tuple(out.shape)))
    attend = block.attention.attend
    block.attention.attend = lambda q, k, v, m: (shapes.append(tuple(k.shape)), attend(q, k, v, m))[1]
    try:
        for name, function in real.items():
            setattr(dist, name, counting(name, function))
        tp._reduce_scatter = counting("reduce_scatter", real_scatter)
        loss = model(*batch(small(), 0))
        forward = dict(counts)
        counts.clear()
        loss.backward()
        return forward, dict(counts), *shapes
    finally:
        for name, function in real.items():
            setattr(dist, name, function)
        tp._reduce_scatter = real_scatter


def refused(changes: dict) -> str:
    try:
        tp.parallelize(Transformer(small(**changes), seed=1), dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "nothing"


@functools.cache
def grid(x: int, y: int, z: int) -> tp3d.Grid:
    return tp3d.make_grid(x, y, z)


def pair_on_grid(x: int, y: int, z: int) -> tuple[dict, dict]:
    """Two layers, x and y swapped for the second, against the dense pair: differences, and bytes sent by collective."""
    generator = torch.Generator().manual_seed(0)
    whole_x, weight_1, weight_2, weight_of_loss = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((16, 24), (48, 24), (24, 48), (16, 24))
    )
    dense_x, dense_1, dense_2 = (t.clone().requires_grad_() for t in (whole_x, weight_1, weight_2))
    dense_y = (dense_x @ dense_1.T).relu() @ dense_2.T
    (dense_y * weight_of_loss).sum().backward()

    here = grid(x, y, z)
    here.sent.clear()
    swapped, seen = here.swapped(), Differences()
    first, second = tp3d.Linear3D(weight_1, here), tp3d.Linear3D(weight_2, swapped)
    part_x = tp3d.cut_input(whole_x, here).requires_grad_()
    part_y = second(first(part_x).relu())
    # The output lies as an input of the grid does: swapped twice.
    (part_y * tp3d.cut_input(weight_of_loss, here)).sum().backward()
    seen.note("output", part_y.detach(), tp3d.cut_input(dense_y.detach(), here))
    seen.note("d input", part_x.grad, tp3d.cut_input(dense_x.grad, here))
    seen.note("d first", first.weight.grad, tp3d.cut_weight(dense_1.grad, here))
    seen.note("d second", second.weight.grad, tp3d.cut_weight(dense_2.grad, swapped))
    assert first.weight.numel() == weight_1.numel() // (x * y * z)  # every number on one rank only
    return dict(seen), dict(here.sent)
