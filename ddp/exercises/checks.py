"""What is expected of the exercises; run by tools/exercises.py on the number of ranks given here."""

import copy
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from grading import expect
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

WORLD_SIZES = {
    "shard_the_data": (1,),
    "resume_exactly": (2,),  # bitwise is for 2 ranks: with more, DDP's rebuilt buckets add in another order
    "lab_two_ranks_no_faster": (2, 3),
    "lab_overlap_by_hand": (2, 3),
}


# ------------------------------------------------------------------------------------------ exercise 1


def check_shard_the_data(module: ModuleType, rank: int, world_size: int) -> None:
    for ranks in (1, 2, 3, 4, 6):
        for step in (0, 1, 7):
            shares = [list(module.my_share(step, 24, r, ranks)) for r in range(ranks)]
            taken = [sample for share in shares for sample in share]
            where = f"my_share(step={step}, global_size=24) on {ranks} ranks"
            expect(
                len(set(taken)) == len(taken),
                f"{where} gives {shares}: some samples twice",
                "each sample on exactly one rank",
                "where does the share of rank 1 start?",
            )
            expect(
                sorted(taken) == list(range(24 * step, 24 * step + 24)),
                f"{where} gives {shares}",
                f"together the samples {24 * step} to {24 * step + 23}",
                "a step takes one global batch; that of step N starts where that of step N-1 ended",
            )
            expect(
                taken == sorted(taken),
                f"{where} gives {shares}",
                "contiguous shares, in the order of the ranks",
                "range(rank, size, world_size) is exact too, but in another order",
            )
            for r in range(ranks):
                cut = [list(part) for part in module.my_micro_batches(step, 24, 2, r, ranks)]
                expect(
                    [sample for part in cut for sample in part] == shares[r] and all(len(p) == 2 for p in cut),
                    f"my_micro_batches({step}, 24, micro_size=2) on rank {r} of {ranks} gives {cut}",
                    f"the share {shares[r]} in pieces of 2, in order",
                    "cut the share of this rank, not the global batch",
                )
    for what, call in (
        ("a global batch of 24 on 5 ranks", lambda: module.my_share(0, 24, 0, 5)),
        ("a share of 12 in micro-batches of 5", lambda: module.my_micro_batches(0, 24, 5, 0, 2)),
    ):
        try:
            found = call()
        except ValueError:
            continue
        expect(False, f"{what}: no error, but {found}", "ValueError", "a silent remainder changes the training")


# ------------------------------------------------------------------------------------------ exercise 2


class Awkward(nn.Module):
    """A small model in fp64 with a tied weight, a frozen one, and one that no output needs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Linear(6, 6)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.inner.weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.unused = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.again(torch.tanh(self.inner(self.frozen(x))))))


class CountAllReduce(TorchDispatchMode):
    """Counts the numbers that all-reduces of the running thread send, whichever function started them."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in str(func) and "reduce" in str(func):
            tensors = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            self.elements += sum(tensor.numel() for tensor in tensors if isinstance(tensor, Tensor))
        return func(*args, **(kwargs or {}))


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[str, float]:
    """The name of the tensor that differs most, and by how much."""
    differences = {name: (a[name] - b[name]).abs().max().item() for name in a}
    name = max(differences, key=lambda key: differences[key] if differences[key] == differences[key] else 1e300)
    return name, differences[name]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_average_the_gradients(module: ModuleType, rank: int, world_size: int) -> None:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (12,), generator=generator)
    one_process = Awkward()
    F.cross_entropy(one_process(inputs), labels).backward()
    expected = gradients(one_process)

    model = Awkward()
    before = copy.deepcopy(model.state_dict())
    share = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
    F.cross_entropy(model(inputs[share]), labels[share]).backward()
    alone = gradients(model)
    with CountAllReduce() as counter:
        module.average_gradients(model)
    found = gradients(model)

    for name, value in model.state_dict().items():
        expect(
            torch.equal(value, before[name]),
            f"{name} itself has changed",
            "the same weights as before",
            "average parameter.grad, and leave the parameter to the optimizer",
        )
    extra = sorted(set(found) - set(expected))
    expect(
        not extra,
        f"{', '.join(extra)} had no gradient and has one now",
        "grad is None, as before",
        "skip a parameter whose grad is None: zeros make AdamW decay a weight that nothing trains",
    )
    missing = sorted(set(expected) - set(found))
    expect(not missing, f"{', '.join(missing)} lost its gradient", "a gradient", "work in place, or assign .grad")
    name, difference = largest_difference(found, expected)
    if difference > 1e-12 or difference != difference:
        hint = "compare with the gradient of one process that sees the whole batch"
        if largest_difference(found, alone)[1] == 0:
            hint = "these are still the gradients of this rank alone"
        elif largest_difference(found, {n: g * world_size for n, g in expected.items()})[1] < 1e-12:
            hint = f"this is the sum over the ranks: {world_size} times too much"
        expect(
            False,
            f"on rank {rank} the gradient of {name} is off by {difference:.1e}",
            "the mean over all ranks, to 1e-12",
            hint,
        )
    numbers = sum(gradient.numel() for gradient in expected.values())
    expect(
        counter.elements == numbers,
        f"{counter.elements} numbers travelled",
        f"{numbers}, each gradient once",
        "model.parameters() gives a tied weight once; lists of layers or names give it twice",
    )


