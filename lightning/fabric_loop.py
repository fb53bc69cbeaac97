"""Fabric: the loop stays yours; Lightning starts the processes, wraps the model and minds the precision.

    python lightning/fabric_loop.py --devices 2                # Lightning starts the second process; loss < 2.5
    torchrun --nproc-per-node=2 lightning/fabric_loop.py       # the same under torchrun
    srun --ntasks-per-node=2 python lightning/fabric_loop.py   # and under Slurm, one task a device

The whole difference to `ddp/train.py`: who joins the ranks, wraps the model, minds the precision, and holds gradients
back; the loop is the same. What Lightning's Trainer does out of sight stands here in the open: the README says which of
its hooks is which line.
"""

import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.strategies import DDPStrategy
from torch.distributed.elastic.multiprocessing.errors import record

from common import network
from common.config import Config, RunConfig, parse
from common.data import text_datasets
from common.data_sharding import BatchPlan, Loader, evaluation_batches
from common.flops import explain, flops_per_token
from common.loss import count_valid
from common.optimizer import build_optimizer, learning_rate, set_learning_rate
from common.ranks import Place, Ranks, choose_device, fail, read_environment
from common.run import Run
from common.transformer import Transformer

# fp64 is not Fabric's "64-true": that hands back what a model returns, here the loss, rounded to fp32.
PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp64": "32-true"}


