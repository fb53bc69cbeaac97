"""Step 5: ZeRO-1. Each rank keeps the optimizer state of its piece of every parameter, and steps that piece.

    torchrun --nproc-per-node=2 from_scratch/step_05_zero_1.py

1/n of the optimizer state a rank; the parameters are gathered after the step.
"""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from data_parallel import BucketedDataParallel
from sharded_optimizer import Zero1Optimizer

from common.data import TextConfig, text_datasets
from common.data_sharding import BatchConfig, BatchPlan, Loader
from common.optimizer import OptimizerConfig, build_optimizer
from common.ranks import join
from common.transformer import ModelConfig, Transformer

STEPS, SEED, CLIP = 12, 0, 1.0
# Samples, positions, heads and vocabulary (256 bytes, and 8 that never come) divide by 2, 3 and 4: by as many ranks.
BATCH, DATA = BatchConfig(global_size=24, micro_size=2), TextConfig(sequence_length=24)
MODEL = ModelConfig(vocabulary=264, width=48, layers=4, heads=12, kv_heads=12, ffn_width=96)
TOKENS = BATCH.global_size * DATA.sequence_length  # of one step


def main() -> None:
    ranks = join()
    train_set, _ = text_datasets(DATA, MODEL.vocabulary)
    loader = Loader(train_set, BatchPlan(BATCH, len(train_set), SEED, ranks.rank, ranks.world_size), ranks.device)
    model = Transformer(MODEL, SEED).to(ranks.device, torch.float64)
    model = BucketedDataParallel(model, bucket_bytes=200_000)  # small, so that there are several
    optimizer = build_optimizer(model.parameters(), OptimizerConfig(), ranks.device)
    optimizer = Zero1Optimizer(optimizer.param_groups, type(optimizer))  # with the same settings

    for step in range(STEPS):
        loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
        for (tokens, targets), is_last in loader.micro_batches(step):
            with nullcontext() if is_last else model.no_sync():
                micro_loss_sum = model(tokens, targets)  # over its tokens
                (micro_loss_sum * ranks.world_size / TOKENS).backward()  # the mean over ranks divides once more
                model.finish()
            loss_sum += micro_loss_sum.detach()
        dist.all_reduce(loss_sum)
        norm = optimizer.clip_grad_norm_(CLIP)  # of pieces, and yet the global norm
        optimizer.step()
        optimizer.zero_grad()
        if ranks.is_main:
            print(f"step {step:2}  loss {loss_sum.item() / TOKENS!r}  grad norm {norm.item()!r}")
    ranks.leave()


if __name__ == "__main__":
    main()
