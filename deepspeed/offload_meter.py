"""Bytes behind the tensors of a DeepSpeed engine, by place and role: the meter of zero_offload.py."""

import gc
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from common.ranks import Ranks

HeldBytes = Counter[tuple[str, str]]  # (place, role) -> bytes


def storages(objects: Iterable[Any]) -> dict[int, tuple[torch.UntypedStorage, torch.Tensor]]:
    """Memory behind the tensors among the objects, by its identity; views of one memory count once."""
    found = {}
    for item in objects:
        if issubclass(type(item), torch.Tensor) and item.device.type != "meta" and item.layout == torch.strided:
            storage = item.untyped_storage()
            if storage.nbytes():
                found[storage._cdata] = (storage, item)
    return found


def owners(engine: Any) -> dict[str, list[Any]]:
    """Which tensors of an engine play which role; names of DeepSpeed 0.19."""
    zero, parameters = engine.optimizer, list(engine.module.parameters())
    master = list(getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups)
    averages = [value for entries in zero.optimizer.state.values() for value in entries.values()]
    partitions = getattr(zero, "averaged_gradients", None) or {}
    gradients = [tensor.grad for tensor in (*master, *parameters)] + [
        getattr(zero, "grad_partitions_flat_buffer", None)
    ]
    gradients += [tensor for group in partitions.values() for tensor in (group or [])]
    if swapper := getattr(zero, "optimizer_swapper", None):  # of sub-groups that are on disk, until the step
        gradients += [t for info in swapper.swap_params_info.values() for t in info.unswapped_gradients.values()]
    shards = [getattr(parameter, "ds_tensor", None) for parameter in parameters]
    return {"optimizer": master + averages, "gradients": gradients, "parameters": parameters + shards}


def host_buffers(engine: Any) -> list[Any]:
    """What DeepSpeed stages in host memory on the way to the device or the disk."""
    zero = engine.optimizer
    found = list(getattr(zero, "param_buffer_of_bit16_for_cpu_offload_groups", []))
    found.append(getattr(zero, "temp_grad_buffer_for_cpu_offload", None))
    if swapper := getattr(zero, "optimizer_swapper", None):
        found += swapper.swap_buffer_manager.all_buffers
    for parameter in engine.module.parameters():
        if swapper := getattr(parameter, "nvme_swapper", None):
            found += [swapper.buffers, swapper.partitioned_swap_buffer]
    return found


def measure(
    engine: Any, before: set[int], offloaded: dict[str, str | None], swap: Path | None, ranks: Ranks
) -> HeldBytes:
    """Return the bytes by place and role: tensors of this process that the engine brought, and swap files.

    Args:
        before: storages that are not the engine's, as `storages` names them.
        offloaded: by role where the settings put it: "cpu", "nvme", or None for the device.
        swap: the folder of the swap files, where there are any.
    """
    gc.collect()
    role_of = {key: role for role, tensors in owners(engine).items() for key in storages(tensors)}
    staged = set(storages(host_buffers(engine)))
    held: HeldBytes = Counter()
    for key, (storage, tensor) in storages(gc.get_objects()).items():
        if key in before:
            continue
        role = role_of.get(key, "buffers")
        if ranks.device.type == "cuda":  # as it is
            place = "device" if tensor.is_cuda else "pinned" if tensor.is_pinned() else "host"
        else:  # as the settings would have it
            place = "host" if key in staged or offloaded.get(role) else "device"
        held[place, role] += storage.nbytes()
    for path in swap.rglob("*") if swap else []:
        if path.is_file() and f"rank{ranks.rank}" in path.parts:
            of_parameters = path.parent.parent.name.endswith("params")
            role = "parameters" if of_parameters else "gradients" if "gradient" in path.name else "optimizer"
            held["disk", role] += path.stat().st_size
    return held
