"""Who sees which sample? DistributedSampler and its traps, beside a batch that is a function of (seed, step).

    python collectives/data_sharding_demo.py --ranks 4                  # one process plays all ranks
    torchrun --nproc-per-node=3 collectives/data_sharding_demo.py       # real ranks, and training on uneven ends

Each part prints what every rank sees and checks the counts. The samples are just numbers, 0 to samples − 1.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.algorithms.join import Join
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from common.config import parse
from common.data_sharding import BatchConfig, BatchPlan, evaluation_batches
from common.ranks import Ranks, fail, join, read_environment
from common.replica_check import differing_replicas

EPOCHS = 3


@dataclass
class ShardingConfig:
    """The data set, and how it is cut."""

    samples: int = 25
    """Samples in the data set; 25 divides by neither 2 nor 3 nor 4."""
    batch: int = 12
    """Samples per step over all ranks; must divide among them."""
    ranks: int = 3
    """How many ranks plain python plays; under torchrun there are as many as it started."""
    seed: int = 1234
    """Decides the order."""

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.samples < 1 or self.batch < 1:
            raise ValueError(
                f"samples = {self.samples}, batch = {self.batch}, ranks = {self.ranks} must be at least 1 each"
            )


class World:
    """The ranks: real ones that compute each their own part, or n played by one process."""

    def __init__(self, n: int, ranks: Ranks | None) -> None:
        self.n, self.ranks = n, ranks

    def by_rank(self, compute: Callable[[int], Any]) -> list[Any]:
        """What `compute(rank)` gives on every rank, by rank; on all ranks."""
        return self.ranks.all_gather(compute(self.ranks.rank)) if self.ranks else [*map(compute, range(self.n))]

    def print(self, text: str) -> None:
        """Print on rank 0 alone."""
        if self.ranks is None or self.ranks.is_main:
            print(text, flush=True)

    def print_shards(self, shards: list[list[int]]) -> None:
        """A row of samples for each rank."""
        for rank, shard in enumerate(shards):
            self.print(f"  rank {rank}: {len(shard):2} samples  {' '.join(f'{sample:2}' for sample in shard)}")


def must(condition: bool, what: str) -> None:
    """End all ranks when what the demonstration says is not what happened; all ranks compute the same."""
    if not condition:
        fail(f"{what}: not seen; expected so by the definitions; compare torch's version with requirements.txt")


def sampler_shards(world: World, config: ShardingConfig, epoch: int | None = 0, drop_last: bool = False) -> list[Any]:
    """What DistributedSampler gives each rank; `epoch` None: nobody calls set_epoch."""

    def shard(rank: int) -> list[int]:
        sampler = DistributedSampler(
            range(config.samples), world.n, rank, shuffle=True, seed=config.seed, drop_last=drop_last
        )
        if epoch is not None:
            sampler.set_epoch(epoch)
        return list(sampler)

    return world.by_rank(shard)


def show_epochs(world: World, config: ShardingConfig) -> None:
    """The order changes from epoch to epoch only with set_epoch."""
    world.print("\n1. DistributedSampler, two epochs without set_epoch: the same order every time")
    forgotten = [sampler_shards(world, config, None) for _ in range(2)]
    for epoch, shards in enumerate(forgotten):
        world.print(f"  epoch {epoch}, rank 0: {shards[0]}")
    must(forgotten[0] == forgotten[1], "the same order without set_epoch")
    world.print("   with sampler.set_epoch(epoch) at the start of each:")
    right = [sampler_shards(world, config, epoch) for epoch in range(2)]
    for epoch, shards in enumerate(right):
        world.print(f"  epoch {epoch}, rank 0: {shards[0]}")
    must(config.samples < 10 or right[0] != right[1], "another order with set_epoch")  # of few samples it may recur


def show_padding(world: World, config: ShardingConfig) -> None:
    """Samples that come twice (padding) or never (drop_last)."""
    n, samples = world.n, config.samples
    shards = sampler_shards(world, config)
    seen = Counter(sample for shard in shards for sample in shard)
    twice = sum(count - 1 for count in seen.values())
    world.print(f"\n2. It pads: {samples} samples on {n} ranks, so {twice} come once too often: {_again(seen)}")
    world.print_shards(shards)
    must(len(seen) == samples and twice == math.ceil(samples / n) * n - samples, "each sample, and padding to n")

    shards = sampler_shards(world, config, drop_last=True)
    seen = Counter(sample for shard in shards for sample in shard)
    lost = sorted(set(range(samples)) - set(seen))
    world.print(f"\n3. drop_last=True: nobody sees {len(lost)} of them in this epoch: {_listed(lost)}")
    world.print_shards(shards)
    must(max(seen.values(), default=1) == 1, "no sample twice")
    must(len(lost) == samples % n, "as many dropped as do not divide")


def _again(seen: Counter[int]) -> str:
    return _listed(sorted(sample for sample, count in seen.items() if count > 1))


def _listed(samples: list[int]) -> str:
    return ", ".join(map(str, samples)) or "none"


def show_plan(world: World, config: ShardingConfig) -> None:
    """This project's batches: a function of (seed, step), the same for any number of ranks."""
    n, size, samples = world.n, config.batch, config.samples
    steps = EPOCHS * samples // math.gcd(samples, size)  # a whole number of epochs
    batch = BatchConfig(size)

    def shard(rank: int) -> list[list[int]]:
        plan = BatchPlan(batch, samples, config.seed, rank, n)
        return [[plan.sample(p) for part in plan.positions(step) for p in part] for step in range(steps)]

    shards = world.by_rank(shard)
    one = BatchPlan(batch, samples, config.seed)
    alone = [[one.sample(p) for part in one.positions(step) for p in part] for step in range(steps)]
    joined = [[sample for rank in range(n) for sample in shards[rank][step]] for step in range(steps)]
    world.print(f"\n4. A function of (seed, step), batches of {size}: steps 0 to 2 (an epoch ends within a batch)")
    for step in range(3):
        world.print(f"  step {step}: {' | '.join(' '.join(f'{s:2}' for s in shards[rank][step]) for rank in range(n))}")
    must(joined == alone, "the same global batches, in the same order, as on one rank")
    seen = Counter(sample for step in joined for sample in step)
    times = steps * size // samples
    must(set(seen.values()) == {times} and len(seen) == samples, "every sample once an epoch")
    resumed = BatchPlan(batch, samples, config.seed, 0, n)
    later = [resumed.sample(p) for part in resumed.positions(steps - 1) for p in part]
    must(later == shards[0][steps - 1], "step N without the steps before it")
    world.print(
        f"  {steps} steps: each sample exactly {times} times; put together they are the batches of one rank alone;"
    )
    world.print("  step N can be asked for without the steps before it: nothing to save, nothing to set per epoch")


