"""What the ranks of a `group` run for the tests of sharded optimizers and of fully sharded data parallelism."""

import copy
import inspect
from contextlib import nullcontext

import torch
import torch.distributed as dist
from dp_on_ranks import CLIP, SEQUENCE, Odd, Strategy, beside_one_process, micro_batches, optimizer_for, watched
from torch import nn
from tp_on_ranks import Differences, small

import data_parallel as dp  # isort: skip  (tp_on_ranks puts from_scratch/ on the path)
import fully_sharded as fs  # isort: skip
import sharded_optimizer as so  # isort: skip

from common.optimizer import set_learning_rate
from common.transformer import Transformer


def place() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def like(optimizer: torch.optim.Optimizer) -> tuple[list[dict], type, dict]:
    """The parameter groups, class and options from which such an optimizer is made."""
    groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in optimizer.param_groups]
    options = inspect.signature(type(optimizer)).parameters.keys() - {"params", "weight_decay"}
    return groups, type(optimizer), {k: v for k, v in optimizer.defaults.items() if k in options}


def whole_gradients(named, shards) -> dict[str, torch.Tensor]:
    """Gradients of whole parameters from all ranks' pieces."""
    whole = {}
    for (name, parameter), shard in zip(named, shards, strict=True):
        pieces = [torch.empty_like(shard.grad) for _ in range(dist.get_world_size())]
        dist.all_gather(pieces, shard.grad)
        whole[name] = torch.cat(pieces)[: parameter.numel()].view_as(parameter)
    return whole


# ---------------------------------------------------------------- ZeRO-1 and ZeRO-2


def train_sharded_optimizer(stage: int, accumulation: int, options: dict) -> dict:
    """Some steps; another seed on every rank, of which the first one's counts."""
    options = dict(options)
    dtype, name = options.pop("dtype", torch.float64), options.pop("name", "adamw")
    model = Transformer(small(**options), seed=1 + dist.get_rank()).to(dtype)
    groups, kind, defaults = like(optimizer_for(model.parameters(), name))
    wrapped = dp.BucketedDataParallel(model) if stage == 1 else model
    sharded = (so.Zero1Optimizer if stage == 1 else so.Zero2Optimizer)(groups, kind, **defaults)
    names = {p: n for n, p in model.named_parameters()}

    def gradients() -> dict[str, torch.Tensor]:
        if stage == 1:
            return {n: p.grad for n, p in model.named_parameters()}
        assert all(p.grad is None for p in model.parameters())  # nothing whole is left
        return whole_gradients([(names[p], p) for p in sharded.whole], sharded.shards)

    strategy = Strategy(
        wrapped,
        wrapped.no_sync if stage == 1 else nullcontext,
        wrapped.finish if stage == 1 else sharded.finish,
        lambda: sharded.clip_grad_norm_(CLIP),
        sharded.step,
        sharded.zero_grad if stage == 1 else lambda: None,  # a step uses ZeRO-2's gradients up
        gradients,
        lambda: {n: p.detach() for n, p in model.named_parameters()},
    )
    return beside_one_process(strategy, accumulation, dtype, name, **options)


def bytes_and_messages(stage: int, accumulation: int) -> dict:
    """One step of fp64 AdamW: collectives; bytes of state, of gradients after backward, of whole ones at the worst."""
    model, events = Transformer(small(), seed=1).double(), []
    sharded = (so.Zero1Optimizer if stage == 1 else so.Zero2Optimizer)(model.parameters(), torch.optim.AdamW)
    wrapped = dp.NaiveDataParallel(model) if stage == 1 else model
    held = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: held.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))
        )
    with watched(dist, "all_reduce", events), watched(so, "reduce_scatter", events), watched(so, "all_gather", events):
        for number, (tokens, targets) in enumerate(micro_batches(small(), 0, *place(), accumulation)):
            held_back = stage == 1 and number < accumulation - 1
            with wrapped.no_sync() if held_back else nullcontext():
                wrapped(tokens, targets).backward()
                events.append("backward ends")
                (wrapped if stage == 1 else sharded).finish()
        gradients = sum(s.grad.nbytes for s in sharded.shards if s.grad is not None)
        sharded.step()
    state = [v for entries in sharded.inner.state.values() for v in entries.values()]
    return {
        "events": events,
        "state": sum(v.nbytes for v in state if v.dim()),
        "gradients": gradients,
        "most whole gradients": max(held),
        "sizes": [p.numel() for p in model.parameters()],
    }