# ------------------------------------------------------------------------------------------ exercise 3


def small_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def check_accumulate_correctly(module: ModuleType, rank: int, world_size: int) -> None:
    """Three micro-batches a rank; their valid targets differ, and one has none at all."""
    generator = torch.Generator().manual_seed(4)
    everyone = []
    for owner in range(world_size):
        for index in range(3):
            inputs = torch.randn(4, 5, generator=generator, dtype=torch.float64)
            targets = torch.randint(0, 4, (4,), generator=generator)
            masked = 4 if (owner, index) == (1, 0) else (owner + 2 * index) % 4
            targets[:masked] = -100
            everyone.append((inputs, targets))
    one_process = small_model()
    all_inputs, all_targets = (torch.cat(parts) for parts in zip(*everyone, strict=True))
    expected_loss = F.cross_entropy(one_process(all_inputs), all_targets, ignore_index=-100)
    expected_loss.backward()
    expected = gradients(one_process)

    model = DistributedDataParallel(small_model())
    buckets: list[int] = []

    def count(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        buckets.append(bucket.index())
        return allreduce_hook(dist.group.WORLD, bucket)

    model.register_comm_hook(None, count)
    for step in range(2):  # DDP arranges its buckets anew after the first backward
        buckets.clear()
        loss = module.accumulate(model, everyone[3 * rank : 3 * rank + 3])
        found = gradients(model.module)
        model.zero_grad()
        expect(
            len(buckets) > 0,
            "DDP did not communicate at all",
            "one all-reduce per bucket and step",
            "the last micro-batch must be outside no_sync",
        )
        expect(
            loss is not None and not torch.isnan(torch.as_tensor(loss)),
            f"step {step}: accumulate returned {loss} on rank {rank}",
            "a number",
            "the mean over no valid target is 0/0: take the sum of the losses, and divide once",
        )
        name, difference = largest_difference(found, expected)
        hint = "sum of losses x world size / valid targets of the global batch; count them with an all_reduce"
        expect(
            difference <= 1e-12,
            f"step {step}: the gradient of {name} on rank {rank} is off by {difference:.1e}",
            "that of the mean over all valid targets of the global batch, to 1e-12",
            hint,
        )
        expect(
            len(buckets) == len(set(buckets)),
            f"step {step}: {len(buckets)} all-reduces of {len(set(buckets))} bucket for 3 micro-batches",
            "one all-reduce per bucket and step",
            "is the forward inside no_sync as well? It is the forward that decides",
        )
        expect(
            abs(float(loss) - expected_loss.item()) <= 1e-12,
            f"step {step}: accumulate returned {loss} on rank {rank}",
            f"{expected_loss.item():.15f} on all ranks",
            "sum the losses over micro-batches and over ranks, then divide by the global count",
        )


# ------------------------------------------------------------------------------------------ exercise 4


def check_resume_exactly(module: ModuleType, rank: int, world_size: int) -> None:
    folder: list[Any] = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    place = Path(folder[0])
    trainer = module.Trainer(seed=0)
    for _ in range(7):
        trainer.train_step()
    module.save(trainer, place)
    saved = state_of(trainer)
    expected = [trainer.train_step() for _ in range(10)]

    resumed = module.Trainer(seed=99)
    module.restore(resumed, place)
    hints = {
        "step": "it decides which samples come next: without it the data starts from the beginning",
        "model": "load the weights into trainer.model, on every rank",
        "optimizer": "AdamW remembers two moments for each weight, and how many steps it has taken",
        "schedule": "the learning rate depends on the steps that the schedule has counted",
        "rng": "dropout draws from torch's generator, and every rank has its own: one file per rank",
    }
    now = state_of(resumed)
    for name, hint in hints.items():
        expect(
            same(saved[name], now[name]),
            f"on rank {rank} the {name} is not what it was when save was called",
            "the same state, bit for bit",
            hint,
        )
    found = [resumed.train_step() for _ in range(10)]
    different = [index for index in range(10) if found[index] != expected[index]]
    expect(
        not different,
        f"on rank {rank} {len(different)} of 10 losses differ (steps {[7 + index for index in different]})",
        "10 equal losses",
        "does save or restore draw random numbers, or train?",
    )


def state_of(trainer: Any) -> dict[str, Any]:
    """A copy of all that the next step depends on."""
    state = {name: getattr(trainer, name).state_dict() for name in ("model", "optimizer", "schedule")}
    return copy.deepcopy(state | {"step": trainer.step, "rng": torch.get_rng_state()})


def same(a: Any, b: Any) -> bool:
    """Equality of nested dicts and lists of tensors."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


# ------------------------------------------------------------------------------------------------ labs


class Recorder(torch.utils.data.Dataset):
    """The first samples of a data set; writes down the number of each that is read."""

    def __init__(self, dataset: torch.utils.data.Dataset, size: int) -> None:
        self.dataset, self.size = dataset, size
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        self.read.append(int(index))
        return self.dataset[int(index)]


def check_lab_two_ranks_no_faster(module: ModuleType, rank: int, world_size: int) -> None:
    recorder = Recorder(module.Digits(), 96)
    losses = module.train(recorder, steps=8, global_size=24)  # two epochs
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, recorder.read)
    share = 24 // world_size
    expect(
        all(len(read) == 8 * share for read in everyone) and len(losses) == 8,
        f"the ranks read {[len(read) for read in everyone]} samples in {len(losses)} steps of 24",
        f"{8 * share} on each of {world_size} ranks",
        "a rank's batch is the global batch divided by the world size; load without workers",
    )
    steps = [[read[s * share : (s + 1) * share] for read in everyone] for s in range(8)]
    for step, parts in enumerate(steps):
        together = [sample for part in parts for sample in part]
        expect(
            len(set(together)) == 24,
            f"step {step} saw {len(set(together))} different samples; rank 0 read {sorted(parts[0])[:4]} …, "
            f"rank 1 read {sorted(parts[1])[:4]} …",
            "24 different samples in a global batch of 24",
            "what makes the ranks choose their samples, and what is different about it on rank 1?",
        )
    epochs = [[s for parts in steps[first : first + 4] for part in parts for s in part] for first in (0, 4)]
    for epoch, samples in enumerate(epochs):
        expect(
            len(set(samples)) == 96,
            f"epoch {epoch} saw {len(set(samples))} different samples of 96",
            "each sample once in an epoch",
            "ranks that shuffle with seeds of their own do not share an epoch: one order, then deal it out",
        )
    expect(
        epochs[0] != epochs[1],
        "the second epoch came in the same order as the first",
        "another order",
        "a DistributedSampler learns of a new epoch only through set_epoch",
    )


def check_lab_overlap_by_hand(module: ModuleType, rank: int, world_size: int) -> None:
    for micro_batches in (1, 2, 4):
        with CountAllReduce() as counter:
            model, losses = module.train(steps=5, micro_batches=micro_batches)
        where = f"after 5 steps with {micro_batches} micro-batch{'es' * (micro_batches > 1)}"
        found = {name: parameter.detach() for name, parameter in model.named_parameters()}
        for name, value in found.items():
            of_rank_0 = value.clone()
            dist.broadcast(of_rank_0, src=0)
            apart = (value - of_rank_0).abs().max()
            dist.all_reduce(apart, op=dist.ReduceOp.MAX)
            expect(
                apart.item() == 0,
                f"{where} the ranks' {name} differ by up to {apart.item():.1e}",
                "the same weights on all ranks",
                "what exactly is averaged in the last micro-batch, and what has been added up before it?",
            )
        name, difference = largest_difference(found, one_process_sgd(module, 5))
        expect(
            difference <= 1e-12,
            f"{where} {name} is {difference:.1e} away from the training of one process",
            "the same weights, to 1e-12",
            "the sum over micro-batches of loss / micro_batches, averaged over the ranks, is the global mean",
        )
        numbers = 5 * sum(value.numel() for value in found.values())
        expect(
            counter.elements == numbers,
            f"{where} {counter.elements} numbers travelled",
            f"{numbers}: each gradient once a step",
            "communicate with the last micro-batch only",
        )
        expect(len(losses) == 5, f"{len(losses)} losses", "5, one a step", "keep what train returns")


def one_process_sgd(module: ModuleType, steps: int) -> dict[str, Tensor]:
    """The weights that one process gets from the same global batches."""
    model = module.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(steps):
        images, labels = module.global_batch(step)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
