"""Gradient accumulation under DDP: the right way, two slow ones, and two mistakes with a falling loss.

    torchrun --nproc-per-node=2 ddp/gradient_accumulation.py              # a quarter of a minute on a laptop

The same global batches go through the same model in six ways. As in fine-tuning, the first tokens of each
sample are a prompt that does not count in the loss, so that micro-batches differ in their number of valid
tokens. For every way the script counts what DDP sends, compares the gradient with that of one process that
sees the whole batch at once (in fp64, where equal means to 1e-12), and asks after a few optimizer steps
whether the ranks still hold the same weights. The exit code is 1 if a right way is not equal, or if a wrong
one goes unnoticed.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel as DDP

from common.config import parse
from common.data import TextConfig, TokenDataset, text_datasets
from common.data_sharding import BatchConfig, BatchPlan, Loader
from common.loss import count_valid
from common.optimizer import OptimizerConfig, build_optimizer
from common.ranks import Ranks, fail, join
from common.replica_check import differing_replicas
from common.transformer import ModelConfig, Transformer

TOLERANCE = 1e-12  # in fp64 rounding stays below 1e-14, and a wrong gradient is off by more than 1e-4

MicroBatches = list[tuple[torch.Tensor, torch.Tensor]]  # tokens, targets: (micro-batch, sequence) int64
Accumulate = Callable[[DDP, MicroBatches, float], None]


# ---- the ways to accumulate. Each leaves the gradient of one step in the parameters. `ddp_model` returns the
# *sum* of the token losses; `scale` is world size / valid tokens of the global batch, because DDP averages
# over the ranks where the global batch wants the sum.


def sync_every_micro_batch(ddp_model: DDP, micro_batches: MicroBatches, scale: float) -> None:
    """Right, but every backward sends all gradients. What earlier micro-batches left in them is the same on
    all ranks by then, so that averaging it once more changes nothing."""
    for tokens, targets in micro_batches:
        (ddp_model(tokens, targets) * scale).backward()


def no_sync_until_last(ddp_model: DDP, micro_batches: MicroBatches, scale: float) -> None:
    """Right, and gradients travel once: they add up on each rank until the last backward sends the sum."""
    for number, (tokens, targets) in enumerate(micro_batches, start=1):
        with nullcontext() if number == len(micro_batches) else ddp_model.no_sync():
            (ddp_model(tokens, targets) * scale).backward()


def no_sync_around_backward_only(ddp_model: DDP, micro_batches: MicroBatches, scale: float) -> None:
    """no_sync comes too late: the *forward* decides whether the backward that follows sends anything."""
    for number, (tokens, targets) in enumerate(micro_batches, start=1):
        loss = ddp_model(tokens, targets) * scale
        with nullcontext() if number == len(micro_batches) else ddp_model.no_sync():
            loss.backward()


def mean_of_means(ddp_model: DDP, micro_batches: MicroBatches, scale: float) -> None:
    """Wrong: every micro-batch counts the same, so a token weighs more where there are fewer of them."""
    for number, (tokens, targets) in enumerate(micro_batches, start=1):
        with nullcontext() if number == len(micro_batches) else ddp_model.no_sync():
            (ddp_model(tokens, targets) / count_valid(targets) / len(micro_batches)).backward()


def sync_first_not_last(ddp_model: DDP, micro_batches: MicroBatches, scale: float) -> None:
    """Wrong by one: the first micro-batch is sent, and what the others add stays on its rank. There are as
    many messages as there should be, and the ranks drift apart."""
    for number, (tokens, targets) in enumerate(micro_batches):
        with nullcontext() if number % len(micro_batches) == 0 else ddp_model.no_sync():
            (ddp_model(tokens, targets) * scale).backward()


SENDS, GRADIENT, REPLICAS = "sends every time", "wrong gradient", "ranks differ"
ONE_BATCH = "one batch per rank"
VARIANTS: dict[str, tuple[Accumulate, set[str]]] = {  # and what must be found wrong with each
    ONE_BATCH: (sync_every_micro_batch, set()),
    "sync in every micro-batch": (sync_every_micro_batch, {SENDS}),
    "no_sync, forward and backward": (no_sync_until_last, set()),
    "no_sync, backward only": (no_sync_around_backward_only, {SENDS}),
    "mean of micro-batch means": (mean_of_means, {GRADIENT}),
    "sync the first, not the last": (sync_first_not_last, {GRADIENT, REPLICAS}),
}


@dataclass
class SmallMicroBatches(BatchConfig):
    micro_size: int | None = 2


@dataclass
class ShortText(TextConfig):
    sequence_length: int = 32


@dataclass
class FewSteps:
    steps: int = 5
    """Optimizer steps of each way; the first one's gradient is compared, the last one's messages counted."""

    def __post_init__(self) -> None:
        if self.steps < 2:  # in the first backward all gradients are one bucket; DDP divides them up after it
            raise ValueError(f"train.steps = {self.steps} cannot work; allowed: at least 2")


@dataclass
class AccumulationConfig:
    train: FewSteps = field(default_factory=FewSteps)
    batch: SmallMicroBatches = field(default_factory=SmallMicroBatches)
    data: ShortText = field(default_factory=ShortText)
    model: ModelConfig = field(default_factory=ModelConfig)
    seed: int = 1234
    device: str = "auto"
    """auto, cpu or cuda."""


@record
def main(config: AccumulationConfig) -> None:
    ranks = join(config.device)
    if ranks.world_size < 2:
        fail("one process cannot drift apart; use torchrun --nproc-per-node=2 ddp/gradient_accumulation.py")
    train_set, _ = text_datasets(config.data, config.model.vocabulary)
    plan = BatchPlan(config.batch, len(train_set), config.seed, ranks.rank, ranks.world_size)
    if plan.accumulation < 2:
        fail(
            f"batch.global_size = {config.batch.global_size} in micro-batches of {plan.micro_size} is one "
            f"for each of {ranks.world_size} ranks: nothing to accumulate; make batch.global_size larger"
        )
    one_batch = replace(plan, batch=BatchConfig(config.batch.global_size))  # all samples of a rank at once
    whole_batch = replace(one_batch, dp_rank=0, dp_size=1)  # all samples of all ranks at once

    # ---- the reference: what one process makes of the whole batch, without DDP; each rank computes it anew
    reference = Transformer(config.model, config.seed).to(ranks.device).double()
    [(tokens, targets)] = load(train_set, whole_batch, config, ranks)[0]
    loss = reference(tokens, targets) / count_valid(targets)
    loss.backward()

    batches = load(train_set, plan, config, ranks)
    counts = ", ".join(str(int(count_valid(targets))) for _, targets in batches[0])
    ranks.print(f"{ranks.world_size} ranks × {plan.accumulation} micro-batches × {plan.micro_size} samples")
    ranks.print(f"valid tokens in rank 0's micro-batches: {counts}; loss before the first step: {loss:.4f}\n")
    ranks.print(f"{'':29} all-reduces   MB sent  gradient off  loss after")
    ranks.print(f"{'':29}      a step    a step      by up to  {config.train.steps:>4} steps   found")

    one_round, unexpected = 0, []
    for name, (accumulate, expected) in VARIANTS.items():
        fed = load(train_set, one_batch, config, ranks) if name == ONE_BATCH else batches
        model, messages, gradient_off = train(accumulate, fed, config, ranks, reference)
        one_round = one_round or len(messages)  # one message per bucket
        differing = differing_replicas(model)
        with torch.no_grad():
            loss_after = model(tokens, targets) / count_valid(targets)
        found = {SENDS} if len(messages) == plan.accumulation * one_round else set()
        found |= {GRADIENT} if gradient_off > TOLERANCE else set()
        found |= {REPLICAS} if differing else set()
        if found != expected or len(messages) not in (one_round, plan.accumulation * one_round):
            unexpected.append(f"{name}: {sorted(found)} in {len(messages)} messages, not {sorted(expected)}")
        verdict = ", ".join(sorted(found, reverse=True)) or "right"
        sent = f"{len(messages):>11}{sum(messages) / 1e6:>10.2f}"
        ranks.print(f"{name:29} {sent}{gradient_off:>14.1e}{loss_after:>12.4f}   {verdict}")
    ranks.leave()
    if unexpected:
        raise SystemExit(f"[rank {ranks.rank}] error: not what this lesson says: {'; '.join(unexpected)}")
    ranks.print("\nThe right ways equal one process; the wrong ones were found, and none of them by its loss.")


def train(
    accumulate: Accumulate,
    batches: list[MicroBatches],
    config: AccumulationConfig,
    ranks: Ranks,
    reference: Transformer,
) -> tuple[Transformer, list[int], float]:
    """Train a fresh model, one optimizer step for each item of `batches`.

    Returns:
        The bare model; the size of each all-reduce of the last step in bytes; and the largest difference
        between the gradient of the first step and the reference's, over all parameters and all ranks.
    """
    messages: list[int] = []

    def count_and_average(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """DDP calls this hook when a bucket is full. Do what it would do by itself, and take a note."""
        messages.append(bucket.buffer().nbytes)
        work = dist.all_reduce(bucket.buffer().div_(ranks.world_size), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    model = Transformer(config.model, config.seed).to(ranks.device).double()
    ddp_model = DDP(model, device_ids=ranks.device_ids)
    ddp_model.register_comm_hook(None, count_and_average)
    optimizer = build_optimizer(model.parameters(), OptimizerConfig(), ranks.device)
    gradient_off = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for step, micro_batches in enumerate(batches):
        messages.clear()
        # Valid tokens of the global batch: one integer, summed over the ranks before the first backward.
        valid_tokens = torch.stack([count_valid(targets) for _, targets in micro_batches]).sum()
        dist.all_reduce(valid_tokens)
        accumulate(ddp_model, micro_batches, ranks.world_size / valid_tokens.item())
        if step == 0:
            pairs = zip(model.parameters(), reference.parameters(), strict=True)
            gradient_off = torch.stack([(p.grad - true.grad).abs().max() for p, true in pairs]).max()
            dist.all_reduce(gradient_off, op=dist.ReduceOp.MAX)
        optimizer.step()
        optimizer.zero_grad()
    return model, messages, gradient_off.item()


def load(train_set: TokenDataset, plan: BatchPlan, config: AccumulationConfig, ranks: Ranks) -> list[MicroBatches]:
    """The micro-batches of every step. Targets within a sample's prompt are -100: they do not count.

    How long the prompt is, 0 to sequence_length - 1 tokens, depends on the sample alone, not on who gets it.
    """
    loader = Loader(train_set, plan, ranks.device)
    positions = torch.arange(config.data.sequence_length, device=ranks.device)

    def mask(tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        prompt_lengths = tokens.sum(dim=1, keepdim=True) % config.data.sequence_length
        return tokens, targets.masked_fill(positions < prompt_lengths, -100)

    return [[mask(*batch) for batch, _ in loader.micro_batches(step)] for step in range(config.train.steps)]


if __name__ == "__main__":
    main(parse(AccumulationConfig))
