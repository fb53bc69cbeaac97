"""What a rank holds, and when: parameters, gradients and optimizer state at named moments of one training step.

    torchrun --nproc-per-node=2 fsdp/basics.py                             # some ten seconds on a laptop
    torchrun --nproc-per-node=8 fsdp/basics.py --model.preset llama_1b --data.sequence_length 2048     # eight GPUs

FULL_SHARD (`fsdp.reshard_after_forward` true) and SHARD_GRAD_OP (false) take the same step side by side. Bytes are
those of the memory behind the tensors: a whole parameter stays as an object when it is freed, with 0 bytes behind it.
Below the table stands the formula that predicts it. The exit code is 1 if one byte, or one collective, is another.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import torch
from memory_meter import IN_TRANSIT, QUANTITIES, Collectives, HeldBytes, Meter
from settings import FsdpConfig, ShardedConfig, describe, mesh_shape
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from common.config import parse
from common.data import TextConfig
from common.data_sharding import derive_seed
from common.meta_device import fill_shards
from common.optimizer import OptimizerConfig, build_optimizer
from common.ranks import Ranks, fail, join
from common.transformer import ModelConfig, Transformer

STRATEGIES = {"FULL_SHARD": True, "SHARD_GRAD_OP": False}  # whether blocks are resharded after their forward


@dataclass
class Sharding:
    replicate: int = 1
    """Copies of the model; ranks / replicate share one (above 1: HYBRID_SHARD)."""
    reshard_after_forward: Literal["true", "false", "both"] = "both"
    """true: FULL_SHARD alone; false: SHARD_GRAD_OP alone; both: side by side."""


@dataclass
class RandomText:
    sequence_length: int = 64
    """Random tokens per sample: neither their meaning nor their number changes the bytes that are counted here."""


@dataclass
class BasicsConfig:
    fsdp: Sharding = field(default_factory=Sharding)
    data: RandomText = field(default_factory=RandomText)
    model: ModelConfig = field(default_factory=ModelConfig)
    seed: int = 1234
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        self.settings(True)

    def settings(self, reshard: bool) -> ShardedConfig:
        """The settings of fsdp/train.py for one strategy. ValueError: the sequence is too long for the model."""
        text = TextConfig(sequence_length=self.data.sequence_length)
        options = FsdpConfig(replicate=self.fsdp.replicate, reshard_after_forward=reshard)
        return ShardedConfig(seed=self.seed, data=text, model=self.model, fsdp=options)


@record
def main(config: BasicsConfig) -> None:
    ranks = join(config.device)
    if ranks.world_size == config.fsdp.replicate:
        fail(
            "one process has nobody to share with; use torchrun --nproc-per-node=2 fsdp/basics.py, and more ranks than "
            f"fsdp.replicate = {config.fsdp.replicate}"
        )
    wanted = config.fsdp.reshard_after_forward
    strategies = {n: reshard for n, reshard in STRATEGIES.items() if wanted in ("both", str(reshard).lower())}
    held, collectives, wrong = {}, {}, []
    for name, reshard in strategies.items():
        meter, model = one_step(config.settings(reshard), ranks)
        expected, counts = predict(model, reshard, config.fsdp.replicate, ranks)
        held[name], collectives[name] = meter.moments, meter.collectives.counts
        for moment, quantities in expected.items():
            for quantity, nbytes in quantities.items():
                if (found := meter.moments[moment][quantity]) != nbytes:
                    wrong.append(f"{name}, {moment}: {found:,} bytes of {quantity}, not {nbytes:,}")
        if collectives[name] != counts:
            wrong.append(f"{name}: {dict(collectives[name])}, not {dict(counts)}")
        ranks.print(f"{name + ':':15}{describe(model)}")
    print_table(held, ranks)
    print_formulas(model, collectives, ranks.world_size // config.fsdp.replicate, ranks)
    problems = [f"[rank {rank}] {line}" for rank, lines in enumerate(ranks.all_gather(wrong)) for line in lines]
    ranks.leave()
    if problems:
        raise SystemExit(f"error: not what the formula says: {'; '.join(problems)}")
    ranks.print("\nEvery byte and every collective is as the formula says, on all ranks.")


def one_step(settings: ShardedConfig, ranks: Ranks) -> tuple[Meter, Transformer]:
    """Shard a model as fsdp/train.py does, take one step unseen, so that there is optimizer state, and one metered."""
    with torch.device("meta"):
        model = Transformer(settings.model)
    copies, shards = mesh_shape(settings.fsdp, ranks)
    mesh = init_device_mesh(ranks.device.type, (copies, shards), mesh_dim_names=("dp_replicate", "dp_shard"))
    for unit in (*model.blocks.values(), model):
        fully_shard(
            unit,
            mesh=mesh if copies > 1 else mesh["dp_shard"],
            reshard_after_forward=None if settings.fsdp.reshard_after_forward else False,
        )
    model.to_empty(device=ranks.device)
    fill_shards(model, settings.seed)
    optimizer = build_optimizer(model.parameters(), OptimizerConfig(), ranks.device)
    meter = Meter(model, optimizer)
    meter.is_on = True
    meter.note("after sharding")
    meter.is_on = False

    generator = torch.Generator().manual_seed(derive_seed(settings.seed, ranks.rank))
    shape = (1, settings.data.sequence_length + 1)
    text = torch.randint(settings.model.vocabulary, shape, generator=generator).to(ranks.device)
    for metered in (False, True):
        meter.is_on = metered
        meter.collectives = Collectives()
        with meter.collectives:
            meter.note("before the forward")
            loss = model(text[:, :-1], text[:, 1:])
            meter.note("after the forward")
            loss.backward()
            meter.note("after backward")
        optimizer.step()
        meter.note("after the step")
        optimizer.zero_grad()
        meter.note("after zero_grad")
    return meter, model


def predict(model: Transformer, reshard: bool, copies: int, ranks: Ranks) -> tuple[dict[str, HeldBytes], Counter[str]]:
    """The formula: bytes by moment and quantity on this rank (in transit excepted), and collectives of a step."""
    n = ranks.world_size // copies
    blocks = [list(block.parameters()) for block in model.blocks.values()]
    of_blocks = {parameter for block in blocks for parameter in block}
    root = [parameter for parameter in model.parameters() if parameter not in of_blocks]
    # The embedding's gradient is the last; tied, it waits inside autograd for its part from there, and is not counted.
    early = [parameter for parameter in root if parameter is not model.embedding.weight]

    def shard(parameters: list[DTensor]) -> int:
        """Of n ranks each allocates the rows of a parameter divided by n, rounded up: the last ranks' are padding."""
        return sum(rounded_up(p, n) for p in parameters)

    def whole(parameters: list[DTensor]) -> int:
        return shard(parameters) * n  # padding included: it is gathered too

    def exact(parameters: list[DTensor]) -> int:
        return sum(p.numel() * p.element_size() for p in parameters)

    mine = sum(p.to_local().numel() * p.element_size() for p in model.parameters())  # no padding: 0 rows on some ranks
    everything = [*root, *(p for block in blocks for p in block)]
    last = len(blocks) - 1
    names = list(model.blocks)

    def held(whole_parameters: int, gradient_shards: int, whole_gradients: int, state: int = 2 * mine) -> HeldBytes:
        values = shard(everything), whole_parameters, gradient_shards, whole_gradients, state
        return dict(zip(QUANTITIES, values, strict=True))

    def up_to(number: int) -> int:
        """Whole parameters while block `number` computes: SHARD_GRAD_OP keeps those before it for backward."""
        return whole(root) + sum(whole(block) for block in blocks[number if reshard else 0 : number + 1])

    moments = {"after sharding": held(0, 0, 0, state=0), "before the forward": held(0, 0, 0)}
    for number in (0, last):
        moments[f"forward, in block {names[number]}"] = held(up_to(number), 0, 0)
    moments["after the forward"] = held(whole(root) if reshard else up_to(last), 0, 0)
    for number in (last, 0):
        sent = sum(shard(block) for block in blocks[number + 1 :])
        computed = exact(early) + exact(blocks[number])  # the root's wait for the embedding's, the last of all
        moments[f"backward, in block {names[number]}"] = held(up_to(number), sent, computed)
    for moment in ("after backward", "after the step"):
        moments[moment] = held(0, shard(everything), 0)
    moments["after zero_grad"] = held(0, 0, 0)
    gathers = 1 + (2 if reshard else 1) * len(blocks)  # the root stays whole from its forward to its backward
    counts = Counter({"all-gathers": gathers, "reduce-scatters": 1 + len(blocks)})
    if copies > 1:
        counts["all-reduces"] = 1 + len(blocks)  # of gradient shards, among the copies
    return moments, counts


