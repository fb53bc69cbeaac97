"""Data parallelism in four steps: every rank has the whole model and a part of the batch; gradients are averaged.

    1  NaiveDataParallel        when backward is done, all-reduce each gradient, one after the other
    2    its `no_sync()`        with accumulation: only after the last micro-batch, so 1/accumulation of the messages
    3  OverlappedDataParallel   an all-reduce starts as soon as its gradient is there, while backward goes on
    4  BucketedDataParallel     gradients lie side by side in flat buckets: few large messages instead of many small

(PyTorch's DistributedDataParallel, https://arxiv.org/abs/2006.15704, section 3.2, tells the same story.)

    model = BucketedDataParallel(module)                       # or another of them, or DistributedDataParallel
    for micro_batch, is_last in ...:
        with nullcontext() if is_last else model.no_sync():
            loss(model, micro_batch).backward()
            model.finish()                                     # the one line more than with DistributedDataParallel
    optimizer.step(); optimizer.zero_grad()

Gradients come out as the *mean* over the group. A parameter that a rank did not use is sent as zeros, because all ranks
must send the same messages in the same order; one that no rank used so has a gradient of zeros, not None, and AdamW's
weight decay moves it. Buffers are made equal at the start, then left to each rank.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

# ---------------------------------------------------------------- 1 and 2


class NaiveDataParallel(nn.Module):
    """Step 1: compute everything, then communicate everything. Step 2 is `no_sync`.

    Args:
        module: on its device, in its dtype. It is not copied: its parameters stay the ones to optimize and to save.
        group: the ranks to average over, by default all. Its first rank's parameters and buffers go to the others, so
            that it does not matter from which seed each rank made its own.
    """

    def __init__(self, module: nn.Module, group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.module, self.group = module, group or dist.group.WORLD
        # Frozen parameters have no gradient; `parameters()` names a tied one once. Backward begins at the end of the
        # model: in this order gradients become ready, more or less.
        self.trainable = [p for p in reversed(list(module.parameters())) if p.requires_grad]
        self.collectives = 0  # gradient all-reduces so far
        self.synchronise = True
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), group=self.group, group_src=0)  # rank 0 *of the group*

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """In here gradients only add up, locally, and `finish` does nothing.

        Without it the result is the same (what is averaged already stays as it is when averaged again) for
        accumulation times as many messages. With a sum in place of the mean it would even be wrong.
        """
        self.synchronise = False
        try:
            yield
        finally:
            self.synchronise = True

    def finish(self) -> None:
        """After every backward: returns when gradients are averaged."""
        if self.synchronise:
            for parameter in self.trainable:
                self._prepare(parameter)
                self._average(parameter.grad)

    def _prepare(self, parameter: nn.Parameter) -> None:
        """Make sure that there is something to send."""
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)

    def _average(self, gradient: Tensor, async_op: bool = False) -> dist.Work | None:
        gradient.div_(self.group.size())  # before the sum, which could overflow in fp16
        self.collectives += 1
        return dist.all_reduce(gradient, group=self.group, async_op=async_op)


# ---------------------------------------------------------------- 3


class OverlappedDataParallel(NaiveDataParallel):
    """Step 3: the network works while backward is still computing; only `finish` waits.

    An all-reduce that the hook waited for would be correct, and overlap nothing.
    """

    def __init__(self, module: nn.Module, group: ProcessGroup | None = None) -> None:
        super().__init__(module, group)
        self.ready: set[nn.Parameter] = set()
        self.works: list[dist.Work] = []  # one for each message under way; its length says which message is next
        me = weakref.ref(self)  # a parameter's hooks are where no garbage collector looks: self would stay forever
        for parameter in self.trainable:  # called when .grad is complete: a tied parameter's once, after its last use
            parameter.register_post_accumulate_grad_hook(lambda ready: me()._on_gradient(ready))

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        if parameter in self.ready:
            raise RuntimeError("a second backward before finish(); call finish() after every backward")
        self._prepare(parameter)
        if self.synchronise:
            self.ready.add(parameter)
            self._launch()

    def _messages(self) -> list[tuple[list[nn.Parameter], Tensor]]:
        """What there is to send, in the order of sending: (the parameters to wait for, the tensor)."""
        return [([parameter], parameter.grad) for parameter in self.trainable]

    def _launch(self) -> None:
        # In the same order on all ranks, whatever order gradients come in: messages have no names, and the first
        # all-reduce of one rank meets the first of the others. So one that is missing holds back those behind it.
        for parameters, tensor in self._messages()[len(self.works) :]:
            if not self.ready.issuperset(reversed(parameters)):  # the last is mostly the one that is missing
                break
            self.works.append(self._average(tensor, async_op=True))

    def finish(self) -> None:
        if self.synchronise:
            for parameter in self.trainable:  # unused in this backward: zeros, or what earlier micro-batches left
                self._prepare(parameter)
            self.ready.update(self.trainable)
            self._launch()
            for work in self.works:
                work.wait()
            self.ready, self.works = set(), []


# ---------------------------------------------------------------- 4


class BucketedDataParallel(OverlappedDataParallel):
    """Step 4: one message for many gradients, without copying: each .grad is a view into its bucket.

    `zero_grad(set_to_none=True)` takes the views away; the next backward then leaves new tensors, which are copied into
    the bucket once, and .grad points there again. `set_to_none=False` saves that copy.

    Args:
        bucket_bytes: a bucket is closed when it has at least so many. DDP's default is 25 MiB: larger ones start
            later, smaller ones do not fill the network.
    """

    def __init__(self, module: nn.Module, group: ProcessGroup | None = None, bucket_bytes: int = 25 * 2**20) -> None:
        super().__init__(module, group)
        self.views: dict[nn.Parameter, Tensor] = {}
        self.buckets = []
        for parameters in _fill_buckets(self.trainable, bucket_bytes):
            flat = torch.zeros(sum(p.numel() for p in parameters)).to(parameters[0])  # its dtype and device
            self.buckets.append((parameters, flat))
            for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                self.views[parameter] = part.view_as(parameter)

    def _prepare(self, parameter: nn.Parameter) -> None:
        view = self.views[parameter]
        if parameter.grad is not view:  # then the bucket still holds the last step's values
            view.zero_() if parameter.grad is None else view.copy_(parameter.grad)
            parameter.grad = view

    def _messages(self) -> list[tuple[list[nn.Parameter], Tensor]]:
        return self.buckets


def _fill_buckets(parameters: list[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Cut the list into buckets of one dtype and device each, in the order in which they become complete."""
    full, open_buckets = [], {}
    for parameter in parameters:
        kind = (parameter.dtype, parameter.device)
        bucket = open_buckets.setdefault(kind, [])
        bucket.append(parameter)
        if sum(p.nbytes for p in bucket) >= bucket_bytes:
            full.append(open_buckets.pop(kind))
    place = {parameter: number for number, parameter in enumerate(parameters)}
    return full + sorted(open_buckets.values(), key=lambda bucket: place[bucket[-1]])
