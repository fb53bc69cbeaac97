"""Hybrid (3-D) parallelism: stages of layers, slices of each weight, and shards of each slice, on one mesh.

    torchrun --nproc-per-node=8 model_parallel/hybrid_parallel.py --batch.micro_size 3    # 2 × 2 × 2
    torchrun --nproc-per-node=4 model_parallel/hybrid_parallel.py --mesh.tp 1 --batch.micro_size 3   # pipeline × data
    SCRIPT=model_parallel/hybrid_parallel.py sbatch --nodes=8 --gpus-per-node=8 --cpus-per-task=64 \
        model_parallel/multi_node.sbatch --config model_parallel/configs/llama_70b.yaml --train.steps 200

Nothing here is new: the pipeline is that of `pipeline_parallel.py`, the slices are those of `tensor_parallel.py`, the
shards those of `fsdp/train.py`. What counts is the order, inside out, and who shares what with whom on the mesh.
"""

import torch
import torch.distributed as dist
from mesh_settings import HybridConfig, hybrid_mesh
from pipeline_parallel import build_schedule, clip_grad_norm, describe, fill_up, join_stages, run_schedule, split_layers
from pipeline_state import StageState, tied_weight
from tensor_parallel import tensor_parallelize
from torch.distributed import config as dist_config
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor.parallel import loss_parallel

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
def main(config: HybridConfig) -> None:
    ranks = join(config.device, config.timeout_s, config.network_profile)
    mesh = hybrid_mesh(config, ranks)
    pp, dp, tp = mesh.shape

    # ---- data: ranks of one data-parallel coordinate work on the same samples, whatever their stage and slice
    train_set, validation_set = text_datasets(config.data, config.model.vocabulary)
    plan = BatchPlan(config.batch, len(train_set), config.seed, mesh["dp"].get_local_rank(), dp)
    loader = Loader(train_set, plan, ranks.device, config.data.workers)
    tokens_per_step = config.batch.global_size * config.data.sequence_length

    # ---- the lesson: this rank's stages, each cut and sharded, and the schedule that runs them. FSDP averages over the
    # data-parallel ranks where the global batch wants the sum, hence dp in the scale of the loss.
    stages = build_stages(config, mesh, ranks)
    schedule = build_schedule(config, pp, stages, plan.accumulation, dp / tokens_per_step)

    model = join_stages([stage.submod for stage in stages])  # its parameters have the names of the whole model
    optimizer = build_optimizer(model.parameters(), config.optimizer, ranks.device)
    state = StageState(model, optimizer, config.model.tied)
    # The first and the last stage of each column of the mesh: they hold the same slice and shard of a tied weight.
    column = dist.get_process_group_ranks(mesh["pp"].get_group())
    ends = sorted(set(ranks.all_gather((column[0], column[-1]))))
    first_and_last, _ = dist.new_subgroups_by_enumeration(ends)  # all ranks must call it

    run = Run(config, ranks, "hybrid", units_per_step=tokens_per_step, fingerprint=train_set.fingerprint(),
              flops_per_unit=flops_per_token(config.model, config.data.sequence_length),
              mesh={"pp": pp, "dp_shard": dp, "tp": tp})  # fmt: skip
    ranks.print(describe(stages, plan.accumulation, pp))
    kept = ranks.all_gather(sum(parameter.to_local().nbytes for parameter in model.parameters()))
    ranks.print(f"the {pp} × {dp} × {tp} ranks keep {min(kept):,} to {max(kept):,} bytes of parameters each")
    ranks.print(explain(config.model, config.data.sequence_length, ranks.device, config.train.precision))
    run.restore(state, optimizer)

    def validate() -> float:
        return evaluate(schedule, stages, validation_set, config.batch.global_size // dp, mesh, ranks)

    # ---- training
    for step in run.steps(validate):
        lr = learning_rate(step, config.train.steps, config.optimizer)
        set_learning_rate(optimizer, lr)
        micro_batches = [batch for batch, _ in loader.micro_batches(step)]
        tokens, targets = (torch.cat(parts) for parts in zip(*micro_batches, strict=True))  # the schedule cuts again
        losses = run_stages(schedule.step, stages, tokens, targets)
        tied = tied_weight(model) if config.model.tied else None
        if tied is not None:  # it lives on the first and the last stage: each adds what the other's use of it gave
            dist.all_reduce(tied.grad.to_local(), group=first_and_last)
        is_first = mesh["pp"].get_local_rank() == 0
        grad_norm = clip_grad_norm(model, config.optimizer.clip, None if is_first else tied, mesh["pp"].get_group())
        optimizer.step()
        optimizer.zero_grad()
        run.log(step, losses.sum() / tp, grad_norm, lr)  # 0 but on the last stage, whose tensor ranks have the same
        run.end_step(step, state, optimizer)  # saves; after that, `steps` evaluates
    run.finish()
    ranks.leave()


def build_stages(config: HybridConfig, mesh: DeviceMesh, ranks: Ranks) -> list[PipelineStage]:
    """Stage s of all is on the ranks with pipeline coordinate s modulo pp. From the inside out:

    1. layers: those of this stage, on the meta device, where they have shapes and no memory;
    2. tensor parallelism cuts their weights: it must know whole layers, so it comes first;
    3. activation checkpointing: what is computed again holds the tensor-parallel collectives;
    4. FSDP shards what is left of each weight, and gathers around all of that;
    5. the stage is what the schedule calls.
    """
    count = mesh["pp"].size() * config.stages_per_rank
    layers = split_layers(config.model, count)
    # Low precision to gather and compute with, fp32 for shards and for sums over the ranks, as in fsdp/train.py.
    low_precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.train.precision)
    policy = MixedPrecisionPolicy(
        param_dtype=low_precision, reduce_dtype=low_precision and torch.float32, cast_forward_inputs=False
    )
    dist_config.pipeline_per_edge_p2p = ranks.device.type == "cuda"  # as in pipeline_parallel.py
    stages = []
    for number in range(mesh["pp"].get_local_rank(), count, mesh["pp"].size()):
        is_last = number == count - 1
        with torch.device("meta"):
            part = Transformer(config.model, None, number == 0, is_last, layers[number])
        if config.train.precision == "fp64":
            part.double()
        tensor_parallelize(part, mesh["tp"], config.sequence_parallel)
        if config.train.activation_checkpointing:
            part.checkpoint_activations()
        for unit in (*part.blocks.values(), part):
            # Whole from a step's first micro-batch to its last. Resharded, each micro-batch would gather it twice.
            fully_shard(unit, mesh=mesh["dp"], mp_policy=policy, reshard_after_forward=False)
        part.to_empty(device=ranks.device)
        fill_shards(part, config.seed)
        if is_last:  # the schedule joins what micro-batches give: of a sum of losses, a vector of one number each
            part.register_forward_hook(lambda _, inputs, loss_sum: loss_sum.to_local().reshape(1))
        stages.append(PipelineStage(part, number, count, ranks.device, group=mesh["pp"].get_group()))
    return stages


def run_stages(call, stages: list[PipelineStage], tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """As `run_schedule`, for stages whose tensor ranks have a part of the sequence, and of the logits, each."""
    # A stage that is given hidden states of a part of the sequence cannot count the positions of the whole.
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
    with loss_parallel():
        return run_schedule(call, stages, tokens, targets, positions=positions)


@torch.no_grad()
def evaluate(schedule, stages, dataset, batch_size: int, mesh: DeviceMesh, ranks: Ranks) -> float:
    """Mean loss per token over the validation set: the sum of all losses divided by the count of all tokens."""
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # loss, tokens
    place = mesh["dp"].get_local_rank(), mesh["dp"].size()
    for tokens, targets in evaluation_batches(dataset, batch_size, ranks.device, *place, equal_batches=True):
        tokens, targets = fill_up(tokens, targets, batch_size)
        losses = run_stages(schedule.eval, stages, tokens, targets)
        sums += torch.stack([losses.sum(), count_valid(targets) * stages[-1].is_last])
    dist.all_reduce(sums)  # those of a tensor group count each token as often as its loss
    loss, count = sums.tolist()
    return loss / count


if __name__ == "__main__":
    main(parse(HybridConfig))
