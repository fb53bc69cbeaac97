"""What is expected of the exercises; run by tools/exercises.py."""

import itertools
import math
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from grading import expect
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

EXACT = 1e-12  # fp64, numbers of order 1 to 10, sums of some dozens of them: errors stay below 1e-13


class Collectives(TorchDispatchMode):
    """Writes down (name, rows or numbers that this rank gives) of what the running thread communicates."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].strip("_")
        if func.namespace in ("c10d", "_c10d_functional") and not name.startswith(("wait", "wrap")):
            given = args[1] if name in ("alltoall_base", "allgather_base") else args[0]  # the other is the output
            tensors = given if isinstance(given, list | tuple) else [given]
            self.log.append((name, sum(len(t) if t.dim() else 1 for t in tensors if isinstance(t, Tensor))))
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> int:
        """Of a collective by the letters of its name: `allgather` is also all_gather_into_tensor."""
        return sum(entry.replace("_", "").startswith(name) for entry, _ in self.log)

    def names(self) -> str:
        return ", ".join(name for name, _ in self.log) or "no communication"


def off(found: Tensor | None, expected: Tensor) -> float:
    """The largest difference; infinite for None, nan or another shape."""
    if found is None or found.shape != expected.shape or (found - expected).isnan().any():
        return math.inf
    return max((found - expected).abs().flatten().tolist(), default=0.0)


def wrong(found: Tensor | None, expected: Tensor) -> str:
    """What is the matter with a gradient."""
    return "is missing" if found is None else f"is off by {off(found, expected):.1e}"


def close(found: Tensor | None, expected: Tensor) -> bool:
    return off(found, expected) <= EXACT


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------ exercise 1


def check_plan_of_a_block(module: ModuleType, rank: int, world_size: int) -> None:
    def build() -> nn.Module:
        torch.manual_seed(1)
        return module.Block(24).double()

    alone, block = build(), build()
    inputs = [random(2, 5, 24, seed=2).requires_grad_() for _ in range(2)]
    probe = random(2, 5, 24, seed=3)
    expected = alone(inputs[0])
    (expected * probe).sum().backward()

    plan = module.make_plan()
    mesh = init_device_mesh("cpu", (world_size,))
    unknown = sorted(set(plan) - {name for name, _ in block.named_modules()})
    expect(
        not unknown, f"the plan has {', '.join(unknown)}", "names such as ffn.up", "print(block) shows its submodules"
    )
    parallelize_module(block, mesh, plan)
    for name, parameter in block.named_parameters():
        whole = dict(alone.named_parameters())[name]
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        share = whole.numel() if "norm" in name else whole.numel() // world_size
        expect(
            local.numel() == share,
            f"rank {rank} keeps {local.numel()} numbers of {name}",
            f"{share} of {whole.numel()}",
            "every linear layer is in the plan, and no norm: each rank needs its whole weight",
        )
    forward, backward = CommDebugMode(), CommDebugMode()
    try:
        with forward:
            output = block(inputs[1])
    except RuntimeError as error:
        expect(
            False,
            f"the forward fails: {str(error).splitlines()[0][:150]}",
            "query, key and value of the same heads on a rank; whole outputs",
            "a layer cut by outputs must be followed by one cut by inputs, and only that one ends the pair",
        )
    expect(
        not isinstance(output, DTensor) and output.shape == expected.shape,
        f"the output on rank {rank} is a {type(output).__name__} of shape {tuple(output.shape)}",
        f"a plain tensor of shape {tuple(expected.shape)}",
        "the defaults of both styles give plain tensors, and RowwiseParallel whole ones",
    )
    expect(
        close(output, expected),
        f"the output on rank {rank} is off by {off(output, expected):.1e}",
        "that of one process",
        "gate and up feed down, and query, key and value feed output: which are cut by outputs, which by inputs?",
    )
    with backward:
        (output * probe).sum().backward()
    expect(
        close(inputs[1].grad, inputs[0].grad),
        f"the gradient of the input on rank {rank} {wrong(inputs[1].grad, inputs[0].grad)}",
        "that of one process, to 1e-12",
        "are the layouts what the tensors are? Whole on all ranks is Replicate()",
    )
    for (name, parameter), right in zip(block.named_parameters(), alone.parameters(), strict=True):
        found = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        expect(
            close(found, right.grad),
            f"the gradient of {name} on rank {rank} {wrong(found, right.grad)}",
            "that of one process, to 1e-12",
            "are the layouts what the tensors are? Whole on all ranks is Replicate()",
        )
    for direction, mode, hint in (
        (
            "forward",
            forward,
            "one for each pair: Colwise for its first layers, Rowwise for its last, all with defaults",
        ),
        (
            "backward",
            backward,
            "tell the module that contains query, key and value (or gate and up) what comes in, once",
        ),
    ):
        counts = {str(op).split(".")[-1]: count for op, count in mode.get_comm_counts().items()}
        expect(
            counts == {"all_reduce": 2},
            f"{direction} there are {', '.join(f'{n} {name}' for name, n in counts.items()) or 'no messages'}",
            "2 all_reduce: one for attention, one for the feed-forward layers",
            hint,
        )


# ------------------------------------------------------------------------------------------ exercise 2


def check_share_the_sequence(module: ModuleType, rank: int, world_size: int) -> None:
    for n, size in itertools.product((2, 3, 4), (2, 6)):
        length = 2 * n * size
        shares = [torch.as_tensor(module.my_positions(length, r, n)).tolist() for r in range(n)]
        expect(
            sorted(position for share in shares for position in share) == list(range(length)),
            f"of {length} positions {n} ranks hold {shares}",
            "each position once",
            "2n pieces, two for each rank",
        )
        sees = [sum(position + 1 for position in share) for share in shares]
        expect(
            len(set(sees)) == 1,
            f"of {length} positions {n} ranks hold {shares}, which see {sees} keys",
            "the same number on all ranks",
            "the first piece sees least and the last one most: these two go together, then the next two inwards",
        )
        expect(
            all(share == sorted(share) and share[1] == share[0] + 1 for share in shares),
            f"of {length} positions {n} ranks hold {shares}",
            "two pieces, each of neighbours in order, the earlier one first",
            "torch.chunk cuts into pieces",
        )

    length, shape = 12 * world_size, (2, 3, 12 * world_size, 4)
    mine = module.my_positions(length, rank, world_size)
    whole = [random(*shape, seed=i).requires_grad_() for i in range(3)]
    probe = random(*shape, seed=4)
    expected = F.scaled_dot_product_attention(*whole, is_causal=True)
    (expected * probe).sum().backward()

    parts = [tensor.detach()[:, :, mine].clone().requires_grad_() for tensor in whole]
    honest, pairs = F.scaled_dot_product_attention, 0

    def counted(query: Tensor, key: Tensor, *more: Any, **named: Any) -> Tensor:
        nonlocal pairs
        pairs += query.shape[2] * key.shape[2]
        return honest(query, key, *more, **named)

    F.scaled_dot_product_attention = counted
    try:
        with Collectives() as counter:
            output = module.attend(*parts)
            forward = counter.count("allgather"), len(counter.log)
            right = expected.detach()[:, :, mine]
            hint = "keys in the order of the sequence: the early pieces of ranks 0 … n - 1, the late ones of n - 1 … 0"
            if close(output, honest(*(part.detach() for part in parts), is_causal=True)):
                hint = "these queries have seen the keys of their own rank only"
            expect(
                close(output, right),
                f"the output on rank {rank} is off by {off(output, right):.1e}",
                "that of one process at its positions, to 1e-12",
                hint,
            )
            (output * probe[:, :, mine]).sum().backward()
    finally:
        F.scaled_dot_product_attention = honest
    piece = length // (2 * world_size)
    fair = (2 * world_size + 1) * piece**2
    expect(
        pairs == fair,
        f"rank {rank} has computed {pairs} pairs of query and key",
        f"{fair}, as all ranks: half of {length * length // world_size}, and half a piece",
        "a piece is handed the keys up to its own end, and no more: what is masked has been computed",
    )
    for name, part, tensor in zip(("query", "key", "value"), parts, whole, strict=True):
        right = tensor.grad[:, :, mine]
        expect(
            close(part.grad, right),
            f"the gradient of {name} on rank {rank} {wrong(part.grad, right)}",
            "that of one process at its positions, to 1e-12",
            "other ranks' queries have looked at these keys: the gathering has to hand their gradients back",
        )
    back = counter.count("reducescatter"), len(counter.log) - forward[1]
    expect(
        forward == (1, 1) and back == (1, 1),
        f"communication: {counter.names()}",
        "one all-gather forward, one reduce-scatter backward",
        "keys and values can be stacked, and gathered together",
    )


# ------------------------------------------------------------------------------------------ exercise 3


class Experts:
    """Those of one rank: matrices (width, width) by number. Counts the rows that each was given."""

    def __init__(self, weights: Tensor, own: range, where: str) -> None:
        self.weights = {number: weights[number].detach().clone().requires_grad_() for number in own}
        self.rows = dict.fromkeys(own, 0)
        self.own, self.where = own, where

    def compute(self, number: int, rows: Tensor) -> Tensor:
        expect(
            number in self.own,
            f"{self.where}: expert {number} was asked for",
            f"experts {self.own.start} and {self.own.stop - 1} on this rank",
            "rank r of n has the experts r E/n and following",
        )
        self.rows[number] += len(rows)
        return torch.tanh(rows @ self.weights[number])


def check_send_tokens_to_experts(module: ModuleType, rank: int, world_size: int) -> None:
    experts, width = 2 * world_size, 4
    own = range(2 * rank, 2 * rank + 2)
    sizes = [5 + 3 * r for r in range(world_size)]  # tokens of each rank
    generator = torch.Generator().manual_seed(5)
    spread = [torch.randint(0, experts, (size,), generator=generator) for size in sizes]
    cases = {
        "tokens for all experts": spread,
        "all tokens for the last expert": [torch.full((size,), experts - 1) for size in sizes],
        "no token on the last rank": [*spread[:-1], spread[-1][:0]],
    }
    for case, everyone in cases.items():
        where = f"{case}, rank {rank}"
        weights = random(experts, width, width, seed=6).requires_grad_()
        tokens = [random(len(chosen), width, seed=7 + r).requires_grad_() for r, chosen in enumerate(everyone)]
        probes = [random(len(chosen), width, seed=20 + r) for r, chosen in enumerate(everyone)]
        results = [
            torch.tanh(torch.einsum("ti,tij->tj", rows, weights[chosen]))
            for rows, chosen in zip(tokens, everyone, strict=True)
        ]
        sum((result * probe).sum() for result, probe in zip(results, probes, strict=True)).backward()

        mine = tokens[rank].detach().clone().requires_grad_()
        here = Experts(weights, own, where)
        with Collectives() as counter:
            output = module.apply_experts(mine, everyone[rank], experts, here.compute)
        expect(
            len(counter.log) == counter.count("alltoall"),
            f"{where}: {counter.names()}",
            "all-to-alls only",
            "a token goes to one rank, and no other has to see it",
        )
        load = torch.bincount(torch.cat(everyone), minlength=experts).tolist()
        for number in own:
            expect(
                here.rows[number] == load[number],
                f"{where}: expert {number} got {here.rows[number]} rows",
                f"{load[number]}, of all ranks",
                "rows arrive by rank of origin, and from each origin by expert: the counts say how many of each",
            )
        expect(
            close(output, results[rank]),
            f"{where}: the output is off by {off(output, results[rank]):.1e}",
            "for each token what its expert makes of it, to 1e-12",
            "is each row computed by its own expert, and each sorting undone? x[order][order.argsort()] is x",
        )
        expect(
            output.requires_grad,
            f"{where}: the output has no graph",
            "a graph on every rank: in backward all of them take part in the all-to-alls",
            "let an expert without tokens compute with zero rows, and send rows with the autograd function",
        )
        sent, arriving = [size for _, size in counter.log], sum(load[number] for number in own)
        expect(
            sent == [experts, len(mine), arriving],
            f"{where}: {len(sent)} messages, of {sent} rows",
            f"3: {experts} counts, {len(mine)} tokens, {arriving} results",
            "first how many come, in one message, then just these, and as many back",
        )
        with Collectives() as counter:
            (output * probes[rank]).sum().backward()
        hint = "is each step one through which gradients flow? dist.all_to_all_single is none"
        expect(
            close(mine.grad, tokens[rank].grad),
            f"{where}: the gradient of the tokens {wrong(mine.grad, tokens[rank].grad)}",
            "that of one process, to 1e-12",
            hint,
        )
        for number in own:
            found, right = here.weights[number].grad, weights.grad[number]
            expect(
                close(found, right) or (found is None and load[number] == 0),
                f"{where}: the gradient of expert {number} {wrong(found, right)}",
                "what the tokens of all ranks give, to 1e-12",
                hint,
            )
        expect(len(counter.log) == 2, f"{where}: backward {counter.names()}", "two all-to-alls", hint)


# ------------------------------------------------------------------------------------------ exercise 4


class Chain(nn.Module):
    """An embedding, a layer for each stage, and a head, tied or with a weight of its own."""

    def __init__(self, stages: int, is_tied: bool) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.embedding = nn.Embedding(7, 5)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(stages))
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight if is_tied else nn.Parameter(self.embedding.weight.detach().clone())
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return self.head(hidden)


def check_norm_over_stages(module: ModuleType, rank: int, world_size: int) -> None:
    last = world_size - 1
    first_and_last = dist.new_group([0, last])
    tokens = torch.arange(7)
    # What a stage's backward leaves: with a weight of its own, the head's gradient is that of its use alone.
    apart, whole = Chain(world_size, is_tied=False), Chain(world_size, is_tied=True)
    for model in (apart, whole):
        (30 * F.cross_entropy(model(tokens), tokens.roll(1))).backward()
    names = [f"layers.{rank}.weight", f"layers.{rank}.bias"]
    names += ["embedding.weight"] * (rank == 0) + ["head.weight"] * (rank == last)
    mine = {name: parameter for name, parameter in apart.named_parameters() if name in names}
    before = {name: parameter.grad.clone() for name, parameter in mine.items()}
    summed = {name: parameter.grad.clone() for name, parameter in whole.named_parameters()}
    stage = nn.ParameterDict({name.replace(".", "_"): parameter for name, parameter in mine.items()})
    tied = {0: apart.embedding.weight, last: apart.head.weight}.get(rank)
    for max_norm in (1.0, 1e6):
        where = f"max_norm {max_norm:g}, stage {rank} of {world_size}"
        for name, parameter in whole.named_parameters():
            parameter.grad = summed[name].clone()
        norm = nn.utils.clip_grad_norm_(whole.parameters(), max_norm)
        for name, parameter in mine.items():
            parameter.grad = before[name].clone()
        with Collectives() as counter:
            found = torch.as_tensor(module.finish_gradients(stage, tied, first_and_last, max_norm))
        hint = "the root of the sum of all squares, each weight once, the tied one with the sum of its gradients"
        layer = [before[name] for name in names[:2]]
        if any(close(found, nn.utils.get_total_norm(own)) for own in (layer, [*layer, summed["embedding.weight"]])):
            hint = "this is the norm of this stage alone"
        elif close(found**2, norm**2 + summed["embedding.weight"].norm() ** 2):
            hint = "the tied weight is in it twice: one of its two stages must leave it out"
        expect(close(found, norm), f"{where}: the norm is {found.item():.9f}", f"{norm.item():.9f}", hint)
        for name, parameter in mine.items():
            right = dict(whole.named_parameters())[name.replace("head", "embedding")].grad
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_ has it
            hint = "all gradients of all stages are scaled by the same factor, max_norm / norm, if that is below 1"
            if parameter is tied and close(parameter.grad, before[name] * factor):
                hint = "this is what this stage's use of the weight gave: the weight's gradient is the sum of both"
            expect(
                close(parameter.grad, right),
                f"{where}: the gradient of {name} {wrong(parameter.grad, right)}",
                "that of one process after clip_grad_norm_, to 1e-12",
                hint,
            )
        sizes = [size for _, size in counter.log]
        expect(
            len(sizes) == counter.count("allreduce") and sizes == ([7, 1] if tied is not None else [1]),
            f"{where}: {counter.names()}, of {sizes} rows",
            f"all-reduces{', of the 7 rows of the tied gradient and' * (tied is not None)} of one number",
            "the squares of a stage can be added up before anything is sent",
        )