@dataclass
class FabricConfig(Config):
    """The settings of `ddp/train.py`, and one for Lightning's own launcher."""

    devices: int | None = None
    """Processes on each node. Default: as many as torchrun or srun started; else one per GPU, or one on the CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.devices is not None and self.devices < 1:
            raise ValueError(f"devices = {self.devices} cannot work; allowed: at least 1, or null")


@record  # torchrun then reports the rank that failed first, and why
def main(config: FabricConfig) -> None:
    # ---- the lesson: Fabric joins the other ranks, or starts them: then each runs this script from the top
    launcher, where = placement(config)
    timeout = timedelta(seconds=config.timeout_s)
    strategy = DDPStrategy(timeout=timeout, gradient_as_bucket_view=True)
    fabric = Fabric(strategy=strategy, precision=PRECISION[config.train.precision], **where)
    fabric.launch()
    ranks = Ranks(fabric.global_rank, fabric.world_size, fabric.local_rank, where["devices"], launcher, fabric.device)

    # ---- data: the batch of step N is a pure function of the seed and N
    train_set, validation_set = text_datasets(config.data, config.model.vocabulary)
    plan = BatchPlan(config.batch, len(train_set), config.seed, ranks.rank, ranks.world_size)
    loader = Loader(train_set, plan, ranks.device)  # not setup_dataloaders: that would cut up the data by its own rule
    tokens_per_step = config.batch.global_size * config.data.sequence_length

    # ---- model: weights are kept in fp32 (fp64 for proofs); Fabric computes in the low precision
    model = Transformer(config.model, config.seed)
    if config.train.precision == "fp64":
        model.double()
    if config.train.activation_checkpointing:
        model.checkpoint_activations()
    if config.train.compile:
        model.compile_blocks()

    # ---- the lesson: setup moves the model to the device and wraps it in DDP, in autocast and in a class of its own.
    # `model` and `optimizer` stay the bare ones, which the wrappers share: so checkpoints fit every other script.
    optimizer = build_optimizer(model.parameters(), config.optimizer, ranks.device)
    fabric_model, fabric_optimizer = fabric.setup(model, optimizer)

    flops = flops_per_token(config.model, config.data.sequence_length)
    run = Run(
        config, ranks, "ddp", tokens_per_step,
        flops_per_unit=flops, fingerprint=train_set.fingerprint(), framework="lightning",
    )  # fmt: skip
    run.say(explain(config.model, config.data.sequence_length, ranks.device, config.train.precision))
    run.restore(model, optimizer)

    # ---- training
    for step in run.steps():  # goes on where the last checkpoint ended
        lr = learning_rate(step, config.train.steps, config.optimizer)
        set_learning_rate(optimizer, lr)
        loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
        for (tokens, targets), is_last in loader.micro_batches(step):
            # Gradients add up locally; only the last micro-batch's backward sends them. no_backward_sync must hold for
            # the forward too: it is there that DDP decides.
            with fabric.no_backward_sync(fabric_model, enabled=not is_last):
                micro_loss_sum = fabric_model(tokens, targets)  # a sum over tokens, not a mean; autocast is inside
                # Dividing by the tokens of the *global* batch makes the gradient the same for any accumulation; DDP
                # averages over the ranks where the global batch wants the sum, hence the world size.
                fabric.backward(micro_loss_sum * ranks.world_size / tokens_per_step)
            loss_sum += micro_loss_sum.detach()
        clip = {"max_norm": config.optimizer.clip, "error_if_nonfinite": False}  # Run ends a loss that is not finite
        grad_norm = fabric.clip_gradients(fabric_model, fabric_optimizer, **clip)
        fabric_optimizer.step()
        optimizer.zero_grad()
        run.log(step, loss_sum, grad_norm, lr)  # read one step late: the loop never waits for the device

        if run.wants_evaluation(step):
            with fabric.autocast():
                run.log_validation(step, evaluate(model, validation_set, plan.micro_size, ranks, fabric))
        run.save_if_due(step, model, optimizer)
    run.finish()
    ranks.leave()  # a barrier, then the end of the process group


@torch.no_grad()
def evaluate(model: Transformer, dataset, batch_size: int, ranks: Ranks, fabric: Fabric) -> float:
    """Mean loss per token over the validation set: the sum of all losses divided by the count of all tokens."""
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # loss, tokens
    for tokens, targets in evaluation_batches(dataset, batch_size, ranks.device, ranks.rank, ranks.world_size):
        sums += torch.stack([model(tokens, targets).double(), count_valid(targets)])
    # Ranks may have had different numbers of samples: sums, never a mean of means. all_reduce's default is the mean.
    loss, count = fabric.all_reduce(sums, reduce_op="sum").tolist()
    return loss / count


def placement(config: RunConfig) -> tuple[str, dict[str, Any]]:
    """Who started this process, and what Fabric (or the Trainer, which takes the same words) has to be told of it.

    Lightning would find the launcher by itself, too. But it takes every process with SLURM_NTASKS in its environment
    for a task of srun, plain python in a job file included, and then waits for the others; `read_environment` looks
    at the step.

    Args:
        config: settings with a field `devices`.

    Returns:
        The launcher's name, and accelerator, devices (processes on each node), num_nodes and plugins as keywords.

    Raises:
        SystemExit: (exit code 2) half-set environment, devices that the launcher or the machine contradicts.
    """
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they greet at length
    # Lightning's launcher starts the script again with these, and without RANK.
    is_child = {"LOCAL_RANK", "NODE_RANK"} <= os.environ.keys() and "RANK" not in os.environ
    place = Place(0, 1, int(os.environ["LOCAL_RANK"]), 1, "lightning") if is_child else read_environment()
    environment: Any = LightningEnvironment()
    accelerator = choose_device(config.device, place).type
    if place.launcher in ("python", "lightning"):
        devices, nodes = config.devices or (torch.cuda.device_count() if accelerator == "cuda" else 1), 1
        launcher = "python" if devices == 1 else "lightning"
    else:
        devices, launcher = place.local_world_size, place.launcher
        nodes, rest = divmod(place.world_size, devices)
        if rest or config.devices not in (None, devices):
            found = f"devices = {config.devices or devices}, but {launcher} started {place.world_size} processes"
            fail(f"{found}, {devices} on this node; Lightning wants `devices` on every node: leave --devices out")
        if launcher != "srun":  # mpirun has names of its own for these
            rank, size, local = str(place.rank), str(place.world_size), str(place.local_rank)
            address, port = place.master_addr, str(place.master_port)
            os.environ.update(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=local, MASTER_ADDR=address, MASTER_PORT=port)
            environment = TorchElasticEnvironment()
    try:
        if launcher == "srun":
            environment = SLURMEnvironment(auto_requeue=False)  # slurm/job_env.sh sees to that, for every framework
        environment.validate_settings(devices, nodes)
        network.apply(config.network_profile)
    except (RuntimeError, ValueError) as error:
        fail(str(error))

    if accelerator == "cuda" and devices > torch.cuda.device_count():
        found = f"devices = {devices}, but this process sees {torch.cuda.device_count()} GPU(s)"
        fail(f"{found}; Lightning wants to see all of a node's: fewer devices, or no --gpus-per-task")
    if config.train.precision == "fp16":  # lightning/fabric/plugins/precision/amp.py; on a CPU it would take bf16
        fail("train.precision = fp16: Lightning cannot clip gradients that a fused optimizer unscales; ask for bf16")
    return launcher, {"accelerator": accelerator, "devices": devices, "num_nodes": nodes, "plugins": [environment]}


if __name__ == "__main__":
    main(parse(FabricConfig))
