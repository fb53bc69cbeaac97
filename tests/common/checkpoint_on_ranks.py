"""What the ranks of a `group` run for test_checkpoint.py."""

import hashlib
import os
import resource
from pathlib import Path

import torch
from ranks_on_ranks import ended, here
from torch.nn.parallel import DistributedDataParallel

from common import checkpoint
from common.runs import manifest


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


class Harm:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)

    def __deepcopy__(self, memo):
        return self


def train_and_save(folder, wrap="plain", mark=None):
    model, wrapped, optimizer = build(wrap=wrap)
    for step in range(3):
        inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        model(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    if mark:
        optimizer.param_groups[0]["lr"] = Harm(mark)
    checkpoint.save(Path(folder), 3, wrapped, optimizer, here(), {"scaler": None})
    return digest(model, optimizer)


def load_into_fresh(folder, wrap="plain"):
    model, wrapped, optimizer = build(wrap=wrap, seed=1)
    content = checkpoint.load(Path(folder), wrapped, optimizer, here())
    assert content["step"] == 3
    return digest(model, optimizer)


def save_many(folder, steps, keep):
    model, _, optimizer = build()
    for step in steps:
        checkpoint.save(Path(folder), step, model, optimizer, here(), keep=keep)
    return sorted(path.name for path in Path(folder).iterdir())


def latest_step(folder):
    ranks = here()
    found = manifest.latest(Path(folder)) if ranks.is_main else None
    return ranks.broadcast(found).name


def load_fails(folder, options):
    model, _, optimizer = build(**options)
    return ended(checkpoint.load, Path(folder), model, optimizer, here())


def save_fails(folder, step, apart=False):
    model, _, optimizer = build()
    folder = Path(folder, f"disk of rank {here().rank}") if apart else Path(folder)
    return ended(checkpoint.save, folder, step, model, optimizer, here())


def leftover(folder):
    """An attempt saves, another claims the folder, the first one goes on: how each of its saves ends."""
    model, _, optimizer = build()
    ranks = here()

    def save(step, attempt):
        return ended(checkpoint.save, Path(folder), step, model, optimizer, ranks, None, 2, attempt)

    def claim():
        ranks.barrier()
        return manifest.claim(Path(folder)) if ranks.is_main else None

    first = claim()
    saves = [save(1, first)]
    second = claim()
    saves += [save(2, first), save(2, second), save(3, first), save(1, first)]
    return saves, sorted(path.name for path in Path(folder).iterdir() if (path / "manifest.json").exists())


def wakes_before_the_commit(folder, committed_meanwhile):
    """One process: an attempt stops right before its commit; another takes over, commits or not; the first wakes."""
    model, _, optimizer = build()
    first, other, link = manifest.claim(Path(folder)), [], os.link

    def late(*args):
        os.link = link  # once
        other.append(manifest.claim(Path(folder)))
        if committed_meanwhile:
            checkpoint.save(Path(folder), 1, model, optimizer, here(), {"by": "second"}, 2, other[0])
        return link(*args)

    os.link = late
    try:
        end = ended(checkpoint.save, Path(folder), 1, model, optimizer, here(), {"by": "first"}, 2, first)
    finally:
        os.link = link
    found = checkpoint.load(manifest.latest(Path(folder)), model, optimizer, here())["extra"]["by"]
    checkpoint.save(Path(folder), 1, model, optimizer, here(), {"by": "second"}, 2, other[0])
    then = checkpoint.load(manifest.latest(Path(folder)), model, optimizer, here())["extra"]["by"]
    return end, found, then, len(list((Path(folder) / "step_1").glob("shards-*")))


def synced(folder):
    """What this rank syncs to the disk while it saves, and when the manifest appears, in order."""
    model, _, optimizer = build()
    events, fsync, link = [], os.fsync, os.link

    def noting(descriptor):
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        kinds = ("shards-", "manifest", ".metadata")
        events.append(next((kind for kind in kinds if name.startswith(kind)), name))
        fsync(descriptor)

    def committing(*args):
        events.append("commit")
        link(*args)

    os.fsync, os.link = noting, committing
    try:
        checkpoint.save(Path(folder), 1, model, optimizer, here())
    finally:
        os.fsync, os.link = fsync, link
    return events


def save_not_finite(folder, where, value):
    """Save with one value on rank 1 that is not finite, in a weight or in a moment: how it ends."""
    model, _, optimizer = build()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    tensor = model[0].weight.data if where == "weight" else optimizer.state[model[0].weight]["exp_avg_sq"]
    if here().rank == here().world_size - 1:
        tensor[0, 0] = value
    return ended(checkpoint.save, Path(folder), 4, model, optimizer, here())


def save_without_room(folder, step, most):
    """Save where no file may have more bytes than `most`: how it ends."""
    model, _, optimizer = build(width=999)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, unlimited[1]))
    try:
        return ended(checkpoint.save, Path(folder), step, model, optimizer, here())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
