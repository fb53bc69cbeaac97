"""What the ranks of a `group` run for the tests of the collectives lesson, those of bandwidth.py included."""

import contextlib
import importlib
import io
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from rank_worker import starts_its_own_group
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "collectives"))

from common.config import parse  # noqa: E402  (needs the path above)
from common.ranks import Ranks  # noqa: E402

CONFIGS = {
    "bandwidth": "BandwidthConfig",
    "collective_ops": "OperationsConfig",
    "point_to_point": "PointToPointConfig",
    "ring_all_reduce": "RingConfig",
    "data_sharding_demo": "ShardingConfig",
}


@starts_its_own_group
def run(script: str, arguments: list[str]) -> tuple[int, str, str]:
    """A script with these arguments on this rank: its exit code, and what it wrote to stdout and stderr."""
    module, code, out, err = importlib.import_module(script), 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            module.main(parse(getattr(module, CONFIGS[script]), arguments))
        except SystemExit as ended:
            code = ended.code
    if dist.is_initialized():
        dist.destroy_process_group()
    return code, out.getvalue(), err.getvalue()


@starts_its_own_group
def drift_under_join() -> tuple[int, str, str]:
    """data_sharding_demo.py, while a weight of rank 1 moves by itself after every update."""
    rank = int(os.environ["RANK"])

    def move(optimizer: torch.optim.Optimizer, *_) -> None:
        optimizer.param_groups[0]["params"][0].data.add_(1e-3 * (rank == 1))

    hook = register_optimizer_step_post_hook(move)
    try:
        return run("data_sharding_demo", [])
    finally:
        hook.remove()


def here() -> Ranks:
    rank, size = dist.get_rank(), dist.get_world_size()
    return Ranks(rank, size, rank, size, "test", torch.device("cpu"))


def after(script: str, operation: str) -> object:
    """What this rank holds after an operation."""
    return importlib.import_module(script).OPERATIONS[operation](here()).after


def tampered(operation: str, call: str) -> tuple[int, str]:
    """Show an operation while the call of torch.distributed under it does nothing: exit code and stderr."""
    ops, honest, err = importlib.import_module("collective_ops"), getattr(dist, call), io.StringIO()
    setattr(dist, call, lambda *args, **kwargs: None)
    try:
        with contextlib.redirect_stderr(err):
            ops.show(ops.OPERATIONS[operation], here())
    except SystemExit as ended:
        return ended.code, err.getvalue()
    finally:
        setattr(dist, call, honest)
    return 0, err.getvalue()


def values(elements: int, dtype: torch.dtype, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    if dtype.is_floating_point:
        return torch.randn(elements, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 50, (elements,), generator=generator).to(dtype)


def ring_sum(elements: int, dtype: str, members: list[int] | None = None) -> dict | None:
    """The ring's sum beside torch's, and what was sent; None on ranks that are not members."""
    ring, kind = importlib.import_module("ring_all_reduce"), getattr(torch, dtype)
    group = dist.new_group(members) if members else None
    if members and dist.get_rank() not in members:
        return None
    mine = values(elements, kind, dist.get_rank())
    theirs, sent, batch = mine.clone(), [], dist.batch_isend_irecv
    dist.all_reduce(theirs, group=group)

    def counting(operations):
        sent.extend(operation.tensor.nbytes for operation in operations if operation.op is dist.isend)
        return batch(operations)

    dist.batch_isend_irecv = counting
    try:
        found = ring.ring_all_reduce(mine, group)
    finally:
        dist.batch_isend_irecv = batch
    return {"in_place": found is mine, "found": found.double().tolist(), "theirs": theirs.double().tolist(),
            "sent": sent}  # fmt: skip


def ring_of_a_transpose() -> bool:
    """A tensor whose elements do not lie in a row is summed in place too, and what lies between is left alone."""
    ring = importlib.import_module("ring_all_reduce")
    whole = torch.arange(35.0).view(5, 7).clone()
    ring.ring_all_reduce(whole[:, ::2].t())
    expected = torch.arange(35.0).view(5, 7).clone()
    expected[:, ::2] *= dist.get_world_size()
    return torch.equal(whole, expected)


def ring_that_forgets() -> tuple[int, str]:
    """The ring's own check, when the second half of the algorithm moves nothing on rank 1."""
    ring, err = importlib.import_module("ring_all_reduce"), io.StringIO()
    honest = ring._pass_on

    def dishonest(gone, come, group):
        kept = come.clone()
        honest(gone, come, group)
        if dist.get_rank() == 1:
            come.copy_(kept)

    ring._pass_on = dishonest
    try:
        with contextlib.redirect_stderr(err):
            ring.check(here(), torch.float32)
    except SystemExit as ended:
        return ended.code, err.getvalue()
    finally:
        ring._pass_on = honest
    return 0, err.getvalue()
