"""The initial weights of a model that was born on the meta device and then cut into shards.

with torch.device("meta"):
    model = Transformer(config.model)     # shapes, no memory
fully_shard(model)                        # or tensor parallelism, or both
model.to_empty(device=ranks.device)       # each rank allocates its shards alone
fill_shards(model, config.seed)
"""

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from common.transformer import Transformer, initial_weight


@torch.no_grad()
def fill_shards(model: Transformer, seed: int) -> None:
    """Give every shard its part of the weights that one process would start with; only one weight is ever whole.

    Each rank computes every weight from the seed and the weight's name, so the ranks send nothing.

    Args:
        model: its parameters are DTensors with memory.
    """
    for name, parameter in model.named_parameters():
        whole = initial_weight(name, parameter.shape, model.config, seed)
        assert isinstance(parameter, DTensor)
        parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None))
