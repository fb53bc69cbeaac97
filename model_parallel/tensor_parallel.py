"""Tensor parallelism: every rank keeps a slice of each weight and computes with it; the slices' results are summed.

    torchrun --nproc-per-node=2 model_parallel/tensor_parallel.py         # a laptop: about a minute, loss < 2.5
    torchrun --nproc-per-node=4 model_parallel/tensor_parallel.py --mesh.dp 2            # slices, and shards of slices
    sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=64 model_parallel/multi_node.sbatch \\
        --config model_parallel/configs/tensor.yaml --train.steps 200

The whole difference to `fsdp/train.py`: a plan says how each layer is cut, before FSDP wraps what is left of it; ranks
of one tensor group see the same samples; and the loss is computed from logits that stay cut along the vocabulary.
"""

import torch
import torch.distributed as dist
from mesh_settings import TensorConfig, describe, tensor_mesh
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
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
def main(config: TensorConfig) -> None:
    ranks = join(config.device, config.timeout_s, config.network_profile)
    mesh = tensor_mesh(config, ranks)
    dp, tp = mesh.shape

    # ---- data: the batch of step N is a pure function of the seed and N
    train_set, validation_set = text_datasets(config.data, config.model.vocabulary)
    plan = BatchPlan(config.batch, len(train_set), config.seed, mesh["dp"].get_local_rank(), dp)
    loader = Loader(train_set, plan, ranks.device, config.data.workers)
    tokens_per_step = config.batch.global_size * config.data.sequence_length

    # ---- model: on the meta device its parameters have shapes and no memory
    with torch.device("meta"):
        model = Transformer(config.model)
    if config.train.precision == "fp64":
        model.double()
    # ---- the lesson, in this order: slices; what blocks do with activations; how they compile; shards of the slices
    tensor_parallelize(model, mesh["tp"], config.sequence_parallel)
    if config.train.activation_checkpointing:
        model.checkpoint_activations()
    if config.train.compile:
        model.compile_blocks()
    # Low precision to gather and compute with, fp32 for shards and for sums over the ranks, as in fsdp/train.py.
    low_precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.train.precision)
    policy = MixedPrecisionPolicy(
        param_dtype=low_precision, reduce_dtype=low_precision and torch.float32, cast_forward_inputs=False
    )
    for unit in (*model.blocks.values(), model):
        fully_shard(unit, mesh=mesh["dp"], mp_policy=policy)
    model.to_empty(device=ranks.device)
    fill_shards(model, config.seed)

    # ---- optimizer; the scaler keeps small fp16 gradients from vanishing, and does nothing otherwise
    optimizer = build_optimizer(model.parameters(), config.optimizer, ranks.device)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.train.precision == "fp16")

    run = Run(config, ranks, "tensor", units_per_step=tokens_per_step, fingerprint=train_set.fingerprint(),
              flops_per_unit=flops_per_token(config.model, config.data.sequence_length),
              mesh={"dp_shard": dp, "tp": tp})  # fmt: skip
    ranks.print(describe(model))
    ranks.print(explain(config.model, config.data.sequence_length, ranks.device, config.train.precision))
    run.restore(model, optimizer, scaler)

    def validate() -> float:
        return evaluate(model, validation_set, plan.micro_size, mesh, ranks)

    # ---- training
    for step in run.steps(validate):  # goes on where the last checkpoint ended
        lr = learning_rate(step, config.train.steps, config.optimizer)
        set_learning_rate(optimizer, lr)
        loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
        for (tokens, targets), is_last in loader.micro_batches(step):
            # Until the last micro-batch gradients add up locally, whole: that saves messages and costs memory.
            model.set_requires_gradient_sync(is_last)
            with loss_parallel():  # softmax over logits of which each rank has some columns; backward too
                micro_loss_sum = model(tokens, targets).to_local()  # a sum over tokens, whole on every rank
                # Dividing by the tokens of the *global* batch makes the gradient the same for any accumulation; FSDP
                # averages over the *data-parallel* ranks where the global batch wants the sum, hence their number.
                scaler.scale(micro_loss_sum * dp / tokens_per_step).backward()
            loss_sum += micro_loss_sum.detach() / tp  # all ranks of a tensor group have the same loss
        scaler.unscale_(optimizer)
        grad_norm = clip_grad_norm_(model.parameters(), config.optimizer.clip).full_tensor()  # of all slices
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        run.log(step, loss_sum, grad_norm, lr)  # read one step late: the loop never waits for the device
        run.end_step(step, model, optimizer, scaler)  # saves; after that, `steps` evaluates
    run.finish()
    ranks.leave()  # a barrier, then the end of the process group