def any_optimizer(stage: int, name: str, options: dict) -> dict:
    """Five steps of an optimizer class beside whole parameters, 7 of which do not divide among the ranks."""
    rank, ranks = place()
    torch.manual_seed(3)
    model, reference = (nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double() for _ in range(2))
    reference.load_state_dict(model.state_dict())
    kind = getattr(torch.optim, name)
    sharded = (so.Zero1Optimizer if stage == 1 else so.Zero2Optimizer)(model.parameters(), kind, **options)
    wrapped = dp.NaiveDataParallel(model) if stage == 1 else model
    plain = kind(reference.parameters(), **options)
    for _ in range(5):
        inputs = torch.rand(ranks, 4, 5, dtype=torch.float64)
        wrapped(inputs[rank]).square().sum().backward()
        (wrapped if stage == 1 else sharded).finish()
        (reference(inputs.flatten(0, 1)).square().sum() / ranks).backward()
        sharded.step()
        plain.step()
        model.zero_grad()
        reference.zero_grad()
    seen, whole = Differences(), sharded.state_dict()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        seen.note("parameters", a.detach(), b.detach())
    for number, entries in plain.state_dict()["state"].items():
        assert entries.keys() == whole["state"][number].keys()
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                assert value.shape == whole["state"][number][key].shape
                seen.note("state", whole["state"][number][key], value)
    plain.load_state_dict(whole)  # the format is that of a plain optimizer
    return dict(seen)


def _one_step(model: nn.Module, sharded: so.Zero2Optimizer, step: int) -> None:
    [(tokens, targets)] = micro_batches(small(), step, *place(), 1)
    (model(tokens, targets) * dist.get_world_size() / (48 * SEQUENCE)).backward()
    sharded.finish()
    sharded.clip_grad_norm_(CLIP)
    set_learning_rate(sharded, 3e-3 / (1 + step))
    sharded.step()


def zero_for(seed: int, state: tuple | None = None) -> tuple[nn.Module, so.Zero2Optimizer]:
    model = Transformer(small(), seed=seed).double()
    groups, kind, defaults = like(optimizer_for(model.parameters()))
    sharded = so.Zero2Optimizer(groups, kind, **defaults)
    if state:
        model.load_state_dict(state[0])  # after the optimizer was made: it must not go on from the old weights
        sharded.load_state_dict(state[1])
    return model, sharded


def save(steps: int) -> tuple[dict, dict]:
    model, sharded = zero_for(1)
    for step in range(steps):
        _one_step(model, sharded, step)
    return model.state_dict(), sharded.state_dict()


def resume(state: tuple[dict, dict], first: int, last: int) -> tuple[dict, dict]:
    model, sharded = zero_for(99, copy.deepcopy(state))  # it came in memory that the ranks share, step counters too
    for step in range(first, last):
        _one_step(model, sharded, step)
    return model.state_dict(), sharded.state_dict()


