"""FSDP: every rank keeps 1/n of parameters, gradients and optimizer state; a block is whole only while it computes.

    torchrun --nproc-per-node=2 fsdp/train.py                             # a laptop: about a minute, loss < 2.5
    torchrun --nproc-per-node=8 fsdp/train.py --config fsdp/configs/llama_1b.yaml --train.steps 200  # 8 GPUs
    sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 fsdp/multi_node.sbatch --config fsdp/configs/llama_8b.yaml

The whole difference to `ddp/train.py`: the model is born without memory, its blocks are wrapped one by one, precision
is a policy of the wrapper, and what was a tensor on every rank is a DTensor, of which each rank has a shard.
"""

import torch
import torch.distributed as dist
from settings import ShardedConfig, describe, mesh_shape, set_prefetch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.utils import clip_grad_norm_

from common.config import parse
from common.data import text_datasets
from common.data_sharding import BatchPlan, Loader, evaluation_batches
from common.flops import explain, flops_per_token
from common.loss import count_valid
from common.meta_device import fill_shards
from common.optimizer import build_optimizer, learning_rate, set_learning_rate
from common.ranks import Ranks, join
from common.run import Run
from common.transformer import Transformer


@record  # torchrun then reports the rank that failed first, and why
def main(config: ShardedConfig) -> None:
    ranks = join(config.device, config.timeout_s, config.network_profile)

    # ---- data: the batch of step N is a pure function of the seed and N
    train_set, validation_set = text_datasets(config.data, config.model.vocabulary)
    plan = BatchPlan(config.batch, len(train_set), config.seed, ranks.rank, ranks.world_size)
    loader = Loader(train_set, plan, ranks.device, config.data.workers)
    tokens_per_step = config.batch.global_size * config.data.sequence_length

    # ---- model: on the meta device its parameters have shapes and no memory
    with torch.device("meta"):
        model = Transformer(config.model)
    if config.train.precision == "fp64":
        model.double()
    if config.train.activation_checkpointing:
        model.checkpoint_activations()
    if config.train.compile:
        model.compile_blocks()

    # ---- the lesson: ranks along dp_shard share one copy of the model; along dp_replicate there are further copies
    copies, shards = mesh_shape(config.fsdp, ranks)
    mesh = init_device_mesh(ranks.device.type, (copies, shards), mesh_dim_names=("dp_replicate", "dp_shard"))
    # Units are gathered and computed with in the low precision; gradients are summed over the ranks in fp32. Inputs
    # stay as they are: hidden states have the right precision already, and rotary angles would lose theirs.
    low_precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.train.precision)
    policy = MixedPrecisionPolicy(
        param_dtype=low_precision, reduce_dtype=low_precision and torch.float32, cast_forward_inputs=False
    )
    offload = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda") if config.fsdp.cpu_offload else OffloadPolicy()
    # Each block is a unit, gathered and freed as one. The model itself takes what is left: embedding, last norm and
    # head, so that a tied weight is in one unit with both its uses.
    for unit in (*model.blocks.values(), model):
        fully_shard(
            unit,
            mesh=mesh if copies > 1 else mesh["dp_shard"],
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=None if config.fsdp.reshard_after_forward else False,  # None: all but the root
        )
    set_prefetch(list(model.blocks.values()), config.fsdp.prefetch)
    # Now shards get memory, and values.
    model.to_empty(device="cpu" if config.fsdp.cpu_offload else ranks.device)
    fill_shards(model, config.seed)

    # ---- optimizer; the scaler keeps small fp16 gradients from vanishing, and does nothing otherwise
    optimizer = build_optimizer(model.parameters(), config.optimizer, ranks.device)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.train.precision == "fp16")

    run = Run(config, ranks, "fsdp", units_per_step=tokens_per_step, fingerprint=train_set.fingerprint(),
              flops_per_unit=flops_per_token(config.model, config.data.sequence_length),
              mesh={"dp_replicate": copies, "dp_shard": shards})  # fmt: skip
    ranks.print(describe(model, policy))
    ranks.print(explain(config.model, config.data.sequence_length, ranks.device, config.train.precision))
    run.restore(model, optimizer, scaler)

    def validate() -> float:
        return evaluate(model, validation_set, plan.micro_size, ranks)

    # ---- training
    for step in run.steps(validate):  # goes on where the last checkpoint ended
        lr = learning_rate(step, config.train.steps, config.optimizer)
        set_learning_rate(optimizer, lr)
        loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
        for (tokens, targets), is_last in loader.micro_batches(step):
            # Until the last micro-batch gradients add up locally, whole: that saves messages and costs memory.
            model.set_requires_gradient_sync(is_last)
            micro_loss_sum = model(tokens, targets)  # a sum over tokens, not a mean
            # Dividing by the tokens of the *global* batch makes the gradient the same for any accumulation; FSDP
            # averages over the ranks where the global batch wants the sum, hence the world size.
            scaler.scale(micro_loss_sum * ranks.world_size / tokens_per_step).backward()
            loss_sum += micro_loss_sum.detach()
        scaler.unscale_(optimizer)
        grad_norm = clip_grad_norm_(model.parameters(), config.optimizer.clip).full_tensor()  # of all shards
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        run.log(step, loss_sum, grad_norm, lr)  # read one step late: the loop never waits for the device
        run.end_step(step, model, optimizer, scaler)  # saves; after that, `steps` evaluates
    run.finish()
    ranks.leave()  # a barrier, then the end of the process group


@torch.no_grad()
def evaluate(model: Transformer, dataset, batch_size: int, ranks: Ranks) -> float:
    """Mean loss per token over the validation set: the sum of all losses divided by the count of all tokens."""
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # loss, tokens
    place = ranks.rank, ranks.world_size
    # A forward gathers parameters: ranks with fewer samples join in with batches that do not count.
    for tokens, targets in evaluation_batches(dataset, batch_size, ranks.device, *place, equal_batches=True):
        sums += torch.stack([model(tokens, targets).double(), count_valid(targets)])
    dist.all_reduce(sums)  # ranks may have had different numbers of samples: sums, never a mean of means
    loss, count = sums.tolist()
    return loss / count


if __name__ == "__main__":
    main(parse(ShardedConfig))