def rounded_up(parameter: DTensor, n: int) -> int:
    """Bytes of a shard with its padding."""
    rows, *rest = parameter.shape
    return -(-rows // n) * math.prod(rest) * parameter.element_size()


def print_table(held: dict[str, dict[str, HeldBytes]], ranks: Ranks) -> None:
    """Rows are moments; a quantity that is the same in both strategies has one column."""
    columns = []
    for quantity in (*QUANTITIES, IN_TRANSIT):
        each = {name: [row[quantity] for row in moments.values()] for name, moments in held.items()}
        same = len({tuple(values) for values in each.values()}) == 1
        columns += [(quantity, "", next(iter(each.values())))] if same else [(quantity, n, v) for n, v in each.items()]
    ranks.print(f"\nbytes on rank 0 of {ranks.world_size}")
    headings = [(*quantity.split(" "), strategy) for quantity, strategy, _ in columns]
    for line in zip(*headings, strict=True):
        ranks.print(f"{'':20}" + "".join(f"{word:>14}" for word in line))
    for row, moment in enumerate(next(iter(held.values()))):
        ranks.print(f"{moment:20}" + "".join(f"{values[row]:>14,}" for _, _, values in columns))


def print_formulas(model: Transformer, collectives: dict[str, Counter[str]], n: int, ranks: Ranks) -> None:
    """The terms of `predict` in numbers."""
    parameters = list(model.parameters())
    whole = sum(p.numel() * p.element_size() for p in parameters)
    blocks = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in model.blocks.values()]
    rounded = sum(rounded_up(p, n) for p in parameters)
    ranks.print(f"\nP, all parameters {whole:,}; P/n {whole / n:,.0f}, with rows rounded up {rounded:,}")
    ranks.print(f"B, largest block {max(blocks):,}; R, the root's (embedding, norm, head) {whole - sum(blocks):,}")
    ranks.print("FULL_SHARD: 16 bytes a parameter / n, and at most R + B whole; SHARD_GRAD_OP: P whole")
    for name, counts in collectives.items():
        passes = "1 + 2" if STRATEGIES[name] else "1 + 1"
        ranks.print(
            f"{name}: {counts['all-gathers']} all-gathers ({passes} × {len(blocks)} blocks), "
            f"{counts['reduce-scatters']} reduce-scatters (1 + {len(blocks)}), {counts['all-reduces']} all-reduces"
        )


if __name__ == "__main__":
    main(parse(BasicsConfig))