def show_evaluation(world: World, config: ShardingConfig) -> None:
    """Evaluation: every sample once, on ranks with different counts, and what padding does to a mean."""
    samples, n = list(range(config.samples)), world.n

    def shard(rank: int) -> list[int]:
        batches = evaluation_batches(samples, 4, torch.device("cpu"), rank, n)
        return [sample for batch in batches for sample in batch.tolist()]

    shards = world.by_rank(shard)
    world.print("\n5. Evaluation without padding: uneven ends, every sample once")
    world.print_shards(shards)
    must(sorted(s for shard in shards for s in shard) == samples, "every sample once")
    counts = [len(shard) for shard in shards]
    must(max(counts) - min(counts) == (1 if config.samples % n else 0), "counts that differ by one at most")
    padded = [sample for shard in sampler_shards(world, config) for sample in shard]
    exact, wrong = sum(samples) / len(samples), sum(padded) / len(padded)
    world.print(f"  mean over them: {exact:.4f}; over the padded shards of part 2: {wrong:.4f}")


def show_join(world: World, config: ShardingConfig) -> None:
    """Training on uneven ends: a rank that is through joins in the others' all-reduces until all are."""
    ranks = world.ranks
    if ranks is None:
        world.print("\n6. Training on uneven ends needs real ranks: start this script with torchrun")
        return
    mine = range(ranks.rank, config.samples, ranks.world_size)
    model = torch.nn.Linear(1, 1).to(ranks.device)
    ddp_model = DistributedDataParallel(model, device_ids=ranks.device_ids)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    steps = 0
    with Join([ddp_model]):  # without it, the ranks with one sample more would wait in an all-reduce for ever
        for sample in mine:
            ddp_model(torch.tensor([[float(sample)]], device=ranks.device)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
    all_steps, differs = ranks.all_gather(steps), differing_replicas(model)
    world.print(f"\n6. Training on uneven ends under Join: steps by rank {all_steps}, and nobody hangs;")
    must(sum(all_steps) == config.samples and differs is None, "every sample once, and equal weights at the end")
    world.print("  the weights are equal on all ranks at the end (a rank that is through follows the others')")


@record
def main(config: ShardingConfig) -> None:
    real = read_environment().world_size > 1
    ranks = join("cpu", timeout_s=60) if real else None
    world = World(ranks.world_size if ranks else config.ranks, ranks)
    world.print(f"{config.samples} samples, {world.n} {'real' if real else 'played'} ranks")
    for part in (show_epochs, show_padding, show_plan, show_evaluation, show_join):
        part(world, config)
    world.print("\nall counts are as they must be")
    if ranks:
        ranks.leave()


if __name__ == "__main__":
    main(parse(ShardingConfig))