def tensor_parallelize(model: Transformer, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    """Cut the model among the ranks of `mesh`, in place; `from_scratch/tensor_parallel.py` does the same by hand.

    The first layers of a pair are cut by outputs (columns), the last by inputs (rows): between them every rank has its
    own heads or neurons, as plain local tensors, and attention counts its heads from the weights as ever. Row-parallel
    results are sums over the ranks: all-reduced, or with sequence parallelism reduced and scattered along the sequence.
    """
    hidden = Shard(1) if sequence_parallel else Replicate()  # of activations (batch, sequence, width) between layers
    norm = SequenceParallel() if sequence_parallel else Replicated()
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=hidden),  # cut along the vocabulary
        "blocks.*.attention_norm": norm,
        # Entering, hidden states become whole on every rank, once for all three projections. Backward sums the
        # gradients of the ranks' slices. The other three inputs (None) are no activations.
        "blocks.*.attention": PrepareModuleInput(
            input_layouts=(hidden, None, None, None), desired_input_layouts=(Replicate(), None, None, None)
        ),
        "blocks.*.attention.query": ColwiseParallel(),
        "blocks.*.attention.key": ColwiseParallel(),
        "blocks.*.attention.value": ColwiseParallel(),
        "blocks.*.attention.output": RowwiseParallel(output_layouts=hidden),
        "blocks.*.ffn_norm": norm,
        "blocks.*.ffn": PrepareModuleInput(input_layouts=(hidden,), desired_input_layouts=(Replicate(),)),
        "blocks.*.ffn.gate": ColwiseParallel(),
        "blocks.*.ffn.up": ColwiseParallel(),
        "blocks.*.ffn.down": RowwiseParallel(output_layouts=hidden),
        "norm": norm,
        "head": PrepareModuleInput(input_layouts=(hidden, None, None), desired_input_layouts=(Replicate(), None, None)),
    }
    here = dict(model.named_children())  # a pipeline stage has no embedding, or no head
    parallelize_module(model, mesh, {name: style for name, style in plan.items() if name.split(".")[0] in here})
    if model.head and model.head.weight is not None:  # tied: the embedding's weight, cut in the same way
        model.head.weight = torch.nn.Parameter(distribute_tensor(model.head.weight, mesh, [Shard(0)]))


class Replicated(ParallelStyle):
    """A norm whose weight and activations all ranks hold whole. They are DTensors like all others all the same: neither
    clipping nor the optimizer takes a mixture."""

    def _apply(self, module: torch.nn.Module, mesh: DeviceMesh) -> torch.nn.Module:
        def enter(_, inputs, mesh):
            return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)

        return distribute_module(module, mesh, None, enter, lambda _, output, mesh: output.to_local())


@torch.no_grad()
def evaluate(model: Transformer, dataset, batch_size: int, mesh: DeviceMesh, ranks: Ranks) -> float:
    """Mean loss per token over the validation set: the sum of all losses divided by the count of all tokens."""
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # loss, tokens
    place = mesh["dp"].get_local_rank(), mesh["dp"].size()
    # A forward communicates: ranks with fewer samples join in with batches that do not count.
    for tokens, targets in evaluation_batches(dataset, batch_size, ranks.device, *place, equal_batches=True):
        with loss_parallel():
            sums += torch.stack([model(tokens, targets).to_local().double(), count_valid(targets)])
    # Over all ranks: those of a tensor group count each token as often as its loss.
    dist.all_reduce(sums)  # ranks may have had different numbers of samples: sums, never a mean of means
    loss, count = sums.tolist()
    return loss / count


if __name__ == "__main__":
    main(parse(TensorConfig))
