"""Pipeline parallelism: every rank holds some of the layers, and micro-batches flow through them.

    torchrun --nproc-per-node=2 model_parallel/pipeline_parallel.py --batch.micro_size 3  # a minute, loss < 2.5
    torchrun --nproc-per-node=2 model_parallel/pipeline_parallel.py --batch.micro_size 3 --schedule zero_bubble
    SCRIPT=model_parallel/pipeline_parallel.py sbatch model_parallel/multi_node.sbatch --batch.micro_size 3

`torch.distributed.pipelining` runs a schedule: it cuts the batch into micro-batches, sends activations on and gradients
back, and calls forward and backward in the schedule's order. What remains is ours: which layers a stage has, the scale
of the loss, and what concerns all stages at once, namely the tied weight, the gradient norm and the checkpoint.
"""

from itertools import pairwise

import torch
import torch.distributed as dist
from mesh_settings import PipelineConfig
from pipeline_state import StageState, tied_weight
from torch.distributed import config as dist_config
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from common.config import parse
from common.data import text_datasets
from common.data_sharding import BatchPlan, Loader, evaluation_batches
from common.flops import explain, flops_per_token
from common.loss import count_valid
from common.optimizer import build_optimizer, learning_rate, set_learning_rate
from common.ranks import Ranks, fail, join
from common.run import Run
from common.transformer import ModelConfig, Transformer

SCHEDULES = {
    "gpipe": ScheduleGPipe,  # all forwards, then all backwards: all micro-batches in flight
    "1f1b": Schedule1F1B,  # one forward, one backward, in turn: at most stages - stage in flight
    "interleaved": ScheduleInterleaved1F1B,  # several small stages a rank: less idle time, more messages
    "zero_bubble": ScheduleInterleavedZeroBubble,  # gradients of weights wait, and fill the idle time
}


@record  # torchrun then reports the rank that failed first, and why
def main(config: PipelineConfig) -> None:
    ranks = join(config.device, config.timeout_s, config.network_profile)
    autocast = torch.autocast(ranks.device.type, dtype=torch.bfloat16, enabled=config.train.precision == "bf16")

    # ---- data: all ranks work on the same samples; the first stage reads tokens, the last targets
    train_set, validation_set = text_datasets(config.data, config.model.vocabulary)
    plan = BatchPlan(config.batch, len(train_set), config.seed)
    loader = Loader(train_set, plan, ranks.device, config.data.workers)
    tokens_per_step = config.batch.global_size * config.data.sequence_length

    # ---- the lesson: this rank's stages, and the schedule that runs them
    stages = build_stages(config, ranks)
    schedule = build_schedule(config, ranks.world_size, stages, plan.accumulation, 1 / tokens_per_step)

    model = join_stages([stage.submod for stage in stages])  # its parameters have the names of the whole model
    optimizer = build_optimizer(model.parameters(), config.optimizer, ranks.device)
    state = StageState(model, optimizer, config.model.tied)
    first_and_last = dist.new_group([0, ranks.world_size - 1])  # all ranks must call it

    alone, _ = dist.new_subgroups(1)  # no other rank holds what this one does
    run = Run(config, ranks, "pipeline", units_per_step=tokens_per_step, fingerprint=train_set.fingerprint(),
              flops_per_unit=flops_per_token(config.model, config.data.sequence_length),
              mesh={"pp": ranks.world_size}, replicas=alone)  # fmt: skip
    ranks.print(describe(stages, plan.accumulation, ranks.world_size))
    ranks.print(explain(config.model, config.data.sequence_length, ranks.device, config.train.precision))
    run.restore(state, optimizer)

    def validate() -> float:
        with autocast:
            return evaluate(schedule, stages, validation_set, config.batch.global_size, ranks)

    # ---- training
    for step in run.steps(validate):
        lr = learning_rate(step, config.train.steps, config.optimizer)
        set_learning_rate(optimizer, lr)
        micro_batches = [batch for batch, _ in loader.micro_batches(step)]
        tokens, targets = (torch.cat(parts) for parts in zip(*micro_batches, strict=True))  # the schedule cuts again
        with autocast:
            losses = run_schedule(schedule.step, stages, tokens, targets)
        tied = tied_weight(model) if config.model.tied else None
        if tied is not None:  # it lives on the first and the last stage: each adds what the other's use of it gave
            dist.all_reduce(tied.grad, group=first_and_last)
        grad_norm = clip_grad_norm(model, config.optimizer.clip, tied if ranks.rank > 0 else None)
        optimizer.step()
        optimizer.zero_grad()
        run.log(step, losses.sum(), grad_norm, lr)  # 0 on all ranks but the last
        run.end_step(step, state, optimizer)  # saves; after that, `steps` evaluates
    run.finish()
    ranks.leave()


