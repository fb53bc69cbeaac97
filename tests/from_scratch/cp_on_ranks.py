"""What the ranks of a `group` run for the tests of context parallelism."""

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_
from tp_on_ranks import CLIP, Differences, batch, dense, optimizer_for, small

from common.transformer import Transformer, causal_attention

import context_parallel as cp  # isort: skip  (tp_on_ranks puts from_scratch/ on the path)


def attention(balanced: bool, kv_heads: int, dtype: torch.dtype) -> tuple[dict, int]:
    """This rank's part of one attention against the whole one: differences, and how often keys or gradients left."""
    group, generator = dist.group.WORLD, torch.Generator().manual_seed(0)
    # Scores up to some 50: without rescaling, parts of the sum would differ by factors of e^50.
    q, k, v, weight = (
        (scale * torch.randn(2, heads, 24, 8, dtype=torch.float64, generator=generator)).to(dtype)
        for scale, heads in ((6, 6), (6, kv_heads), (1, kv_heads), (1, 6))
    )
    whole = [t.double().clone().requires_grad_() for t in (q, k, v)]
    output = causal_attention(*whole)
    (output * weight).sum().backward()
    mine = cp.positions(24, group, balanced)
    parts = [t[:, :, mine].requires_grad_() for t in (q, k, v)]
    sends, real = [], cp.send_around
    cp.send_around = lambda x, g: (sends.append(x.numel()), real(x, g))[1]
    try:
        part = cp.ring_attention(group, balanced)(*parts)
        (part * weight[:, :, mine]).sum().backward()
    finally:
        cp.send_around = real
    seen = Differences()
    seen.note("output", part.detach().double(), output.detach()[:, :, mine])
    for name, one, all_of_it in zip(("d query", "d key", "d value"), parts, whole, strict=True):
        assert one.grad.dtype == dtype
        seen.note(name, one.grad.double(), all_of_it.grad[:, :, mine])
    return dict(seen), len(sends)


def train(balanced: bool, changes: dict, steps: int) -> dict:
    """Steps beside the dense model's: the largest differences of this rank."""
    config, group, seen = small(**changes), dist.group.WORLD, Differences()
    rows, first, last = dense(steps=steps, **changes)
    model = cp.parallelize_context(Transformer(config, seed=1).double(), group, balanced)
    optimizer, mine = optimizer_for(model), cp.positions(24, group, balanced)
    for step, (loss, gradients, norm) in enumerate(rows):
        tokens, targets = batch(config, step)
        mean_loss = model(tokens[:, mine], targets[:, mine]) / tokens.numel()
        mean_loss.backward()
        cp.sum_gradients(model, group)
        mean_loss = mean_loss.detach()
        dist.all_reduce(mean_loss)
        seen.note("loss", mean_loss, loss)
        for name, parameter in model.named_parameters():
            seen.note("gradients", parameter.grad, gradients[name])
        seen.note("norm", clip_grad_norm_(model.parameters(), CLIP), norm)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        seen.note("parameters", parameter.detach(), last[name])
        seen.note("moved", parameter.detach(), first[name])
    return dict(seen)


def split(balanced: bool) -> list[int]:
    return cp.positions(24, dist.group.WORLD, balanced).tolist()


def refused(what: str) -> str:
    try:
        if what == "sequence":
            cp.positions(18, dist.group.WORLD)
        else:
            cp.ring_attention(dist.group.WORLD)(*torch.zeros(3, 1, 2, 4, 8), mask=torch.ones(4, 4, dtype=torch.bool))
    except ValueError as error:
        return str(error)
    return "nothing"