def odd_optimizer(stage: int) -> dict:
    """A model with frozen, tied and unused parameters; a group without rank 0 for the last two of three ranks."""
    together = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return {}
    mine = together.rank()
    model, reference = Odd(dist.get_rank()).double(), Odd(1).double()
    sharded = (so.Zero1Optimizer if stage == 1 else so.Zero2Optimizer)(
        model.parameters(), torch.optim.SGD, together, lr=0.1
    )
    model.shift.copy_(reference.shift)
    wrapped = dp.BucketedDataParallel(model, together) if stage == 1 else model
    reference_optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    inputs = torch.rand(3, 2, 3, 5, generator=torch.Generator().manual_seed(7)).double()
    seen = Differences()
    for step in range(3):
        wrapped(inputs[step, mine], mine == 0).square().mean().backward()
        (wrapped if stage == 1 else sharded).finish()
        for r in range(2):
            (reference(inputs[step, r], r == 0).square().mean() / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
        seen.note("norm", sharded.clip_grad_norm_(0.01), norm)
        sharded.step()
        sharded.zero_grad()
        reference_optimizer.step()
        reference.zero_grad()
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        seen.note(name, a.detach(), b.detach())
    return dict(seen)


def refused_optimizer(name: str) -> str:
    parameters = [nn.Parameter(torch.tensor(1.0))] if name == "scalar" else [nn.Parameter(torch.ones(2, 2))]
    kind = torch.optim.AdamW if name == "scalar" else getattr(torch.optim, name)
    try:
        so.Zero1Optimizer(parameters, kind)
    except ValueError as error:
        return str(error)
    return "nothing"


def forgotten_finish() -> str:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    sharded = so.Zero2Optimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    try:
        for _ in range(2):
            model(torch.ones(1, 2)).sum().backward()
    except RuntimeError as error:
        return str(error)
    finally:
        sharded.finish()
    return "nothing"


# ---------------------------------------------------------------- fully sharded


def fully_sharded(model: Transformer, **options) -> Transformer:
    for block in model.blocks.values():
        fs.fully_shard(block, **options)
    return fs.fully_shard(model, **options)


def whole_by_name(model: nn.Module, gradients: bool) -> dict[str, torch.Tensor]:
    """Whole parameters, or their gradients in their place, by the names they had."""
    if not gradients:
        return fs.full_state_dict(model)
    kept = {p: p.detach().clone() for p in model.parameters()}
    for p in model.parameters():
        p.data.copy_(p.grad)
    state = fs.full_state_dict(model)
    for p, values in kept.items():
        p.data.copy_(values)
    return state


def train_fully_sharded(accumulation: int, options: dict) -> dict:
    """Some steps; another seed on every rank, of which the first one's counts."""
    options = dict(options)
    dtype, name = options.pop("dtype", torch.float64), options.pop("name", "adamw")
    reshard, checkpointing = options.pop("reshard", True), options.pop("checkpointing", False)
    model = Transformer(small(**options), seed=1 + dist.get_rank()).to(dtype)
    if checkpointing:
        model.checkpoint_activations()
    fully_sharded(model, reshard_after_forward=reshard)
    optimizer = optimizer_for(model.parameters(), name)
    strategy = Strategy(
        model, nullcontext, lambda: fs.finish(model),
        lambda: so.clip_sharded_grad_norm_(model.parameters(), CLIP, dist.group.WORLD),
        optimizer.step, optimizer.zero_grad,
        lambda: whole_by_name(model, True), lambda: whole_by_name(model, False),
    )  # fmt: skip
    return beside_one_process(strategy, accumulation, dtype, name, **options)


def step_of_units(reshard: bool, accumulation: int, options: dict) -> dict:
    """Events of one step, and the bytes held when each block computes, forward and backward."""
    model, events, held = Transformer(small(), seed=1), [], {}
    fully_sharded(model, reshard_after_forward=reshard, **options)

    def note(what: str) -> None:
        events.append(what)
        held[what] = fs.bytes_held(model)

    for number, block in model.blocks.items():
        block.ffn.register_forward_pre_hook(lambda *_, number=number: note(f"forward {number}"))
        block.ffn.register_full_backward_pre_hook(lambda *_, number=number: note(f"backward {number}"))
    note("before")
    with watched(fs, "all_gather", events), watched(fs, "reduce_scatter", events):
        for tokens, targets in micro_batches(small(), 0, *place(), accumulation):
            loss = model(tokens, targets)
            note("between")
            loss.backward()
            note("backward ends")
            fs.finish(model)
    note("after")
    units = [[flat.sizes for flat in unit.flats] for unit in model.fully_sharded_unit.order.units]
    return {"events": events, "held": held, "units": units}


def low_precision(reduce: str) -> dict:
    """bf16 computation over fp32 shards: dtypes seen, and the distance from the fp32 gradients."""
    model, seen = Transformer(small(), seed=1), {}
    fully_sharded(model, compute_dtype=torch.bfloat16, reduce_dtype=getattr(torch, reduce))
    reference = Transformer(small(), seed=1)
    query = model.blocks["0"].attention.query
    query.register_forward_pre_hook(lambda m, args: seen.update(weight=m.weight.dtype, input=args[0].dtype))
    events, right = [], fs.reduce_scatter

    def noted(mine, whole, **rest):
        events.append(whole.dtype)
        return right(mine, whole, **rest)

    fs.reduce_scatter = noted
    try:
        [(tokens, targets)] = micro_batches(small(), 0, *place(), 1)
        (model(tokens, targets) / tokens.numel()).backward()
        fs.finish(model)
    finally:
        fs.reduce_scatter = right
    [(tokens, targets)] = micro_batches(small(), 0, 0, 1, 1)
    (reference(tokens, targets) / tokens.numel()).backward()
    gradients = whole_by_name(model, True)
    expected = {name: p.grad for name, p in reference.named_parameters()}
    distance = sum((gradients[n] - g).pow(2).sum() for n, g in expected.items()).sqrt()
    norm = sum(g.pow(2).sum() for g in expected.values()).sqrt()
    return {
        "computed in": seen, "reduced in": set(events), "kept in": {p.dtype for p in model.parameters()},
        "gradients in": {p.grad.dtype for p in model.parameters()}, "relative distance": (distance / norm).item(),
    }  # fmt: skip


class OddUnits(nn.Module):
    """Two units that do not divide: a tie inside the root, a frozen layer in a unit, an output that is a tuple."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(5, 5)
        self.inner = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 5))
        self.inner[2].requires_grad_(False)
        self.tied, self.unused = nn.Linear(5, 5, bias=False), nn.Linear(5, 3)
        self.tied.weight = self.first.weight
        self.register_buffer("shift", torch.rand(5))

    def forward(self, x):
        x = self.first(x).tanh()
        return self.tied(self.inner(x) + x) + self.shift, None


def odd_units(in_group: bool) -> tuple[dict, list, dict]:
    """Largest differences of gradients, names of the full state dict, and what is held when all is over."""
    group = dist.new_group([1, 2]) if in_group else dist.group.WORLD
    if in_group and dist.get_rank() == 0:
        return {}, [], {}
    first = 1 if in_group else 0
    model, reference = OddUnits(dist.get_rank()).double(), OddUnits(first).double()
    fs.fully_shard(model.inner, group)
    fs.fully_shard(model, group)
    state, seen = fs.full_state_dict(model), Differences()
    for name, tensor in reference.state_dict().items():
        seen.note("start", state[name], tensor)
    ranks, frozen = (
        group.size(),
        [flat for flat in model.inner.fully_sharded_unit.flats if not flat.shard.requires_grad],
    )
    inputs = torch.rand(2, ranks, 3, 5, generator=torch.Generator().manual_seed(7)).double()
    inside = []
    model.first.register_full_backward_hook(lambda *_: inside.append([flat.is_whole for flat in frozen]))
    for part in inputs:  # two micro-batches
        model(part[group.rank()])[0].square().sum().backward()
        fs.finish(model)
        for x in part:
            (reference(x)[0].square().sum() / ranks).backward()
    assert inside == [[False, False]] * 2, inside  # frozen ones are freed when their unit is done, not at the end
    for p in model.parameters():
        p.data.copy_(p.grad if p.grad is not None else torch.zeros_like(p))
    state = fs.full_state_dict(model)
    for name, parameter in reference.named_parameters():
        seen.note(name, state[name], torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return dict(seen), list(state), fs.bytes_held(model)


def state_round_trip() -> tuple[bool, list[str], float]:
    """Is the full state dict the model's own, does it load, and is evaluation right with freed units?"""
    plain = Transformer(small(tied=True), seed=1).double()
    model = fully_sharded(Transformer(small(tied=True), seed=2).double())
    fs.load_full_state_dict(model, plain.state_dict())
    state = fs.full_state_dict(model)
    equal = state.keys() == plain.state_dict().keys() and all(torch.equal(state[n], t) for n, t in state.items())
    [(tokens, targets)] = micro_batches(small(), 0, 0, 1, 1)
    with torch.no_grad():
        gap = (model(tokens, targets) - plain(tokens, targets)).abs().item()
    assert fs.bytes_held(model)["gathered"] == 0
    return equal, sorted(name for name, _ in model.named_parameters()), gap


def tied_across_units() -> str:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    fs.fully_shard(model[0])
    try:
        fs.fully_shard(model)
    except ValueError as error:
        return str(error)
    return "nothing"
