"""The baseline: one process on one device, with everything a real training needs and nothing distributed.

    python ddp/single_device.py                                            # about a minute on a laptop, loss < 2.5
    python ddp/single_device.py --train.precision bf16 --batch.micro_size 6     # autocast, accumulation of 4
    python ddp/single_device.py --config ddp/configs/gpt_124m.yaml --train.steps 200   # on a GPU

Precision, gradient accumulation, clipping, warm-up and cosine decay, evaluation, checkpoint and resume, activation
checkpointing and compilation stand here in the open. `ddp/train.py` is this script plus DDP, and nothing else.
"""

import torch
from torch.nn.utils import clip_grad_norm_

from common.config import Config, parse
from common.data import text_datasets
from common.data_sharding import BatchPlan, Loader, evaluation_batches
from common.flops import explain, flops_per_token
from common.loss import count_valid
from common.optimizer import build_optimizer, learning_rate, set_learning_rate
from common.ranks import single_process
from common.run import Run
from common.transformer import Transformer


def main(config: Config) -> None:
    ranks = single_process(config.device)

    # ---- data: the batch of step N is a pure function of the seed and N
    train_set, validation_set = text_datasets(config.data, config.model.vocabulary)
    plan = BatchPlan(config.batch, len(train_set), config.seed)
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

    # ---- optimizer; the scaler keeps small fp16 gradients from vanishing, and does nothing otherwise
    optimizer = build_optimizer(model.parameters(), config.optimizer, ranks.device)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.train.precision == "fp16")

    run = Run(config, ranks, "single", units_per_step=tokens_per_step, fingerprint=train_set.fingerprint(),
              flops_per_unit=flops_per_token(config.model, config.data.sequence_length))  # fmt: skip
    ranks.print(explain(config.model, config.data.sequence_length, ranks.device, config.train.precision))
    run.restore(model, optimizer, scaler)

    def validate() -> float:
        with autocast:
            return evaluate(model, validation_set, plan.micro_size, ranks.device)

    # ---- training
    for step in run.steps(validate):  # goes on where the last checkpoint ended
        lr = learning_rate(step, config.train.steps, config.optimizer)
        set_learning_rate(optimizer, lr)
        loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
        for (tokens, targets), _ in loader.micro_batches(step):
            with autocast:
                micro_loss_sum = model(tokens, targets)  # a sum over tokens, not a mean
            # Dividing by the tokens of the *global* batch makes the gradient the same for any accumulation.
            scaler.scale(micro_loss_sum / tokens_per_step).backward()
            loss_sum += micro_loss_sum.detach()
        scaler.unscale_(optimizer)
        grad_norm = clip_grad_norm_(model.parameters(), config.optimizer.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        run.log(step, loss_sum, grad_norm, lr)  # read one step late: the loop never waits for the device
        run.end_step(step, model, optimizer, scaler)  # saves; after that, `steps` evaluates
    run.finish()


@torch.no_grad()
def evaluate(model: Transformer, dataset, batch_size: int, device: torch.device) -> float:
    """Mean loss per token over the validation set: the sum of all losses divided by the count of all tokens."""
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, tokens
    for tokens, targets in evaluation_batches(dataset, batch_size, device):
        sums += torch.stack([model(tokens, targets).double(), count_valid(targets)])
    loss, count = sums.tolist()
    return loss / count


if __name__ == "__main__":
    main(parse(Config))
