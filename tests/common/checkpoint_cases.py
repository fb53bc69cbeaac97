"""What the ranks of a `group` run for test_checkpoint.py."""

import contextlib
import hashlib
import io
from pathlib import Path

import torch
from rank_cases import here
from torch.nn.parallel import DistributedDataParallel

from common import checkpoint


def build(width=8, bias=True, optimizer="AdamW", wrap="plain", seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, width, bias=bias), torch.nn.Linear(width, 3))
    optimizer = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1)
    wrapped = {"plain": lambda m: m, "ddp": DistributedDataParallel, "compiled": torch.compile}[wrap](model)
    return model, wrapped, optimizer


def digest(model, optimizer):
    state = hashlib.sha256()
    for parameter in model.parameters():
        for tensor in (parameter, optimizer.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg_sq"]):
            state.update(tensor.detach().numpy().tobytes())
    return state.hexdigest()


def train_and_save(folder, wrap="plain"):
    model, wrapped, optimizer = build(wrap=wrap)
    for step in range(3):
        inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        model(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    checkpoint.save(Path(folder), 3, wrapped, optimizer, here(), {"scaler": None})
    return digest(model, optimizer)


def load_into_fresh(folder, wrap="plain"):
    model, wrapped, optimizer = build(wrap=wrap, seed=1)
    manifest = checkpoint.load(Path(folder), wrapped, optimizer, here())
    assert manifest["step"] == 3
    return digest(model, optimizer)


def save_many(folder, steps, keep):
    model, _, optimizer = build()
    for step in steps:
        checkpoint.save(Path(folder), step, model, optimizer, here(), keep=keep)
    return sorted(path.name for path in Path(folder).iterdir())


def latest_step(folder):
    ranks = here()
    found = checkpoint.latest(Path(folder)) if ranks.is_main else None
    return ranks.broadcast(found).name


def ended(function, *args):
    """The exit code and the words with which a call ends."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        try:
            function(*args)
        except SystemExit as error:
            return error.code, stderr.getvalue()
    return 0, stderr.getvalue()


def load_fails(folder, options):
    model, _, optimizer = build(**options)
    return ended(checkpoint.load, Path(folder), model, optimizer, here())


def save_fails(folder, step):
    model, _, optimizer = build()
    return ended(checkpoint.save, Path(folder), step, model, optimizer, here())
