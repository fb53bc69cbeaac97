"""Any of the strategies of this folder, and combinations of them on a mesh, train the model of all other lessons.

    torchrun --nproc-per-node=2 from_scratch/train.py --strategy zero2            # a laptop: about a minute, loss < 2.5
    torchrun --nproc-per-node=4 from_scratch/train.py --strategy pipeline --batch.micro_size 3 --schedule 1f1b
    torchrun --nproc-per-node=8 from_scratch/train.py --strategy fsdp --mesh.tp 2 --mesh.cp 2

The strategy's own axis of the mesh takes all ranks that the other axes leave. With `tensor`, `pipeline` and `context`,
`--mesh.dp 2` adds data parallelism, bucketed; another kind of it is named by the strategy: `zero2` with `--mesh.tp 2`.
Whatever is chosen, the run is that of `ddp/single_device.py`, and its checkpoint fits any other strategy.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import context_parallel
import fully_sharded
import tensor_parallel
import torch
import torch.distributed as dist
from combine_settings import AXIS, ByHandConfig, check_combination, recorded_mesh
from data_parallel import BucketedDataParallel, NaiveDataParallel, OverlappedDataParallel
from grad_norm import clip_grad_norm
from mesh import Mesh, build_mesh, lines, make_grid
from pipeline_parallel import Pipeline, connect, ideal_bubble
from sharded_optimizer import Zero1Optimizer, Zero2Optimizer
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from whole_state import WholeTraining, held_flat_shards, held_parameters, held_pieces

from common.config import parse
from common.data import text_datasets
from common.data_sharding import BatchPlan, Loader, evaluation_batches
from common.flops import explain, flops_per_token
from common.loss import count_valid
from common.optimizer import build_optimizer, learning_rate, set_learning_rate
from common.ranks import Ranks, fail, join
from common.run import Run
from common.transformer import Transformer

REPLICATED = {
    "naive": NaiveDataParallel,  # all-reduces after every micro-batch
    "accumulate": NaiveDataParallel,  # only after the last one
    "overlap": OverlappedDataParallel,
    "bucket": BucketedDataParallel,
    "zero1": BucketedDataParallel,
}


@dataclass
class Strategy:
    """What the loop needs of a strategy."""

    whole: WholeTraining
    optimizer: torch.optim.Optimizer | Zero1Optimizer
    finish: Callable[[], None] = lambda: None
    """After every backward: gradients are reduced, or kept if held back."""
    held_back: Callable[[], AbstractContextManager] = nullcontext
    """For all but the last micro-batch."""


def model_and_pipeline(config: ByHandConfig, mesh: Mesh, device: torch.device) -> tuple[nn.Module, Pipeline | None]:
    """What this rank computes with: all layers or some stages, cut by tensor and context parallelism or not."""
    dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
    pipeline = None
    if mesh.sizes["pp"] > 1:
        edges = connect(lines(make_grid(dist.get_world_size(), mesh.sizes), "pp"))
        pipeline = Pipeline(
            config.model, config.seed, config.data.sequence_length, mesh.groups["pp"], edges,
            schedule=config.schedule, chunks=config.stages_per_rank, device=device, dtype=dtype,
        )  # fmt: skip
    module = pipeline.stages if pipeline else Transformer(config.model, config.seed).to(device, dtype)
    for part in pipeline.stages.values() if pipeline else [module]:
        # From the inside out: layers are replaced, then attention, and what is checkpointed contains both.
        if mesh.sizes["tp"] > 1:
            tensor_parallel.parallelize(part, mesh.groups["tp"], config.sequence_parallel)
        if mesh.sizes["cp"] > 1:
            context_parallel.parallelize_context(part, mesh.groups["cp"], config.balanced)
        if config.train.activation_checkpointing:
            part.checkpoint_activations()
    return module, pipeline


def data_parallel(config: ByHandConfig, module: nn.Module, mesh: Mesh, device: torch.device) -> Strategy:
    """What happens to gradients, parameters and optimizer state among the ranks with different data.

    Context-parallel ranks see different tokens too, and hold equal weights: they are among them.
    """
    group = mesh.groups["dp_cp"]
    kind = "bucket" if config.strategy in AXIS else config.strategy
    tied = config.model.tied

    if kind == "fsdp":
        low = torch.bfloat16 if config.train.precision == "bf16" else None
        for block in module.blocks.values():
            fully_sharded.fully_shard(block, group, config.reshard_after_forward, low, low and torch.float32)
        fully_sharded.fully_shard(module, group, config.reshard_after_forward, low, low and torch.float32)
        optimizer = build_optimizer(module.parameters(), config.optimizer, device)
        whole = WholeTraining(module, held_flat_shards(module), optimizer, mesh)
        return Strategy(whole, optimizer, lambda: fully_sharded.finish(module))

    optimizer = build_optimizer(module.parameters(), config.optimizer, device)
    if kind == "zero2":
        sharded = Zero2Optimizer(optimizer.param_groups, type(optimizer), group)
        whole = WholeTraining(module, held_pieces(module, tied, sharded), sharded.inner, mesh)
        return Strategy(whole, sharded, sharded.finish)

    # The wrappers' hooks are on the parameters: the loop can call the module itself, and a pipeline its stages.
    options = {"bucket_bytes": config.bucket_bytes} if kind in ("bucket", "zero1") else {}
    wrapper = REPLICATED[kind](module, group, **options)
    held_back = nullcontext if kind == "naive" else wrapper.no_sync
    if kind == "zero1":
        sharded = Zero1Optimizer(optimizer.param_groups, type(optimizer), group)
        whole = WholeTraining(module, held_pieces(module, tied, sharded), sharded.inner, mesh)
        return Strategy(whole, sharded, wrapper.finish, held_back)
    whole = WholeTraining(module, held_parameters(module, tied), optimizer, mesh)
    return Strategy(whole, optimizer, wrapper.finish, held_back)


@record
def main(config: ByHandConfig) -> None:
    ranks = join(config.device, config.timeout_s, config.network_profile)

    # ---- the mesh, the model on it, and what the data-parallel ranks do
    try:
        sizes = config.mesh.sizes(ranks.world_size, AXIS.get(config.strategy, "dp"))
        check_combination(config, sizes)
        mesh = build_mesh(**sizes)
        module, pipeline = model_and_pipeline(config, mesh, ranks.device)
        if sizes["cp"] > 1:
            positions = context_parallel.positions(config.data.sequence_length, mesh.groups["cp"], config.balanced)
        else:
            positions = torch.arange(config.data.sequence_length)
        strategy = data_parallel(config, module, mesh, ranks.device)
    except ValueError as error:
        fail(str(error))
    optimizer, whole, positions = strategy.optimizer, strategy.whole, positions.to(ranks.device)

    # ---- data: ranks that differ only in pp, cp or tp work on the same samples
    train_set, validation_set = text_datasets(config.data, config.model.vocabulary)
    plan = BatchPlan(config.batch, len(train_set), config.seed, dp_rank=mesh.coordinates["dp"], dp_size=sizes["dp"])
    loader = Loader(train_set, plan, ranks.device, config.data.workers)
    tokens_per_step = config.batch.global_size * config.data.sequence_length
    low_precision = config.train.precision == "bf16" and config.strategy != "fsdp"  # which casts by itself
    autocast = torch.autocast(ranks.device.type, dtype=torch.bfloat16, enabled=low_precision)

    flops = flops_per_token(config.model, config.data.sequence_length)
    replicas = mesh.groups["pp" if config.strategy == "fsdp" else "dp_cp"]  # of fsdp's shards there are none
    run = Run(config, ranks, config.strategy, units_per_step=tokens_per_step, flops_per_unit=flops,
              fingerprint=train_set.fingerprint(), mesh=recorded_mesh(config.strategy, sizes), replicas=replicas,
              framework="from_scratch")  # fmt: skip
    ranks.print(explain(config.model, config.data.sequence_length, ranks.device, config.train.precision))
    ranks.print("mesh: " + ", ".join(f"{axis} {size}" for axis, size in sizes.items()))
    if pipeline:
        bubble = ideal_bubble(sizes["pp"], plan.accumulation, config.stages_per_rank)
        ranks.print(f"pipeline: {config.schedule}, {plan.accumulation} micro-batches, ideal bubble {bubble:.0%}")
    run.restore(whole, whole.optimizer)

    def validate() -> float:
        with autocast:
            return evaluate(pipeline.evaluate if pipeline else module, validation_set, plan, mesh, positions, ranks)

    # ---- training
    scale = mesh.groups["dp_cp"].size() / tokens_per_step  # gradients are averaged over that group
    for step in run.steps(validate):
        lr = learning_rate(step, config.train.steps, config.optimizer)
        set_learning_rate(optimizer, lr)
        loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
        batches = [([part[:, positions] for part in batch], last) for batch, last in loader.micro_batches(step)]
        if pipeline:
            pipeline.recording = step + 1 == config.train.steps
            with strategy.held_back(), autocast:
                loss_sum += pipeline.step([batch for batch, _ in batches], scale)
            strategy.finish()  # its backwards are done: nothing is left to overlap with
        else:
            for (tokens, targets), is_last in batches:
                with nullcontext() if is_last else strategy.held_back():
                    with autocast:
                        micro_loss_sum = module(tokens, targets)
                    (micro_loss_sum * scale).backward()
                    strategy.finish()
                loss_sum += micro_loss_sum.detach()
        if isinstance(optimizer, Zero1Optimizer):
            optimizer.take_gradients()
        gradients = [(held.tensor.grad, whole.copies(held)) for held in whole.held]
        grad_norm = clip_grad_norm(gradients, config.optimizer.clip, dist.group.WORLD)
        optimizer.step()
        optimizer.zero_grad()
        run.log(step, loss_sum / sizes["tp"], grad_norm, lr)  # tensor-parallel ranks all have the same loss
        run.end_step(step, whole, whole.optimizer)  # saves; after that, `steps` evaluates
    run.finish()
    if pipeline and pipeline.events and not any(mesh.coordinates[axis] for axis in ("dp", "cp", "tp")):
        pipeline.write_events(run.folder / "events")  # of the last step; draw them with gantt.py
    ranks.leave()


@torch.no_grad()
def evaluate(forward: Callable, dataset, plan: BatchPlan, mesh: Mesh, positions: torch.Tensor, ranks: Ranks) -> float:
    """Mean loss per token over the validation set: the sum of all losses divided by the count of all tokens."""
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # loss, tokens
    # Equally many batches for all, because a forward may communicate.
    batches = evaluation_batches(
        dataset, plan.micro_size, ranks.device, dp_rank=plan.dp_rank, dp_size=plan.dp_size, equal_batches=True
    )
    for tokens, targets in batches:
        tokens, targets = tokens[:, positions], targets[:, positions]
        is_last_stage = mesh.coordinates["pp"] == mesh.sizes["pp"] - 1
        sums += torch.stack([forward(tokens, targets).double(), count_valid(targets) * is_last_stage])
    dist.all_reduce(sums)  # over all ranks: tensor-parallel ones count each token as often as its loss
    loss, count = sums.tolist()
    return loss / count


if __name__ == "__main__":
    main(parse(ByHandConfig))
