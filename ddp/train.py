"""DDP: every rank holds the whole model; gradients are averaged over the ranks while backward is still running.

    torchrun --nproc-per-node=2 ddp/train.py                              # a laptop: about a minute, loss < 2.5
    torchrun --nproc-per-node=8 ddp/train.py --config ddp/configs/gpt_124m.yaml --train.steps 200    # 8 GPUs
    sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 ddp/multi_node.sbatch --config ddp/configs/gpt_124m.yaml

The whole difference to `ddp/single_device.py`: join the other ranks, take your part of the batch, wrap the model,
hold communication back until the last micro-batch, and sum what is measured over the ranks.
"""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from common.config import Config, parse
from common.data import text_datasets
from common.data_sharding import BatchPlan, Loader, evaluation_batches
from common.flops import explain, flops_per_token
from common.loss import count_valid
from common.optimizer import build_optimizer, learning_rate, set_learning_rate
from common.ranks import Ranks, join
from common.run import Run
from common.transformer import Transformer


@record  # torchrun then reports the rank that failed first, and why
def main(config: Config) -> None:
    ranks = join(config.device, config.timeout_s, config.network_profile)

    # ---- data: the batch of step N is a pure function of the seed and N
    train_set, validation_set = text_datasets(config.data, config.model.vocabulary)
    plan = BatchPlan(config.batch, len(train_set), config.seed, ranks.rank, ranks.world_size)
    loader = Loader(train_set, plan, ranks.device, config.data.workers)
    tokens_per_step = config.batch.global_size * config.data.sequence_length

    # ---- model: weights are kept in fp32 (fp64 for proofs); autocast computes in the low precision
    model = Transformer(config.model, config.seed).to(ranks.device)
    if config.train.precision == "fp64":
        model.double()
    if config.train.activation_checkpointing:
        model.checkpoint_activations()
    if config.train.compile:
        model.compile_blocks()
    low_precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.train.precision)
    autocast = torch.autocast(ranks.device.type, dtype=low_precision, enabled=low_precision is not None)

    # ---- the lesson: DDP copies rank 0's weights to all ranks, and from then on all-reduces gradients, in buckets,
    # as soon as backward has filled one. `model` stays the bare model, whose parameters the wrapper shares.
    ddp_model = DistributedDataParallel(model, device_ids=ranks.device_ids, gradient_as_bucket_view=True)

    # ---- optimizer; the scaler keeps small fp16 gradients from vanishing, and does nothing otherwise
    optimizer = build_optimizer(model.parameters(), config.optimizer, ranks.device)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.train.precision == "fp16")

    run = Run(config, ranks, "ddp", units_per_step=tokens_per_step, fingerprint=train_set.fingerprint(),
              flops_per_unit=flops_per_token(config.model, config.data.sequence_length))  # fmt: skip
    ranks.print(explain(config.model, config.data.sequence_length, ranks.device, config.train.precision))
    run.restore(model, optimizer, scaler)

    def validate() -> float:
        with autocast:
            return evaluate(model, validation_set, plan.micro_size, ranks)

    # ---- training
    for step in run.steps(validate):  # goes on where the last checkpoint ended
        lr = learning_rate(step, config.train.steps, config.optimizer)
        set_learning_rate(optimizer, lr)
        loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
        for (tokens, targets), is_last in loader.micro_batches(step):
            # Gradients add up locally; only the last micro-batch's backward sends them. no_sync must hold for the
            # forward too: it is there that DDP decides.
            with nullcontext() if is_last else ddp_model.no_sync():
                with autocast:
                    micro_loss_sum = ddp_model(tokens, targets)  # a sum over tokens, not a mean
                # Dividing by the tokens of the *global* batch makes the gradient the same for any accumulation; DDP
                # averages over the ranks where the global batch wants the sum, hence the world size.
                scaler.scale(micro_loss_sum * ranks.world_size / tokens_per_step).backward()
            loss_sum += micro_loss_sum.detach()
        scaler.unscale_(optimizer)
        grad_norm = clip_grad_norm_(model.parameters(), config.optimizer.clip)
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
    for tokens, targets in evaluation_batches(dataset, batch_size, ranks.device, ranks.rank, ranks.world_size):
        sums += torch.stack([model(tokens, targets).double(), count_valid(targets)])
    dist.all_reduce(sums)  # ranks may have had different numbers of samples: sums, never a mean of means
    loss, count = sums.tolist()
    return loss / count


if __name__ == "__main__":
    main(parse(Config))