def split_layers(config: ModelConfig, stages: int) -> list[range]:
    """The layers of each stage: as equal as can be; where they are not, the last stage, with the head, has fewer."""
    if config.layers < stages:
        fail(
            f"model.layers = {config.layers} for {stages} stages; expected a layer for each; use fewer stages or ranks"
        )
    ends = [-(-config.layers * stage // stages) for stage in range(stages + 1)]
    return [range(start, end) for start, end in pairwise(ends)]


def build_stages(config: PipelineConfig, ranks: Ranks) -> list[PipelineStage]:
    """Stage s of all is on rank s modulo ranks. A stage is the common Transformer with some of its layers."""
    if ranks.world_size < 2:
        fail("1 rank for a pipeline; expected at least 2; use ddp/single_device.py, or torchrun --nproc-per-node=2")
    count = ranks.world_size * config.stages_per_rank
    layers = split_layers(config.model, count)
    # On GPUs a communicator for each neighbor and direction: in one alone, messages forward and back wait in one queue.
    dist_config.pipeline_per_edge_p2p = ranks.device.type == "cuda"
    stages = []
    for number in range(ranks.rank, count, ranks.world_size):
        is_last = number == count - 1
        part = Transformer(config.model, config.seed, number == 0, is_last, layers[number])
        part = part.to(ranks.device, torch.float64 if config.train.precision == "fp64" else torch.float32)
        if config.train.activation_checkpointing:
            part.checkpoint_activations()
        if is_last:  # the schedule joins what micro-batches give: of a sum of losses, a vector of one number each
            part.register_forward_hook(lambda _, inputs, loss_sum: loss_sum.reshape(1))
        stages.append(PipelineStage(part, number, count, ranks.device))
    return stages


def build_schedule(config: PipelineConfig, pp: int, stages: list[PipelineStage], micro_batches: int, scale: float):
    """Torch's schedule over `pp` ranks. SystemExit: too few micro-batches, or a number that it cannot order."""
    looped = config.schedule in ("interleaved", "zero_bubble")  # wants rounds, even of one stage a rank
    rounds = max(1, micro_batches // pp)
    found = f"{micro_batches} micro-batches (batch.global_size / batch.micro_size) with schedule = {config.schedule}"
    if config.schedule == "1f1b" and micro_batches < pp:
        fail(f"{found} on {pp} ranks; expected as many as ranks, or more; lower batch.micro_size")
    if looped and micro_batches % rounds:
        fail(f"{found} on {pp} ranks; expected a multiple of {rounds}; change batch.micro_size")
    # The stage computes a sum over tokens; divided by the tokens of the *global* batch, its gradient is that of the
    # mean, for any number of micro-batches. Torch would divide by that number as well: not of a sum.
    return SCHEDULES[config.schedule](
        stages if looped else stages[0],
        micro_batches,
        loss_fn=lambda loss_sum, _: loss_sum.sum() * scale,
        scale_grads=False,
    )


def run_schedule(
    call, stages: list[PipelineStage], tokens: torch.Tensor, targets: torch.Tensor, **more
) -> torch.Tensor:
    """Run `schedule.step` or `.eval` on a batch; returns the sums of its micro-batches' losses, or a 0 on other ranks.

    The targets go in twice: to the last stage's forward, which computes the loss, and as what `loss_fn` is given.
    `more` goes to the forward of all stages, cut along the batch.
    """
    inputs = (tokens,) if stages[0].is_first else ()
    losses = call(*inputs, target=targets, targets=targets, **more)
    zero = torch.zeros(1, dtype=torch.float64, device=tokens.device)
    return zero if losses is None else losses.detach().double()


def join_stages(parts: list[Transformer]) -> torch.nn.Module:
    """One module that holds a rank's stages. Names are those of the whole model: a stage keeps its layers' numbers."""
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleDict({number: block for part in parts for number, block in part.blocks.items()})
    for part in parts:
        for name in ("embedding", "norm", "head"):
            if getattr(part, name) is not None:
                model.add_module(name, getattr(part, name))
    return model


def clip_grad_norm(
    model: torch.nn.Module,
    max_norm: float,
    counted_elsewhere: torch.Tensor | None,
    stages: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Scale gradients to a norm of at most max_norm over all stages; a tied weight counts once. Norm before."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter is not counted_elsewhere]
    norm = get_total_norm(gradients)
    square = (norm.full_tensor() if isinstance(norm, DTensor) else norm) ** 2  # of this rank's stages
    dist.all_reduce(square, group=stages)
    clip_grads_with_norm_(model.parameters(), max_norm, square.sqrt())
    return square.sqrt()


def describe(stages: list[PipelineStage], micro_batches: int, pp: int) -> str:
    """One line: what is where, and how much of the time a rank must idle if all stages are equal."""
    layers = ", ".join("-".join(str(n) for n in stage.submod.blocks) for stage in stages)
    bubble = (pp - 1) / (len(stages) * micro_batches + pp - 1)  # arXiv 2104.04473, 2.2
    shape = f"{stages[0].num_stages} stages on {pp} ranks, {micro_batches} micro-batches"
    return f"{shape}, idle at least {bubble:.0%} without a zero-bubble schedule; layers here: {layers}"


def fill_up(tokens: torch.Tensor, targets: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of `size`, with samples that do not count: a schedule has micro-batches of one size, also at the end."""
    missing = size - len(tokens)
    tokens = torch.cat([tokens, tokens[:1].expand(missing, -1)])
    return tokens, torch.cat([targets, targets.new_full((missing, targets.shape[1]), -100)])


@torch.no_grad()
def evaluate(schedule, stages: list[PipelineStage], dataset, batch_size: int, ranks: Ranks) -> float:
    """Mean loss per token over the validation set: the sum of all losses divided by the count of all tokens."""
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # loss, tokens
    for tokens, targets in evaluation_batches(dataset, batch_size, ranks.device):
        tokens, targets = fill_up(tokens, targets, batch_size)
        losses = run_schedule(schedule.eval, stages, tokens, targets)
        sums += torch.stack([losses.sum(), count_valid(targets) * stages[-1].is_last])
    dist.all_reduce(sums)
    loss, count = sums.tolist()
    return loss / count


if __name__ == "__main__":
    main(parse(PipelineConfig))
