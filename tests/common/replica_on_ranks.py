"""What the ranks of a `group` run for test_replica_check.py."""

import torch
import torch.distributed as dist
from ranks_on_ranks import ended
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from common.replica_check import check_replicas, differing_replicas


def build(dtype="float32"):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 5), torch.nn.Linear(5, 6), torch.nn.BatchNorm1d(6)]
    return torch.nn.Sequential(*layers).to(getattr(torch, dtype))


def flip_lowest_bit(tensor):
    with torch.no_grad():
        tensor.view(-1)[:1].view(torch.int32).bitwise_xor_(1)


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def compare(dtype, where, on_ranks):
    model = build(dtype)
    if dist.get_rank() in on_ranks:
        flip_lowest_bit(tensors(model)[where])
    return differing_replicas(model)


def compare_two(dtype):
    model = build(dtype)
    if dist.get_rank() == 1:
        flip_lowest_bit(tensors(model)["1.bias"])
        flip_lowest_bit(tensors(model)["0.weight"])
    return differing_replicas(model)


def collectives():
    called = []
    kept = dist.all_reduce, dist.all_gather
    try:
        dist.all_reduce = lambda *a, **k: (called.append("all_reduce"), kept[0](*a, **k))[1]
        dist.all_gather = lambda *a, **k: (called.append("all_gather"), kept[1](*a, **k))[1]
        assert differing_replicas(build()) is None
    finally:
        dist.all_reduce, dist.all_gather = kept
    return called


def on_a_mesh(flipped):
    """A weight that is cut along one axis of 2 × 2 ranks and copied along the other; a bias with four copies."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))
    model = build()[0]
    placed = {"weight": (Replicate(), Shard(0)), "bias": (Replicate(), Replicate())}
    for name, placements in placed.items():
        whole = distribute_tensor(getattr(model, name).detach(), mesh, placements, src_data_rank=None)
        setattr(model, name, torch.nn.Parameter(whole))
    if flipped and dist.get_rank() == 3:
        flip_lowest_bit(getattr(model, flipped).to_local())
    return ended(check_replicas, model, 7) if flipped else differing_replicas(model)


def ends():
    model = build()
    if dist.get_rank() == 2:
        flip_lowest_bit(model[1].weight)
    return ended(check_replicas, model, 7)
