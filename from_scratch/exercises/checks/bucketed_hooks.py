"""The check of the exercise bucketed_hooks.py; run by tools/exercises.py."""

from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from grading import expect
from shared import Collectives, close, off, random
from torch import Tensor, nn

WORLD_SIZES = (2, 3, 4)


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


def check(module: ModuleType, rank: int, world_size: int) -> None:
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
