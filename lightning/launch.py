"""Who started how many processes, and which launches cannot work.

Lightning looks at the environment too, but its mistakes come as tracebacks, or as n processes that each train alone, or
as a job that waits for ranks that nothing starts. Here they are one-line errors, on every rank, before anything else.
"""

import logging
import os
import warnings
from typing import Any, NamedTuple

import torch
from settings import LightningConfig

from common.launching import network
from common.launching.launch import whole_number
from common.ranks import LaunchInfo, choose_device, fail, prepare_process_group, read_environment

warnings.filterwarnings("ignore", ".*srun. command is available")  # `read_launch` knows better
warnings.filterwarnings("ignore", ".*treespec, LeafSpec", FutureWarning)  # Lightning's, about torch's


class Launch(NamedTuple):
    """How many processes there are or will be, and who starts them."""

    devices: int
    """On each node."""
    nodes: int
    launcher: str
    """torchrun, srun or lightning (plain python)."""
    device_type: str
    """cpu or cuda."""

    @property
    def world_size(self) -> int:
        return self.devices * self.nodes


def read_launch(config: Any, strategy: str) -> Launch:
    """Find out who started how many processes, whether Lightning will see the same, and set the network's variables.

    Args:
        config: settings with `device`, `devices`, `timeout_s` and `network_profile`.
        strategy: for the one line about n processes that would each train alone.

    Raises:
        SystemExit: (exit code 2) the launcher and the settings contradict each other.
    """
    prepare_process_group(config.timeout_s)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # no tips, and no lines about TPUs
    env = os.environ
    if {"LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_PORT"} <= env.keys() and "RANK" not in env:
        # One of those that the first process has started: Lightning's launcher names the local rank alone.
        size, local_rank = (whole_number(env, name, "lightning") for name in ("WORLD_SIZE", "LOCAL_RANK"))
        info, launcher, nodes = LaunchInfo(local_rank, size, local_rank, size, "lightning"), "lightning", 1
    else:
        info = read_environment()
        launcher, nodes = info.launcher, info.world_size // info.local_world_size
        if launcher == "python":
            launcher = "lightning"
            # Lightning takes any process with SLURM_NTASKS for a task of an srun step (but for these job names).
            in_step, hidden = "SLURM_STEP_NUM_TASKS" in env, env.get("SLURM_JOB_NAME") in ("bash", "interactive")
            if "SLURM_NTASKS" in env and not hidden:
                if not in_step:
                    found = f"plain python in Slurm job {env.get('SLURM_JOB_ID')}"
                    fail(f"{found}, which Lightning takes for one of its tasks; write srun before python, or torchrun")
                launcher = "srun"
        if launcher == "srun":
            _check_srun(info)
        elif launcher not in ("torchrun", "lightning"):
            fail(f"started by {launcher}; expected torchrun, srun with one task a device, or plain python (devices=N)")

    devices = info.local_world_size
    if launcher == "lightning" and info.world_size == 1:
        gpus = torch.cuda.device_count() if choose_device(config.device, info).type == "cuda" else 0
        devices = config.devices or (1 if strategy == "single_device" else max(1, gpus))
    elif config.devices not in (None, devices):
        how = {"srun": "--ntasks-per-node", "torchrun": "--nproc-per-node"}.get(launcher, "--devices")
        found = f"devices = {config.devices}, but {launcher} started {devices} process(es) on each node"
        fail(f"{found}; make {how} equal to devices, or leave devices out")
    device = choose_device(config.device, info)
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        found = f"{devices} process(es) on this node, and each sees {gpus} GPU(s)"
        if launcher == "srun" and gpus != devices:  # with fewer tasks, GPUs would idle and nobody notice
            advice = "make --ntasks-per-node and --gpus-per-node equal"
            fail(f"{found}; {advice} (not --gpus-per-task: Lightning wants each to see all)")
        if gpus < devices:
            fail(f"{found}; start one process per GPU, or use --device cpu")
    launch = Launch(devices, nodes, launcher, device.type)
    if strategy == "single_device" and launch.world_size > 1:
        found = f"strategy = single_device, and {launch.world_size} processes: as many identical runs"
        fail(f"{found}; start one (srun: --ntasks-per-node=1), or set strategy to ddp")
    try:
        network.apply(config.network_profile)
    except ValueError as error:
        fail(str(error))
    return launch


def _check_srun(info: LaunchInfo) -> None:
    """SystemExit, in one line: Lightning would misread this srun step, or raise."""
    env = os.environ
    if env.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        name = env["SLURM_JOB_NAME"]
        fail(f"in a job named {name} Lightning does not look for srun's tasks; name the job otherwise, or use torchrun")
    per_node = env.get("SLURM_NTASKS_PER_NODE")
    if per_node is None and info.world_size > 1:
        fail(f"srun started {info.world_size} tasks by --ntasks; Lightning wants --ntasks-per-node=N, one a device")
    if per_node is not None and whole_number(env, "SLURM_NTASKS_PER_NODE", "srun", 1) != info.local_world_size:
        found = f"--ntasks-per-node={per_node}, but this step has {info.local_world_size} task(s) on a node"
        fail(f"{found}; give srun the job's own --ntasks-per-node, one a device")


def mesh_shape(config: LightningConfig, launch: Launch) -> tuple[int, int]:
    """Data-parallel and tensor-parallel ranks of this strategy. SystemExit: it does not divide, or cannot run here."""
    world = launch.world_size
    if config.strategy == "deepspeed":
        if launch.device_type != "cuda":
            fail("strategy = deepspeed: Lightning's DeepSpeedStrategy wants GPUs; deepspeed/train.py runs on the CPU")
        if config.batch.micro_size not in (None, config.batch.global_size // world):
            found = f"batch.micro_size = {config.batch.micro_size} with strategy = deepspeed"
            fail(f"{found}: DeepSpeed and Lightning would both divide by the accumulation; leave batch.micro_size out")
        if config.checkpoint.every:
            found = f"checkpoint.every = {config.checkpoint.every} with strategy = deepspeed"
            fail(f"{found}: only the end is saved, in DeepSpeed's own format; leave it out, or use deepspeed/train.py")
        if config.resume not in ("auto", "never") or config.train.precision == "fp64":
            found = f"resume = {config.resume}, train.precision = {config.train.precision} with strategy = deepspeed"
            fail(f"{found}; expected auto, and fp32, bf16 or fp16; deepspeed/train.py resumes")
    if config.strategy in ("fsdp", "tensor_parallel") and config.train.precision == "fp16":
        found = f"train.precision = fp16 with strategy = {config.strategy}"
        fail(f"{found}: Lightning's ModelParallelStrategy has no gradient scaler; use bf16")
    if config.strategy != "tensor_parallel":
        return world, 1
    rows, columns, depth = config.tp_dimensions or [world, 1, 1]
    if rows * columns * depth != world:
        found = f"tp_dimensions = {config.tp_dimensions} with {world} rank(s)"
        fail(f"{found}; expected a product of {world}: start {rows * columns * depth} processes, or change one of them")
    model = config.model
    if model.experts:
        fail(f"model.experts = {model.experts}; expected dense layers for this tensor parallelism; set it to 0")
    for name in ("heads", "kv_heads", "ffn_width", "vocabulary"):
        if (size := getattr(model, name)) % rows:
            found = f"model.{name} = {size}, which does not divide among {rows} tensor ranks"
            fail(f"{found}; expected a multiple of {rows}; change it, or tp_dimensions")
    return depth, rows
