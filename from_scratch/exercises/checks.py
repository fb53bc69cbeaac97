"""What is expected of the exercises; run by tools/exercises.py on the number of ranks given here."""

import math
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from grading import expect
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WORLD_SIZES = {
    "copy_and_reduce": (2, 3, 4),
    "bucketed_hooks": (2, 3, 4),
    "zero_step": (2, 3, 4),
    "one_f_one_b": (1,),  # lists: nothing is sent
    "merge_attention": (2, 3, 4),
    "vocabulary_parallel_loss": (2, 3, 4),
    "lab_drifting_replicas": (2, 3),
}
EXACT = 1e-12  # fp64, numbers of order 1 to 100, sums of some dozens of them: errors stay below 1e-13


class Collectives(TorchDispatchMode):
    """Writes down (name, bytes) of what the running thread communicates, whichever function started it."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sizes = [sum(leaf.nbytes for leaf in tree_leaves(arg) if isinstance(leaf, Tensor)) for arg in args[:2]]
            self.log.append((str(func).split(".")[1].strip("_"), max(sizes)))  # the larger of input and output
        return func(*args, **(kwargs or {}))

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.log)

    def names(self) -> str:
        return ", ".join(name for name, _ in self.log) or "no communication"


def off(found: Tensor | None, expected: Tensor) -> float:
    """The largest difference; infinite for None, nan or another shape."""
    if found is None or found.shape != expected.shape:
        return math.inf
    difference = max((found - expected).abs().flatten().tolist(), default=0.0)
    return math.inf if (found - expected).isnan().any() else difference


def close(found: Tensor | None, expected: Tensor) -> bool:
    return off(found, expected) <= EXACT


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------ exercise 1


def check_copy_and_reduce(module: ModuleType, rank: int, world_size: int) -> None:
    x, w1, w2, probe = (random(*shape, seed=i) for i, shape in enumerate([(5, 6), (12, 6), (4, 12), (5, 4)]))
    dense = [tensor.clone().requires_grad_() for tensor in (x, w1, w2)]
    expected = F.linear(F.gelu(F.linear(dense[0], dense[1])), dense[2])
    (expected * probe).sum().backward()
    gradients = [dense[0].grad, dense[1].grad.chunk(world_size, 0)[rank], dense[2].grad.chunk(world_size, 1)[rank]]

    mine = [x.clone(), w1.chunk(world_size, 0)[rank].clone(), w2.chunk(world_size, 1)[rank].clone()]
    for tensor in mine:
        tensor.requires_grad_()
    own_part = F.linear(F.gelu(F.linear(mine[0], mine[1])), mine[2])
    alone = torch.autograd.grad((own_part * probe).sum(), mine[0])[0]  # what this rank's use of x gives
    with Collectives() as counter:
        y = module.parallel_layers(*mine)
        forward = counter.names()
        if not close(y, expected):
            hint = "first layer, then gelu, then second layer; f before and g after"
            if close(y, own_part):
                hint = "this is the part of this rank alone: g has to sum in its forward"
            elif close(y, own_part * world_size):
                hint = "summed before the second layer, or after it was made equal? g stands at the end"
            expect(False, f"the output on rank {rank} is off by {off(y, expected):.1e}", "that of whole layers", hint)
        (y * probe).sum().backward()
    found = [tensor.grad for tensor in mine]

    expect(
        not all(close(f, world_size * g) for f, g in zip(found, gradients, strict=True)),
        f"all gradients are {world_size} times too large",
        "those of one process",
        "an all-reduce in both backward passes: the gradient that g gets is whole on every rank already",
    )
    names = ("the input", "the first weight", "the second weight")
    for name, gradient, right in reversed(list(zip(names, found, gradients, strict=True))):
        hint = "which of the two functions has this gradient passed through, and what did it do to it?"
        if close(gradient, world_size * right):
            hint = f"{world_size} times too large: g must hand the gradient on as it is"
        elif name == "the input" and close(gradient, alone):
            hint = "this is what this rank's use of the input gives: f must add up all of them in its backward"
        elif gradient is None:
            hint = "no gradient came through: does the tensor pass through apply?"
        expect(
            close(gradient, right),
            f"the gradient of {name} on rank {rank} is off by {off(gradient, right):.1e}",
            "that of one process, to 1e-12",
            hint,
        )
    expect(torch.equal(mine[0].detach(), x), "the input has changed", "the same as before", "all-reduce a clone")
    expect(
        [name for name, _ in counter.log] == ["allreduce"] * 2,
        f"communication: {forward} forward, {counter.names()} in all",
        "one all-reduce forward, and one backward",
        "f costs nothing forward, g nothing backward",
    )


# ------------------------------------------------------------------------------------------ exercise 2


class Watched:
    """An all-reduce under way, which writes down when somebody waits for it."""

    def __init__(self, work: dist.Work, log: list[str]) -> None:
        self.work, self.log = work, log

    def wait(self, *arguments: Any) -> Any:
        self.log.append("wait")
        return self.work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.work, name)


def four_layers() -> nn.Sequential:
    torch.manual_seed(1)
    layers = [layer for _ in range(3) for layer in (nn.Linear(6, 6), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(6, 2)).double()


def check_bucketed_hooks(module: ModuleType, rank: int, world_size: int) -> None:
    honest, log = dist.all_reduce, []

    def watching(*arguments: Any, **named: Any) -> Any:
        log.append("start")
        work = honest(*arguments, **named)
        if work is None:
            log.append("wait")  # it was not asynchronous
        return work and Watched(work, log)

    dist.all_reduce = watching
    try:
        _check_buckets(module, rank, world_size, log)
    finally:
        dist.all_reduce = honest


def _check_buckets(module: ModuleType, rank: int, world_size: int, log: list[str]) -> None:
    one_process, copied = four_layers(), four_layers()
    model = module.BucketedDataParallel(copied, bucket_bytes=300)  # a bucket for each of the layers
    # The gradient of what the first layer has put out: the other layers are done then, and the first is not.

    def reached(*_: Any) -> None:
        log.append("first layer")

    def watch_output(_: nn.Module, inputs: Any, output: Tensor) -> None:
        output.register_hook(reached)

    copied[0].register_forward_hook(watch_output)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (one_process, copied)]
    buckets = len(model.buckets)
    for step in range(2):
        inputs, targets = random(24, 6, seed=2 + step), random(24, 2, seed=20 + step)
        F.mse_loss(one_process(inputs), targets).backward()
        seconds = [torch.cat([part.chunk(2)[1] for part in whole.chunk(world_size)]) for whole in (inputs, targets)]
        last = torch.autograd.grad(F.mse_loss(one_process(seconds[0]), seconds[1]) / 2, one_process.parameters())
        mine, goal = inputs.chunk(world_size)[rank].chunk(2), targets.chunk(world_size)[rank].chunk(2)
        log.clear()
        with Collectives() as counter:
            for number in (0, 1):
                with model.no_sync() if number == 0 else nullcontext():
                    (F.mse_loss(model(mine[number]), goal[number]) / 2).backward()
                if number == 0:
                    expect(
                        not counter.log,
                        f"step {step}: {counter.names()} in the micro-batch inside of no_sync",
                        "no communication",
                        "self.synchronise says whether to",
                    )
                    log.clear()
            local = [parameter.grad.clone() for parameter in copied.parameters()]
            model.finish()
        while_backward = log[: log.index("first layer")]
        expect(
            "start" in while_backward,
            f"step {step}: no all-reduce had started when backward reached the first layer",
            f"those of the {buckets - 1} buckets that were full",
            "the hook of a bucket's last gradient starts it (dist.all_reduce with async_op=True)",
        )
        expect(
            "wait" not in while_backward,
            f"step {step}: backward waited for an all-reduce",
            "no waiting before finish",
            "async_op=True gives a work; keep it in the bucket, and wait for it in finish",
        )
        expect(
            len(counter.log) == buckets,
            f"step {step}: {len(counter.log)} messages ({counter.names()})",
            f"{buckets}, one all-reduce a bucket",
            "is each bucket sent once, when its last gradient is there, and with all of them?",
        )
        expect(
            log.count("wait") == buckets,
            f"step {step}: {log.count('wait')} of {buckets} all-reduces were waited for",
            "all of them, in finish",
            "without wait() the numbers are right now and then",
        )
        for number, (name, parameter) in enumerate(copied.named_parameters()):
            mean, hint = list(one_process.parameters())[number].grad, "compare the bucket with .grad, before and after"
            if close(parameter.grad, world_size * mean):
                hint = f"the sum over the ranks: {world_size} times too much"
            elif close(parameter.grad, local[number]):
                hint = "still this rank's own: the all-reduce changed the bucket, and .grad is another tensor"
            elif close(parameter.grad, last[number]):
                hint = "the last micro-batch alone: what was there before it must travel too"
            elif step:
                hint = "step 0 was right; since then zero_grad() has taken .grad away: what is left in the bucket?"
            expect(
                close(parameter.grad, mean),
                f"step {step}: the gradient of {name} on rank {rank} is off by {off(parameter.grad, mean):.1e}",
                "the mean over ranks of the sum over micro-batches, to 1e-12",
                hint,
            )
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


# ------------------------------------------------------------------------------------------ exercise 3


def check_zero_step(module: ModuleType, rank: int, world_size: int) -> None:
    settings = {"lr": 0.1, "weight_decay": 0.1}
    # 25 elements: 2, 3 and 4 do not divide them. 5 elements on 4 ranks: nothing is left for the last.
    for shapes in ([(4, 5), (5,)], [(2, 2), (1,)]):
        parameters = [nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(shapes)]
        whole = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
        plain = torch.optim.AdamW(whole, **settings)
        sharded = module.ShardedAdamW(parameters, **settings)
        count = sum(parameter.numel() for parameter in whole)
        size = -(-count // world_size)
        where = f"{count} elements on {world_size} ranks"
        for step in range(5):
            for number, (a, b) in enumerate(zip(whole, parameters, strict=True)):
                a.grad = random(*a.shape, seed=10 * step + number + 2)
                b.grad = a.grad.clone()
            plain.step()
            with Collectives() as counter:
                sharded.step()
            sharded.zero_grad()
            for number, (a, b) in enumerate(zip(whole, parameters, strict=True)):
                difference = off(b.detach(), a.detach())
                own = slice(rank * size, (rank + 1) * size)
                rows = [torch.cat([p.detach().flatten() for p in ps])[own] for ps in (whole, parameters)]
                hint = "is the piece of the gradient that of the same elements as the piece of the parameters?"
                if close(*rows):
                    hint = "this rank's own piece is right: the pieces of the others must come by an all-gather"
                expect(
                    difference <= EXACT,
                    f"{where}: after step {step}, parameter {number} on rank {rank} is off by {difference:.1e}",
                    "that of a plain AdamW, to 1e-12",
                    hint,
                )
        state = [
            value
            for entries in sharded.inner.state.values()
            for value in entries.values()
            if isinstance(value, Tensor) and value.dim()
        ]
        kept = sum(value.nbytes for value in state)
        expect(
            kept == 2 * 8 * size,
            f"{where}: rank {rank} keeps {kept} bytes of optimizer state",
            f"{2 * 8 * size}: two averages in fp64 for each of {size} elements, instead of {2 * 8 * count}",
            "AdamW's state has the shape of its parameters: give it this rank's piece alone",
        )
        expect(
            [size for _, size in counter.log] == [8 * size * world_size],
            f"{where}: a step communicates {counter.log}",
            f"one all-gather of {8 * size * world_size} bytes",
            "gradients are averaged already; a single flat row needs a single message",
        )


# ------------------------------------------------------------------------------------------ exercise 4


def work_through(orders: list[list[tuple[str, int]]], where: str) -> int:
    """The time that ranks take for these lists, when every action takes 1 and needs what its neighbour has done."""
    end: dict[tuple[str, int, int], int] = {}  # (kind, micro-batch, rank)
    free, place = [0] * len(orders), [0] * len(orders)
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while place[rank] < len(order):
                kind, number = order[place[rank]]
                if kind == "F":
                    needs = (kind, number, rank - 1) if rank else None
                else:
                    needs = (kind, number, rank + 1) if rank < len(orders) - 1 else ("F", number, rank)
                if needs and needs not in end:
                    break
                free[rank] = max(free[rank], end[needs] if needs else 0) + 1
                end[kind, number, rank] = free[rank]
                place[rank] += 1
                moved = True
    stuck = [f"rank {r} before {''.join(map(str, o[place[r]]))}" for r, o in enumerate(orders) if place[r] < len(o)]
    expect(
        not stuck,
        f"{where}: for ever wait {', '.join(stuck)}",
        "an end",
        "the forward of a micro-batch needs that of the rank before, its backward that of the rank after",
    )
    return max(free)


def in_flight(order: list[tuple[str, int]]) -> int:
    """The most micro-batches that are forward and not yet backward."""
    now, most = 0, 0
    for kind, _ in order:
        now += 1 if kind == "F" else -1
        most = max(most, now)
    return most


def check_one_f_one_b(module: ModuleType, rank: int, world_size: int) -> None:
    for name in ("all_forward_all_backward", "one_forward_one_backward"):
        for ranks in range(1, 6):
            for count in range(1, 9):
                orders = [list(getattr(module, name)(r, ranks, count)) for r in range(ranks)]
                where = f"{name}, {ranks} ranks, {count} micro-batches"
                for r, order in enumerate(orders):
                    shown = " ".join(f"{kind}{number}" for kind, number in order)
                    once = sorted((kind, number) for kind in "FB" for number in range(count))
                    expect(
                        sorted(order) == once,
                        f"{where}: rank {r} does {shown}",
                        "every forward and every backward once",
                        "with fewer micro-batches than ranks the warm-up is shorter",
                    )
                    for number in range(count):
                        expect(
                            order.index(("F", number)) < order.index(("B", number)),
                            f"{where}: rank {r} does {shown}",
                            "the forward of a micro-batch before its backward",
                            "a backward needs what its forward has kept",
                        )
                time = work_through(orders, where)
                for r, order in enumerate(orders):
                    most = count if name == "all_forward_all_backward" else min(count, ranks - r)
                    expect(
                        in_flight(order) == most,
                        f"{where}: rank {r} holds up to {in_flight(order)} micro-batches",
                        f"{most}",
                        "the last rank needs no warm-up, and each rank before it one forward more"
                        if name == "one_forward_one_backward"
                        else "no backward before the last forward",
                    )
                # A micro-batch passes all ranks there and back; behind it the first rank does the others.
                least = 2 * (count + ranks - 1)
                expect(
                    time <= least,
                    f"{where}: takes {time}",
                    f"{least}, as all forwards first does",
                    "after the warm-up: a forward, then a backward; who is slower lets the next rank wait",
                )


# ------------------------------------------------------------------------------------------ exercise 5


def check_merge_attention(module: ModuleType, rank: int, world_size: int) -> None:
    query, key, value = random(6, 4, seed=1), random(9, 4, seed=2), random(9, 4, seed=3)
    everything = torch.ones(6, 9, dtype=torch.bool)
    causal = torch.arange(9) <= torch.arange(6).unsqueeze(1)  # queries 0 to 2 see nothing of keys 3 to 8
    blind = causal.clone()
    blind[4] = False  # query 4 sees nothing of either part
    for what, scale, visible in (
        ("two parts", 1.0, everything),
        ("scores of thousands", 1000.0, everything),
        ("a part of which some queries see nothing", 1.0, causal),
        ("two parts of which a query sees nothing", 1.0, blind),
    ):
        parts = []
        for keys in (slice(0, 3), slice(3, 9)):
            parts.append(module.attend(query * scale, key[keys], value[keys], visible[:, keys]))
        expected = module.attend(query * scale, key, value, visible)
        for order, ((out, sums), (other, other_sums)) in (("", parts), (", the other one first", parts[::-1])):
            found = module.merge(out.clone(), sums.clone(), other.clone(), other_sums.clone())
            expect(
                isinstance(found, tuple) and len(found) == 2,
                f"merge returns {type(found).__name__}",
                "(output, log_sum)",
                "the result is to be merged again with the next part",
            )
            for name, part, right in (("output", found[0], expected[0]), ("log_sum", found[1], expected[1])):
                hint = "each output was divided by exp of its own log_sum, and must be by that of both together"
                if torch.isnan(part).any():
                    hint = "nan: -inf - -inf is nan, and so is an infinity divided by another"
                elif scale > 1:
                    hint = "exp of a log_sum of hundreds is infinite: take it of differences alone"
                elif close(part, out + other):
                    hint = "a plain sum: each part's weights already sum to one"
                elif close(part, (out + other) / 2):
                    hint = "a plain mean: the parts' keys have different weights"
                # Minus infinity is right where nothing is visible, and equal to itself; its difference is nan.
                seen = torch.isfinite(right)
                expect(
                    close(part[seen], right[seen]) and torch.equal(torch.isfinite(part), seen),
                    f"{what}{order}: the {name} is off by {off(part[seen], right[seen]):.1e}",
                    "what attention over all keys gives, to 1e-12; -inf as log_sum, and 0, where nothing is seen",
                    hint,
                )

    whole = [random(4 * world_size, 4, seed=seed) for seed in (4, 5, 6)]
    mask = torch.ones(4 * world_size, 4 * world_size, dtype=torch.bool).tril()
    expected = module.attend(*whole, mask)[0].chunk(world_size)[rank]
    found = module.ring_attention(*(part.chunk(world_size)[rank].clone() for part in whole))
    expect(
        close(found, expected),
        f"ring attention on rank {rank} of {world_size} is off by {off(found, expected):.1e}",
        "attention over the whole sequence, to 1e-12",
        "leave ring_attention and attend as they are",
    )


# ------------------------------------------------------------------------------------------ exercise 6


def check_vocabulary_parallel_loss(module: ModuleType, rank: int, world_size: int) -> None:
    tokens, vocabulary = 10, 24
    plain = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(1))
    masked = plain.clone()
    masked[[0, 3, 9]] = -100
    for what, scale, targets in (
        ("small logits", 1.0, plain),
        ("logits of ten thousands", 1e4, plain),
        ("targets of which some are -100", 1.0, masked),
        ("targets that are all -100", 1.0, torch.full_like(plain, -100)),
    ):
        whole = (random(tokens, vocabulary, seed=2) * scale).requires_grad_()
        expected = F.cross_entropy(whole, targets, ignore_index=-100, reduction="sum")
        expected.backward()
        right = whole.grad.chunk(world_size, 1)[rank]
        mine = whole.detach().chunk(world_size, 1)[rank].clone().requires_grad_()
        with Collectives() as counter:
            loss = module.parallel_loss(mine, targets)
            forward = counter.bytes
            loss.backward()
        hint = "is the largest logit the same on all ranks? Is each target's logit there once, and else 0?"
        counted = F.cross_entropy(whole.detach(), targets.clamp(min=0), reduction="sum")
        if not math.isfinite(loss.item()):
            hint = "subtract the largest logit of all ranks before exp"
        elif close(loss.detach(), counted) and (targets < 0).any():
            hint = "a target of -100 counts as class 0 here: its token must add nothing"
        # The sum of losses of up to 1e5 each: 1e-12 of that, and else of 1.
        expect(
            close(loss.detach() / scale, expected.detach() / scale),
            f"{what}: the loss on rank {rank} is {loss.item()}",
            f"{expected.item()}, as one process has it",
            hint,
        )
        hint = "the gradient of a logit is its softmax, minus 1 for the target: what cut the graph?"
        if close(mine.grad, world_size * right):
            hint = f"{world_size} times too large: sum_over_ranks already hands gradients on as they must be"
        elif close(mine.grad, right / world_size):
            hint = f"{world_size} times too small: every rank has the whole loss"
        expect(
            close(mine.grad, right),
            f"{what}: the gradient of rank {rank}'s logits is off by {off(mine.grad, right):.1e}",
            "its columns of the whole gradient, to 1e-12",
            hint,
        )
        expect(
            len(counter.log) <= 3 and counter.bytes <= 3 * tokens * 8,
            f"{what}: {counter.names()}: {forward} bytes forward, {counter.bytes - forward} backward",
            f"three all-reduces of one number a token: {3 * tokens * 8} bytes, all of them forward",
            f"the logits themselves are {whole.nbytes} bytes: reduce them to a number a token first",
        )


# ------------------------------------------------------------------------------------------------- lab


def check_lab_drifting_replicas(module: ModuleType, rank: int, world_size: int) -> None:
    for steps, micro_batches in ((1, 1), (5, 1), (5, 2), (5, 4)):
        with Collectives() as counter:
            model, losses = module.train(steps=steps, micro_batches=micro_batches)
        where = f"steps={steps}, micro_batches={micro_batches}"
        expected = module.build_model()
        for step in range(steps):
            inputs, kinds = module.global_batch(step)
            F.cross_entropy(expected(inputs), kinds).backward()
            with torch.no_grad():
                for parameter in expected.parameters():
                    parameter -= 0.2 * parameter.grad
                    parameter.grad = None
        for (name, parameter), right in zip(model.named_parameters(), expected.parameters(), strict=True):
            of_rank_0 = parameter.detach().clone()
            dist.broadcast(of_rank_0, src=0)
            apart = (parameter.detach() - of_rank_0).abs().max()
            dist.all_reduce(apart, op=dist.ReduceOp.MAX)
            expect(
                apart.item() == 0,
                f"{where}: the ranks' {name} differ by up to {apart.item():.1e}",
                "the same weights on all ranks",
                "step 1 is right and step 2 is not: is what the all-reduce sums still what the optimizer reads?",
            )
            difference = off(parameter.detach(), right.detach())
            expect(
                difference <= EXACT,
                f"{where}: {name} is {difference:.1e} away from the training of one process",
                "the same weights, to 1e-12",
                "are all gradients zero at the start of a step, and is each divided by the world size once?",
            )
        numbers = sum(parameter.numel() for parameter in model.parameters())
        expect(
            counter.log == [("allreduce", 8 * numbers)] * steps,
            f"{where}: {len(counter.log)} messages, {counter.bytes} bytes",
            f"{steps} all-reduces, one a step, of {8 * numbers} bytes",
            "all gradients travel in one flat tensor, with the last micro-batch",
        )
        expect(len(losses) == steps, f"{len(losses)} losses", f"{steps}, one a step", "keep what train returns")
