"""What the ranks of a `group` run for the tests of lightning/: its scripts, and others that go on from their runs."""

import contextlib
import io
import os
import runpy
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from ended_together import leave_together
from own_folder import own_folder
from rank_worker import starts_its_own_group
from scripts_on_ranks import stopping_after
from variables import PLAIN_PYTHON, variables, without_package

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = "lightning/train.py"


@starts_its_own_group
def train(arguments: list[str], script: str = SCRIPT) -> None:
    """Run a script as it stands, with these arguments, on this rank."""
    path = ROOT / script
    sys.argv = [str(path), *arguments]
    with own_folder(path), variables({}):  # Lightning takes WORLD_SIZE away when it ends
        runpy.run_path(str(path), run_name="__main__")


@starts_its_own_group
def printed(arguments: list[str], script: str = SCRIPT, changes: dict[str, str | None] | None = None) -> str:
    """The same, with some environment variables changed; what it printed."""
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout), variables(changes or {}):
        train(arguments, script)
    return stdout.getvalue()


@starts_its_own_group
def terminated(arguments: list[str], step: int, script: str = SCRIPT) -> bool:
    """Run it, with a SIGTERM for rank 1 at `step`; whether the handler of before is back at the end."""
    from common.run import Run

    handler, log = signal.getsignal(signal.SIGTERM), Run.log

    def log_and_signal(self, at, *rest):
        if at == step and self.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        log(self, at, *rest)

    Run.log = log_and_signal
    try:
        train(arguments, script)
    finally:
        Run.log = log
    return signal.getsignal(signal.SIGTERM) is handler


@starts_its_own_group
def ends(arguments: list[str], script: str = SCRIPT, changes: dict[str, str | None] | None = None) -> tuple[int, str]:
    """The same for a run that must end with a message: its exit code, and what it wrote to stderr.

    changes: to the environment; None removes a variable.
    """
    stderr, code = io.StringIO(), 0
    with contextlib.redirect_stderr(stderr), variables(changes or {}):
        try:
            train(arguments, script)
        except SystemExit as ended:
            code = ended.code
    leave_together()
    return code, stderr.getvalue()


@starts_its_own_group
def ends_without_the_package(script: str) -> tuple[int, str]:
    """The same where the package lightning is not installed: importing it would raise."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "lightning"}
    sys.modules["lightning.pytorch"] = sys.modules["lightning.fabric"] = None
    try:
        with without_package("lightning"):
            return ends([], script, PLAIN_PYTHON)
    finally:
        del sys.modules["lightning.pytorch"], sys.modules["lightning.fabric"]
        sys.modules.update(hidden)


@starts_its_own_group
def ends_by_plain_python(arguments: list[str], script: str = SCRIPT, **changes: str) -> tuple[int, str]:
    """The same on one rank that no launcher has started."""
    return ends(arguments, script, PLAIN_PYTHON | changes)


@starts_its_own_group
def train_until(arguments: list[str], steps: int, script: str = SCRIPT) -> None:
    """Run it and tell it to stop when `steps` steps are done."""
    with stopping_after(steps):
        train(arguments, script)


@starts_its_own_group
def counted(arguments: list[str]) -> list[tuple[int, list[int], int]]:
    """Run it and watch the optimizer: for each of its steps Lightning's global_step before it, this rank's samples (by
    their index in the training set), and the number of tokens that went through the model."""
    from lightning.pytorch import LightningModule

    from common.data_sharding import BatchPlan
    from common.transformer import Transformer

    seen, samples, tokens = [], [], [0]
    sample, forward, step = BatchPlan.sample, Transformer.forward, LightningModule.optimizer_step

    def noted_sample(self, position):
        samples.append(sample(self, position))
        return samples[-1]

    def noted_forward(self, inputs, *rest):
        tokens[0] += inputs.numel() if self.training else 0
        return forward(self, inputs, *rest)

    def noted_step(self, epoch, batch_idx, optimizer, closure):
        before, accumulation = self.trainer.global_step, self.trainer.accumulate_grad_batches
        assert self.trainer.fit_loop.total_batch_idx + 1 == (before + 1) * accumulation
        step(self, epoch, batch_idx, optimizer, closure)  # forward and backward of the last micro-batch are in here
        seen.append((before, list(samples), tokens[0]))
        samples.clear()
        tokens[0] = 0

    BatchPlan.sample, Transformer.forward, LightningModule.optimizer_step = noted_sample, noted_forward, noted_step
    try:
        train(arguments)
    finally:
        BatchPlan.sample, Transformer.forward, LightningModule.optimizer_step = sample, forward, step
    return seen


@starts_its_own_group
def held(arguments: list[str]) -> dict[str, object]:
    """Run it, and say what this rank holds at the end: numbers of elements of a matrix, a norm, AdamW's average of the
    matrix; the number of FSDP units, and how the matrix is placed."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    from common.run import Run

    def local(tensor):
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    seen, save = {}, Run.end_step

    def noted(self, step, model, optimizer, scaler):
        query = model.blocks["0"].attention.query.weight
        seen.update(
            query=local(query).numel(),
            norm=local(model.blocks["0"].attention_norm.weight).numel(),
            averages=local(optimizer.state[query]["exp_avg"]).numel(),
            units=sum(isinstance(module, FSDPModule) for module in model.modules()),
            placements=[str(place) for place in query.placements] if isinstance(query, DTensor) else None,
        )
        save(self, step, model, optimizer, scaler)

    Run.end_step = noted
    try:
        train(arguments)
    finally:
        Run.end_step = save
    return seen


