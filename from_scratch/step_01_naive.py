"""Step 1: data parallelism, naive. Each rank has the whole model and its part of the batch; gradients are averaged.

    torchrun --nproc-per-node=2 from_scratch/step_01_naive.py

The numbers are those of step 0, with 2, 3 and 4 ranks, here and in all steps that follow.
"""

import torch
import torch.distributed as dist
from data_parallel import NaiveDataParallel
from torch.nn.utils import clip_grad_norm_

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
    model = NaiveDataParallel(model)
    optimizer = build_optimizer(model.parameters(), OptimizerConfig(), ranks.device)

    for step in range(STEPS):
        loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
        for (tokens, targets), _ in loader.micro_batches(step):
            micro_loss_sum = model(tokens, targets)  # over its tokens
            (micro_loss_sum * ranks.world_size / TOKENS).backward()  # the mean over ranks divides once more
            model.finish()
            loss_sum += micro_loss_sum.detach()
        dist.all_reduce(loss_sum)
        norm = clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if ranks.is_main:
            print(f"step {step:2}  loss {loss_sum.item() / TOKENS!r}  grad norm {norm.item()!r}")
    ranks.leave()


if __name__ == "__main__":
    main()
