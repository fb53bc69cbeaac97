"""Step 0: one process, one device, nothing distributed. Every later step prints the same numbers.

    python from_scratch/step_00_one_process.py               # a few seconds; the loss falls from 5.6 to below 4.2

fp64, so that "the same" can mean 12 digits. The gradient norm is printed too: a loss alone hides wrong gradients.
"""

import torch
from torch.nn.utils import clip_grad_norm_

from common.data import TextConfig, text_datasets
from common.data_sharding import BatchConfig, BatchPlan, Loader
from common.optimizer import OptimizerConfig, build_optimizer
from common.ranks import single_process
from common.transformer import ModelConfig, Transformer

STEPS, SEED, CLIP = 12, 0, 1.0
# Samples, positions, heads and vocabulary (256 bytes, and 8 that never come) divide by 2, 3 and 4: by as many ranks.
BATCH, DATA = BatchConfig(global_size=24, micro_size=2), TextConfig(sequence_length=24)
MODEL = ModelConfig(vocabulary=264, width=48, layers=4, heads=12, kv_heads=12, ffn_width=96)
TOKENS = BATCH.global_size * DATA.sequence_length  # of one step


def main() -> None:
    ranks = single_process()
    train_set, _ = text_datasets(DATA, MODEL.vocabulary)
    loader = Loader(train_set, BatchPlan(BATCH, len(train_set), SEED), ranks.device)
    model = Transformer(MODEL, SEED).to(ranks.device, torch.float64)
    optimizer = build_optimizer(model.parameters(), OptimizerConfig(), ranks.device)

    for step in range(STEPS):
        loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
        for (tokens, targets), _ in loader.micro_batches(step):
            micro_loss_sum = model(tokens, targets)  # over its tokens
            (micro_loss_sum / TOKENS).backward()
            loss_sum += micro_loss_sum.detach()
        norm = clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step:2}  loss {loss_sum.item() / TOKENS!r}  grad norm {norm.item()!r}")


if __name__ == "__main__":
    main()
