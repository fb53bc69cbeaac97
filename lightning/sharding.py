"""What Lightning leaves to you under ModelParallelStrategy: how the model is cut, in `configure_model`.

Tensor parallelism first, then activation checkpointing and compilation of the blocks, then FSDP around what is left:
torch's own calls, as in `model_parallel/tensor_parallel.py` and `fsdp/train.py`.
"""

import torch
from settings import LightningConfig
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from common.meta_device import fill_shards
from common.transformer import Transformer


def sharded_transformer(config: LightningConfig, mesh: DeviceMesh, device: torch.device) -> Transformer:
    """The model, born without memory, cut along both axes of Lightning's mesh, and filled shard by shard.

    mesh: Lightning's, with the axes data_parallel and tensor_parallel.
    """
    with torch.device("meta"):
        model = Transformer(config.model)
    if config.train.precision == "fp64":
        model.double()
    if config.strategy == "tensor_parallel":
        tensor_parallelize(model, mesh["tensor_parallel"])
    if config.train.activation_checkpointing:
        model.checkpoint_activations()
    if config.train.compile:
        model.compile_blocks()
    # The precision is FSDP's policy, not the Trainer's autocast: blocks are gathered, and sent, in the low one.
    low_precision = {"bf16": torch.bfloat16}.get(config.train.precision)
    policy = MixedPrecisionPolicy(low_precision, low_precision and torch.float32, cast_forward_inputs=False)
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh["data_parallel"], mp_policy=policy)
    fully_shard(model, mesh=mesh["data_parallel"], mp_policy=policy)
    # Lightning would fill meta tensors by each module's reset_parameters(), which knows nothing of our seed.
    model.to_empty(device=device)
    fill_shards(model, config.seed)
    return model


def tensor_parallelize(model: Transformer, mesh: DeviceMesh) -> None:
    """Cut the model among the ranks of `mesh`, in place: the first layers of a pair by outputs, the last by inputs.

    Between them every rank has its own heads or neurons. The last layer's results are partial sums, all-reduced in the
    forward; the inputs' gradients are, in the backward (arXiv 1909.08053).
    """
    whole, none = (Replicate(),), (None,)
    rows = RowwiseParallel(output_layouts=Replicate())
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),  # cut by the vocabulary
        "blocks.*.attention_norm": Replicated(),
        "blocks.*.attention": PrepareModuleInput(
            input_layouts=whole + none * 3, desired_input_layouts=whole + none * 3
        ),
        "blocks.*.attention.query": ColwiseParallel(),
        "blocks.*.attention.key": ColwiseParallel(),
        "blocks.*.attention.value": ColwiseParallel(),
        "blocks.*.attention.output": rows,
        "blocks.*.ffn_norm": Replicated(),
        "blocks.*.ffn": PrepareModuleInput(input_layouts=whole, desired_input_layouts=whole),
        "blocks.*.ffn.gate": ColwiseParallel(),
        "blocks.*.ffn.up": ColwiseParallel(),
        "blocks.*.ffn.down": rows,
        "norm": Replicated(),
        "head": PrepareModuleInput(input_layouts=whole + none * 2, desired_input_layouts=whole + none * 2),
    }
    parallelize_module(model, mesh, plan)
    if model.head.weight is not None:  # tied: the embedding's weight, cut in the same way
        model.head.weight = torch.nn.Parameter(distribute_tensor(model.head.weight, mesh, [Shard(0)]))


class Replicated(ParallelStyle):
    """A norm whose weight and activations all ranks hold whole. They are DTensors like all others all the same: neither
    clipping nor the optimizer takes a mixture."""

    def _apply(self, module: torch.nn.Module, mesh: DeviceMesh) -> torch.nn.Module:
        def enter(_, inputs, mesh):
            return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)

        return distribute_module(module, mesh, None, enter, lambda _, output, mesh: output.to_local())
