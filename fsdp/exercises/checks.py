"""What is expected of the exercises; run by tools/exercises.py on the number of ranks given here."""

import math
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from grading import expect
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

WORLD_SIZES = {
    "fill_the_shards": (2, 3, 4),  # 4: of 3 rows the last rank has none
    "predict_the_traffic": (2, 4),  # 4: copies
}
EXACT = 1e-12  # fp64, numbers of order 1 to 10, sums of some dozens of them: errors stay below 1e-13

# The name of what torch.distributed calls underneath, and which of its arguments is the whole: an output, an input.
COLLECTIVES = {
    "_allgather_base_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "allreduce_": ("all-reduce", None),
}


class Collectives(TorchDispatchMode):
    """Writes down (name, bytes of the whole, ranks) of what the running thread communicates, backward included.

    An all-reduce does not tell among how many ranks; that is 0 here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            short = func.name().split("::")[1]
            name, position = COLLECTIVES.get(short, (short.strip("_"), None))
            if position is None:
                tensors = args[0] if isinstance(args[0], list) else [args[0]]
                self.log.append((name, sum(t.nbytes for t in tensors if isinstance(t, Tensor)), 0))
            else:
                whole, part = args[position], args[1 - position]
                self.log.append((name, whole.nbytes, whole.numel() // part.numel()))
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> int:
        return sum(entry[0] == name for entry in self.log)

    def names(self) -> str:
        return ", ".join(sorted({name for name, _, _ in self.log})) or "no communication"


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference; infinite for nan or another shape."""
    if found.shape != expected.shape or (found - expected).isnan().any():
        return math.inf
    return max((found - expected).abs().flatten().tolist(), default=0.0)


def rows(tensor: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row.flatten().tolist()) for row in tensor}


