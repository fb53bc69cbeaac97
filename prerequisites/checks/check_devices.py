"""Nodes, ranks and GPUs: as many as the job asked for? Does each GPU compute, and does every rank take part?

    srun --ntasks-per-node=8 --gpus-per-node=8 python prerequisites/checks/check_devices.py       # in a Slurm job
    torchrun … prerequisites/checks/check_devices.py                                              # likewise

What was asked for is read from Slurm's variables on every node, what there is from the processes themselves. Where
DEVICE=cpu, the GPUs are counted by CUDA_VISIBLE_DEVICES, and the CPU computes.
"""

import os
import socket
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from reporting import Result, count, finish, ok, problem
from torch.distributed.elastic.multiprocessing.errors import record

from common.launching.launch import allocated_gpus
from common.ranks import Ranks, fail, join

SIDE = 1024


@dataclass(frozen=True)
class Sight:
    """What one rank finds. `visible`: its GPUs, by UUID on CUDA, else by Slurm's numbers; `device`: its own."""

    host: str
    allocated: int  # SLURM_GPUS_ON_NODE
    listed: int  # entries of CUDA_VISIBLE_DEVICES
    visible: tuple[str, ...]
    device: str


def look(me: Ranks) -> Sight:
    """What this rank finds on its node."""
    shown = allocated_gpus(os.environ).get("CUDA_VISIBLE_DEVICES", "")  # without Slurm's NoDevFiles
    host, listed = socket.gethostname(), [v for v in shown.split(",") if v]
    visible = tuple(listed)
    device = listed[min(me.local_rank, len(listed) - 1)] if listed else "none"
    if me.device.type == "cuda":
        visible = tuple(str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count()))
        device = visible[me.device.index]
    return Sight(host, count(os.environ.get("SLURM_GPUS_ON_NODE")), len(listed), visible, device)


def judge(sights: list[Sight], nodes: int, gpus: int, launcher: str) -> list[Result]:
    """What all ranks found against what was asked for: `nodes` with `gpus` each, and a rank for each GPU."""
    hosts: dict[str, list[Sight]] = {}
    for sight in sights:
        hosts.setdefault(sight.host, []).append(sight)
    results = []

    def compare(name: str, found: str, right: bool, advice: str) -> None:
        results.append(ok(name, found) if right else problem(name, found, advice))

    names = ", ".join(sorted(hosts))
    advice = "one task a node, or one a GPU, on every node: --ntasks-per-node"
    compare("nodes", f"ranks on {len(hosts)} ({names}), asked for {nodes}", len(hosts) == nodes, advice)
    per_host = ", ".join(f"{len(some)} on {host}" for host, some in sorted(hosts.items()))
    found = f"{len(sights)} started by {launcher} ({per_host}), asked for {nodes} × {gpus} GPUs = {nodes * gpus}"
    right = len(sights) == nodes * gpus and all(len(some) == gpus for some in hosts.values())
    compare("ranks", found, right, "--ntasks-per-node equal to --gpus-per-node, or torchrun's --nproc-per-node")
    for host, some in sorted(hosts.items()):
        seen = {gpu for sight in some for gpu in sight.visible}  # a task may see but its own
        allocated = sorted({sight.allocated for sight in some})
        found = f"{host}: {len(seen)} visible, {'/'.join(map(str, allocated))} allocated, asked for {gpus}"
        advice = "nvidia-smi on that node, with its administrators; no --gpus-per-task beside --gpus-per-node"
        compare("GPUs", found, len(seen) == gpus and allocated == [gpus], advice)
        if blind := [sight for sight in some if sight.listed != len(sight.visible)]:
            found = f"{host}: CUDA_VISIBLE_DEVICES names {blind[0].listed}, torch finds {len(blind[0].visible)}"
            results.append(problem("GPUs", found, "look at nvidia-smi there; set CUDA_VISIBLE_DEVICES nowhere"))
    devices = [(sight.host, sight.device) for sight in sights]
    shared = sorted({f"{device} on {host}" for host, device in devices if devices.count((host, device)) > 1})
    found = f"two ranks share {', '.join(shared)}" if shared else f"{len(set(devices))} different ones, a rank on each"
    compare("devices", found, not shared and all(device != "none" for _, device in devices), "use LOCAL_RANK as index")
    return results


def multiply(device: torch.device) -> Result:
    """The product of two matrices on the device against the CPU's in fp64.

    The entries are whole numbers from -4 to 4, so that every sum is exact, also in fp32 and in TF32.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-4, 5, (SIDE, SIDE), generator=generator).double() for _ in range(2))
    x, y = a.float().to(device), b.float().to(device)
    wrong = int(((x @ y).cpu().double() != a @ b).sum())
    finish_device = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    finish_device()
    start, repeats = time.perf_counter(), 5
    for _ in range(repeats):
        x @ y
    finish_device()
    speed = 2 * SIDE**3 * repeats / (time.perf_counter() - start) / 1e9
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    if wrong:
        found = f"{wrong:,} of {SIDE**2:,} entries of a product are wrong on {what} of {socket.gethostname()}"
        return problem("product", found, "trust no training there; have this device examined")
    return ok("product", f"{SIDE} × {SIDE} fp32 exact on {what}, {speed:,.0f} GFLOP/s")


def take_part(me: Ranks) -> list[Result]:
    """An all-reduce and an all-gather in which every rank leaves a mark of its own."""
    marks = torch.zeros(me.world_size, dtype=torch.int64, device=me.device)
    marks[me.rank] = me.rank + 1
    dist.all_reduce(marks)
    parts = [torch.zeros(1, dtype=torch.int64, device=me.device) for _ in range(me.world_size)]
    dist.all_gather(parts, torch.tensor([me.rank + 1], device=me.device))
    results = []
    for name, found in (("all-reduce", marks.tolist()), ("all-gather", torch.cat(parts).tolist())):
        missing = [rank for rank, mark in enumerate(found) if mark != rank + 1]
        if missing:
            advice = "trust no training here; repeat with NCCL_DEBUG=INFO or TORCH_DISTRIBUTED_DEBUG=DETAIL"
            results.append(problem(name, f"the part of rank(s) {missing} is missing or wrong", advice))
        else:
            backend = "NCCL" if me.device.type == "cuda" else "Gloo"
            results.append(ok(name, f"the parts of all {me.world_size} ranks arrived, over {backend}"))
    return results


@record
def main() -> None:
    if not os.environ.get("SLURM_JOB_ID"):
        fail("this is no Slurm job, so nothing was asked for; submit prerequisites/checks/one_device.sbatch")
    me = join(timeout_s=60)
    nodes = count(os.environ.get("SLURM_JOB_NUM_NODES"), 1)
    gpus = count(os.environ.get("SLURM_GPUS_PER_NODE") or os.environ.get("SLURM_GPUS_ON_NODE"))
    sights = me.all_gather(look(me))
    results = judge(sights, nodes, gpus, me.launcher) if me.is_main else []
    results.append(multiply(me.device))
    together = take_part(me)
    finish(results + (together if me.is_main or any(r.status != "ok" for r in together) else []), me)


if __name__ == "__main__":
    main()
