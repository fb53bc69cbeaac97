"""Step 10: pipeline. Each rank has some of the layers, and micro-batches pass from rank to rank.

    torchrun --nproc-per-node=2 from_scratch/step_10_pipeline.py

The least bytes of all; in return ranks wait for each other at both ends of a step.
"""

import torch
import torch.distributed as dist
from pipeline_parallel import Pipeline, connect

from common.data import TextConfig, text_datasets
from common.data_sharding import BatchConfig, BatchPlan, Loader
from common.optimizer import OptimizerConfig, build_optimizer
from common.ranks import fail, join
from common.transformer import ModelConfig

STEPS, SEED, CLIP = 12, 0, 1.0
# Samples, positions, heads and vocabulary (256 bytes, and 8 that never come) divide by 2, 3 and 4: by as many ranks.
BATCH, DATA = BatchConfig(global_size=24, micro_size=2), TextConfig(sequence_length=24)
MODEL = ModelConfig(vocabulary=264, width=48, layers=4, heads=12, kv_heads=12, ffn_width=96)
TOKENS = BATCH.global_size * DATA.sequence_length  # of one step


def main() -> None:
    ranks = join()
    train_set, _ = text_datasets(DATA, MODEL.vocabulary)
    loader = Loader(train_set, BatchPlan(BATCH, len(train_set), SEED), ranks.device)
    edges = connect([list(range(ranks.world_size))])  # a group of two for each edge
    try:
        model = Pipeline(
            MODEL, SEED, DATA.sequence_length, dist.group.WORLD, edges, "1f1b", device=ranks.device, dtype=torch.float64
        )
    except ValueError as error:  # more ranks than layers
        fail(str(error))
    optimizer = build_optimizer(model.stages.parameters(), OptimizerConfig(), ranks.device)

    for step in range(STEPS):
        micro_batches = [micro_batch for micro_batch, _ in loader.micro_batches(step)]
        loss_sum = model.step(micro_batches, 1 / TOKENS)  # all forwards and backwards; zero but on the last rank
        dist.all_reduce(loss_sum)
        norm = model.clip_grad_norm(CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if ranks.is_main:
            print(f"step {step:2}  loss {loss_sum.item() / TOKENS!r}  grad norm {norm.item()!r}")
    ranks.leave()


if __name__ == "__main__":
    main()