def plural(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


# ------------------------------------------------------------------------------------------ exercise 1


def check_choose_the_units(module: ModuleType, rank: int, world_size: int) -> None:
    layers = 3

    def build() -> Any:
        torch.manual_seed(1)
        return module.TiedModel(vocabulary=12, width=8, blocks=layers).double()

    alone, model = build(), build()
    plain = torch.optim.AdamW(alone.parameters(), lr=0.1)
    mesh = init_device_mesh("cpu", (world_size,))
    optimizer = module.shard(model, mesh, learning_rate=0.1)
    names = {child: name for name, child in model.named_modules()}
    units = {names[m] or "the model" for m in model.modules() if isinstance(m, FSDPModule)}
    expected = {f"blocks.{number}" for number in range(layers)}
    expect(
        "the model" in units,
        f"the units are {', '.join(sorted(units)) or 'none'}",
        "one for each block, and the model",
        "the model is called last, and takes the parameters that no unit has: embedding, norm, head",
    )
    expect(
        expected <= units,
        f"the units are {', '.join(sorted(units))}: all of a forward's parameters in one message",
        f"{', '.join(sorted(expected))} and the model",
        "fully_shard(block) for each block, before the model itself",
    )
    more = sorted(units - expected - {"the model"})
    hint = "each unit costs messages of its own"
    if {"embedding", "head"} & set(more):
        hint = "embedding and head are one parameter, needed whole by both: leave them to the model's own unit"
    expect(not more, f"{', '.join(more)} is a unit too", "blocks and the model", hint)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    expect(
        held == {id(parameter) for parameter in model.parameters()},
        "the optimizer holds parameters that the model has no more",
        "the shards (DTensors)",
        "fully_shard replaces the model's parameters: make the optimizer after it",
    )
    tokens = torch.arange(12)
    for step in range(3):
        F.cross_entropy(alone(tokens), tokens.roll(1)).backward()
        share = tokens.chunk(world_size)[rank]
        with Collectives() as counter:
            F.cross_entropy(model(share), tokens.roll(1)[share]).backward()
        for one in (plain, optimizer):
            one.step()
            one.zero_grad()
        gathers, scatters = counter.count("all-gather"), counter.count("reduce-scatter")
        hint = "backward begins with the last block: freed after its forward, it is gathered again at once"
        if gathers < 2 * layers:
            hint = "the other blocks, too, stay whole from forward to backward: that is the memory one wants to save"
        expect(
            (gathers, scatters) == (2 * layers, layers + 1),
            f"step {step}: {plural(gathers, 'all-gather')} and {plural(scatters, 'reduce-scatter')}",
            f"{2 * layers} and {layers + 1} with {layers} blocks",
            hint,
        )
        for (name, parameter), right in zip(model.named_parameters(), alone.parameters(), strict=True):
            difference = off(parameter.detach().full_tensor(), right.detach())
            expect(
                difference <= EXACT,
                f"after step {step}, {name} is {difference:.1e} away from the training of one process",
                "the same weights, to 1e-12",
                "an AdamW with this learning rate and torch's defaults, over all parameters",
            )


# ------------------------------------------------------------------------------------------ exercise 2


def check_fill_the_shards(module: ModuleType, rank: int, world_size: int) -> None:
    numbers = torch.linspace(-2, 2, 6, dtype=torch.float64)
    for seed in (0, 1):
        alone = module.WaveModel()
        with torch.no_grad():
            for name, parameter in alone.named_parameters():
                parameter.copy_(module.initial_value(name, parameter.shape, seed))
        with Collectives() as counter:
            model = module.build(seed)
        where = f"seed {seed}, rank {rank} of {world_size}"
        for name, parameter in model.named_parameters():
            expect(
                not parameter.is_meta,
                f"{name} is still on the meta device",
                "memory on the CPU",
                "model.to_empty(device='cpu') first: copying into a meta tensor does nothing, and says nothing",
            )
            expect(
                isinstance(parameter, DTensor),
                f"{name} is no DTensor any more",
                "the shard that fully_shard made, filled",
                "copy_ into the parameter; do not replace it",
            )
            whole = dict(alone.named_parameters())[name].detach()
            pieces = whole.chunk(world_size)
            right = pieces[rank] if rank < len(pieces) else whole[:0]
            found = parameter.to_local().detach()
            hint = "cut like torch.chunk: rank r has the r-th piece of the rows"
            if not rows(found) <= rows(whole):
                hint = "no rows of the whole: its values depend on its name, its whole shape and the seed alone"
            if found.numel() and off(found, module.initial_value(name, found.shape, seed)) == 0:
                hint = "these are the first numbers of the seed, on every rank: make the whole, then take its rows"
            expect(
                torch.equal(found, right),
                f"{where}: its rows of {name} are off by {off(found, right):.1e}",
                "the same rows of the whole, bit for bit",
                hint,
            )
        expect(
            torch.equal(model.waves.frequencies, alone.waves.frequencies),
            f"{where}: the table waves.frequencies is not what it was made as",
            "that of Waves.table()",
            "to_empty gives buffers new memory as well, and no checkpoint brings this one back",
        )
        expect(
            not counter.log,
            f"{where}: {plural(len(counter.log), 'message')} ({counter.names()})",
            "none: each rank can make every parameter",
            "distribute_tensor sends rank 0's tensor to all, unless src_data_rank=None",
        )
        with torch.no_grad():
            found, right = model(numbers), alone(numbers)
        difference = off(found, right)
        expect(
            difference <= EXACT,
            f"{where}: outputs are off by {difference:.1e}",
            "those of one process",
            "leave the rest of the file as it is",
        )


# ------------------------------------------------------------------------------------------ exercise 3


def check_predict_the_traffic(module: ModuleType, rank: int, world_size: int) -> None:
    # (copies, reshard, micro-batches, parameters in bf16)
    shared_by_all = [(1, True, 1, False), (1, False, 1, True), (1, True, 3, True), (1, False, 3, False)]
    hybrid = [(2, True, 1, False), (2, False, 3, True)] if world_size == 4 else []
    for copies, reshard, micro_batches, low in shared_by_all + hybrid:
        model, counter = measured(copies, reshard, micro_batches, low, world_size)
        blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
        root = sum(p.numel() for p in model.parameters()) - sum(blocks)
        gather_bytes = 2 if low else 4
        traffic = module.predict(root, blocks, world_size, copies, reshard, micro_batches, gather_bytes, 4)
        where = (
            f"{'FULL_SHARD' if reshard else 'SHARD_GRAD_OP'}, ranks={world_size}, copies={copies}, "
            f"micro_batches={micro_batches}, gather_bytes={gather_bytes}"
        )
        counts = {
            "all-gathers": "FULL_SHARD gathers a block twice in each micro-batch, and the root once",
            "reduce-scatters": "one for each unit, in the last micro-batch: gradients add up on each rank until then",
            "all-reduces": "one for each unit, and only where there is more than one copy",
        }
        for name, hint in counts.items():
            predicted, found = getattr(traffic, name.replace("-", "_")), counter.count(name[:-1])
            expect(predicted == found, f"{where}: you predict {predicted} {name}", f"{found}, as measured", hint)
        sent = dict.fromkeys(("all-gather", "reduce-scatter", "all-reduce"), 0.0)
        for name, nbytes, ranks in counter.log:
            if name == "all-reduce":
                sent[name] += 2 * nbytes * (copies - 1) / copies
            else:
                sent[name] += nbytes * (ranks - 1) / ranks
        total = round(sum(sent.values()))
        hint = "all-gathers in gather_bytes, the others in reduce_bytes; (k - 1) / k of what, with which k?"
        if traffic.bytes_sent == round(sum(nbytes for _, nbytes, _ in counter.log)):
            hint = "a rank sends (k - 1) / k of the whole: it keeps its own part"
        elif copies > 1:
            hint = "within a copy k is ranks / copies; between copies travels a shard, k is the copies, and both ways"
        expect(
            traffic.bytes_sent == total,
            f"{where}: you predict {traffic.bytes_sent:,} bytes sent by a rank",
            f"{total:,}: {', '.join(f'{round(n):,} in {name}s' for name, n in sent.items() if n)}",
            hint,
        )


class Residual(nn.Module):
    """Three blocks between two layers, all of whose rows divide by 2 and by 4."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.enter(x)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.leave(hidden)


def measured(copies: int, reshard: bool, micro_batches: int, low: bool, world_size: int) -> tuple[Any, Collectives]:
    """The sharded model, and what a step of it has communicated."""
    model: Any = Residual()
    mesh = init_device_mesh("cpu", (copies, world_size // copies), mesh_dim_names=("dp_replicate", "dp_shard"))
    policy = MixedPrecisionPolicy(torch.bfloat16 if low else None, torch.float32)
    options: dict[str, Any] = {"mesh": mesh if copies > 1 else mesh["dp_shard"], "mp_policy": policy}
    for block in model.blocks:
        fully_shard(block, reshard_after_forward=reshard, **options)
    fully_shard(model, reshard_after_forward=False, **options)
    with Collectives() as counter:
        for number in range(micro_batches):
            model.set_requires_gradient_sync(number == micro_batches - 1)
            model(torch.ones(3, 4)).float().pow(2).sum().backward()
    return model, counter


# ------------------------------------------------------------------------------------------ exercise 4


class Watched(nn.Module):
    """A model that sends nothing, and writes down how many samples each call of it brings."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return self.model(x)


def check_evaluate_together(module: ModuleType, rank: int, world_size: int) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    mesh = init_device_mesh("cpu", (world_size,))
    sharded = build()
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    for samples, batch_size in ((24, 4), (25, 4), (26, 13), (7, 1), (1, 4)):
        torch.manual_seed(samples)
        inputs, targets = torch.randn(samples, 8).double(), torch.randint(0, 3, (samples,))
        with torch.no_grad():
            losses = F.cross_entropy(build()(inputs), targets, reduction="none")
        where = f"{plural(samples, 'sample')} in batches of {batch_size}"
        # Without shards first: ranks that call their model less often would leave the others waiting.
        watched = Watched(build())
        found = module.evaluate(watched, inputs, targets, batch_size)
        everyone: list[Any] = [None] * world_size
        dist.all_gather_object(everyone, watched.calls)
        longest = -(-samples // world_size)
        batches = -(-longest // batch_size)
        calls = [len(each) for each in everyone]
        expect(
            len(set(calls)) == 1,
            f"{where}: the ranks call the model {calls} times",
            f"{batches} times each",
            "a forward of a sharded model gathers: the rank that calls it once more would wait for ever",
        )
        largest = max(max(each, default=0) for each in everyone)
        expect(
            largest <= batch_size,
            f"{where}: {plural(largest, 'sample')} at a time",
            f"at most {batch_size}",
            "that is what fits into memory",
        )
        expect(
            calls[0] <= batches,
            f"{where}: each rank calls the model {plural(calls[0], 'time')}, with {sum(everyone[0])} samples on rank 0",
            f"{batches}, for shares of at most {longest}",
            "share the samples out: a rank that evaluates all of them saves nothing",
        )
        right = losses.mean().item()
        hint = "every sample once, none filled in; sum losses and counts over batches and ranks, and divide once"
        first = losses[: len(losses) // world_size * world_size]
        twice = torch.cat([losses, losses[: -samples % world_size]])
        if len(first) and abs(found - first.mean().item()) <= EXACT:
            hint = f"this is the mean over {len(first)} samples: what is left over counts as well"
        elif abs(found - twice.mean().item()) <= EXACT and samples % world_size:
            hint = f"this is the mean over {len(twice)} samples: those that fill up a share count twice"
        expect(
            abs(found - right) <= EXACT,
            f"{where}: evaluate gives {found:.12f} on rank {rank}",
            f"{right:.12f}, as one process does",
            hint,
        )
        found = module.evaluate(sharded, inputs, targets, batch_size)
        expect(
            abs(found - right) <= EXACT,
            f"{where}: with the model sharded evaluate gives {found:.12f} on rank {rank}",
            f"{right:.12f}, as without",
            "the model that is handed in is the one to call",
        )