@starts_its_own_group
def train_changed(arguments: list[str], text: str, other: str) -> None:
    """Run the script with `other` in the place of a text: a mistake, to see what comes of it."""
    path = ROOT / SCRIPT
    source = path.read_text()
    assert source.count(text) == 1
    sys.argv = [str(path), *arguments]
    with own_folder(path), variables({}):
        exec(compile(source.replace(text, other), SCRIPT, "exec"), {"__name__": "__main__"})


@starts_its_own_group
def logged_mean(samples: int) -> float:
    """What `self.log(…, sync_dist=True)` says of a loss that is 1 for each of so many samples, over the ranks."""
    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.data import DataLoader

    class Ones(LightningModule):
        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.log("loss", batch.mean(), sync_dist=True)

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    mine = DataLoader(torch.ones(len(range(rank, samples, ranks)), 1), batch_size=4)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with variables({}):
        trainer = Trainer(accelerator="cpu", devices=ranks, strategy="ddp", use_distributed_sampler=False, **options)
        (found,) = trainer.validate(Ones(), mine, verbose=False)
        dist.destroy_process_group()
    return found["loss"]


@starts_its_own_group
def communication(arguments: list[str], hold_back: bool = True, script: str = SCRIPT) -> dict[str, int]:
    """Run it, and count what travels while Lightning trains: reductions of gradients, and Lightning's broadcasts.

    hold_back: False takes away what holds FSDP's reductions back until the last micro-batch.
    """
    import torch.distributed.fsdp._fully_shard._fsdp_param_group as param_group
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    counts = {"gradients": 0, "broadcasts": 0}
    forward, reduce, broadcast = DistributedDataParallel.forward, param_group.foreach_reduce, dist.broadcast
    holding = FSDPModule.set_requires_gradient_sync

    def noted_forward(self, *inputs, **named):
        counts["gradients"] += self.training and self.require_backward_grad_sync  # DDP's own flag, set by no_sync
        return forward(self, *inputs, **named)

    def noted_reduce(*inputs, **named):
        counts["gradients"] += 1
        return reduce(*inputs, **named)

    def noted_broadcast(*inputs, **named):
        counts["broadcasts"] += 1
        return broadcast(*inputs, **named)

    DistributedDataParallel.forward, param_group.foreach_reduce = noted_forward, noted_reduce
    dist.broadcast = noted_broadcast  # torch's own callers have it by another name
    if not hold_back:
        FSDPModule.set_requires_gradient_sync = lambda *_: None
    try:
        train(arguments, script)
    finally:
        DistributedDataParallel.forward, param_group.foreach_reduce, dist.broadcast = forward, reduce, broadcast
        FSDPModule.set_requires_gradient_sync = holding
    return counts


@starts_its_own_group
def reduced_in(arguments: list[str]) -> set[torch.dtype]:
    """Run it; the dtypes of the gradients that FSDP sends."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    seen = set()

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "c10d" and "reduce_scatter" in function._schema.name:
                seen.update(x.dtype for x in tree_leaves(args) if isinstance(x, torch.Tensor))
            return function(*args, **(kwargs or {}))

    with Watching():
        train(arguments)
    return seen


@starts_its_own_group
def attention_calls(arguments: list[str]) -> int:
    """Run it; how often the attention of a block was computed while the gradients were needed."""
    from common.transformer import Attention

    calls, forward = [], Attention.forward

    def noted(self, *inputs, **named):
        calls.append(self.training and torch.is_grad_enabled())
        return forward(self, *inputs, **named)

    Attention.forward = noted
    try:
        train(arguments)
    finally:
        Attention.forward = forward
    return sum(calls)
