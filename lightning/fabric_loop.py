"""Fabric: the loop stays yours; Lightning starts the processes, wraps the model and minds the precision.

    python lightning/fabric_loop.py --devices 2                # Lightning starts the second process; loss < 2.5
    torchrun --nproc-per-node=2 lightning/fabric_loop.py       # the same under torchrun
    srun --ntasks-per-node=2 python lightning/fabric_loop.py   # and under Slurm, one task a device

The whole difference to `ddp/train.py`: who joins the ranks, wraps the model, minds the precision, and holds gradients
back; the loop is the same. What Lightning's Trainer does out of sight stands here in the open: the README says which of
its hooks is which line.
"""

from datetime import timedelta

import environment  # noqa: F401  (first: it says when lightning is missing)
import torch
from launch import read_launch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from settings import FabricConfig, arguments_and_file
from torch.distributed.elastic.multiprocessing.errors import record

from common.config import parse
from common.data import text_datasets
from common.data_sharding import BatchPlan, Loader, evaluation_batches
from common.flops import explain, flops_per_token
from common.loss import count_valid
from common.optimizer import build_optimizer, learning_rate, set_learning_rate
from common.ranks import Ranks, fail
from common.run import Run
from common.transformer import Transformer

# fp64 is not Fabric's "64-true": that hands back what a model returns, here the loss, rounded to fp32.
PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp64": "32-true"}


@record  # torchrun then reports the rank that failed first, and why
def main(config: FabricConfig) -> None:
    # ---- the lesson: Fabric joins the other ranks, or starts them: then each runs this script from the top
    if config.train.precision == "fp16":
        fail("train.precision = fp16: Fabric cannot clip gradients that a fused optimizer unscales; use bf16")
    launch = read_launch(config, "ddp")
    timeout = timedelta(seconds=config.timeout_s)
    strategy = DDPStrategy(timeout=timeout, gradient_as_bucket_view=True)
    where = {"accelerator": launch.device_type, "devices": launch.devices, "num_nodes": launch.nodes}
    fabric = Fabric(strategy=strategy, precision=PRECISION[config.train.precision], **where)
    fabric.launch()
    local_rank, local_world_size = fabric.local_rank, launch.devices
    ranks = Ranks(fabric.global_rank, fabric.world_size, local_rank, local_world_size, launch.launcher, fabric.device)
    ranks.meet()  # `join` does it where there is no Fabric

    # ---- data: the batch of step N is a pure function of the seed and N
    train_set, validation_set = text_datasets(config.data, config.model.vocabulary)
    plan = BatchPlan(config.batch, len(train_set), config.seed, ranks.rank, ranks.world_size)
    # Not setup_dataloaders: that would cut up the data by its own rule.
    loader = Loader(train_set, plan, ranks.device, config.data.workers)
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
        config, ranks, "ddp", units_per_step=tokens_per_step,
        flops_per_unit=flops, fingerprint=train_set.fingerprint(), framework="lightning",
    )  # fmt: skip
    ranks.print(explain(config.model, config.data.sequence_length, ranks.device, config.train.precision))
    run.restore(model, optimizer)

    def validate() -> float:
        with fabric.autocast():
            return evaluate(model, validation_set, plan.micro_size, ranks, fabric)

    # ---- training
    for step in run.steps(validate):  # goes on where the last checkpoint ended
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
        run.end_step(step, model, optimizer)  # saves; after that, `steps` evaluates
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


if __name__ == "__main__":
    main(parse(FabricConfig, arguments_and_file()))
