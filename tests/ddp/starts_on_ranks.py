"""What the ranks of a `group` run where a test of ddp/ sets what a launcher, a signal or a file would."""

import contextlib
import os
import signal

import torch.distributed as dist
from launching import LAUNCHER_VARIABLES
from rank_worker import starts_its_own_group
from scripts_on_ranks import ends, printed, train


@contextlib.contextmanager
def launched_with(variables):
    """The environment of a process that another launcher has started, or none."""
    kept = dict(os.environ)
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update({"DEVICE": "cpu"} | variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


@starts_its_own_group
def printed_by_plain_python(script: str, arguments: list[str]) -> str:
    """What a script prints that no launcher has started."""
    with launched_with({}):
        return printed(script, arguments)


@starts_its_own_group
def ends_with(variables: dict[str, str], script: str, arguments: list[str]) -> tuple[int, str]:
    """How a script ends that finds these variables, and no others of a launcher."""
    with launched_with(variables):
        return ends(script, arguments)


@starts_its_own_group
def printed_with(variables: list[dict[str, str]], script: str, arguments: list[str]) -> str:
    """What a script prints whose ranks find these variables, one dictionary for each rank."""
    with launched_with(variables[int(os.environ["RANK"])]):
        return printed(script, arguments)


@starts_its_own_group
def told_to_stop(script: str, arguments: list[str], how: str, step: int) -> str:
    """Train; in `step` the last rank gets a signal of this name, or rank 0 finds a file named `stop` at the start."""
    from common.run import Run

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    log, restore = Run.log, Run.restore

    def log_and_tell(self, number, *rest):
        if how != "stop file" and number == step and rank == size - 1:
            os.kill(os.getpid(), getattr(signal, how))
        log(self, number, *rest)

    def restore_and_tell(self, *rest):
        restore(self, *rest)
        if how == "stop file" and rank == 0:
            (self.folder / "stop").touch()

    Run.log, Run.restore = log_and_tell, restore_and_tell
    try:
        return printed(script, arguments)
    finally:
        Run.log, Run.restore = log, restore


@starts_its_own_group
def counted(script: str, arguments: list[str]) -> dict:
    """Train, and count what DDP sends: the bytes of each all-reduce of gradients in each step.

    A hook stands in for DDP's own all-reduce, and averages as DDP does. `others` are the all-reduces of the script.
    """
    from torch.nn.parallel import DistributedDataParallel

    from common.run import Run

    messages, steps, others = [], [], []
    log, init, all_reduce = Run.log, DistributedDataParallel.__init__, dist.all_reduce

    def count(_, bucket):
        messages.append(bucket.buffer().nbytes)
        work = all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    def init_with_hook(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.register_comm_hook(None, count)

    def log_and_turn(self, *rest):
        steps.append(list(messages))
        messages.clear()
        log(self, *rest)

    def counting(tensor, *args, **kwargs):
        others.append(tensor.nbytes)
        return all_reduce(tensor, *args, **kwargs)

    DistributedDataParallel.__init__, Run.log, dist.all_reduce = init_with_hook, log_and_turn, counting
    try:
        train(script, arguments)
    finally:
        DistributedDataParallel.__init__, Run.log, dist.all_reduce = init, log, all_reduce
    return {"gradients": steps, "others": others}


@starts_its_own_group
def minimal_parts(script: str) -> dict:
    """Run ddp/minimal.py: what it printed, this rank's samples by epoch, its steps, and its weights at the end."""
    import hashlib

    import torch
    from torch.utils.data import DistributedSampler

    epochs, weights = [], [""]
    iterate, step = DistributedSampler.__iter__, torch.optim.AdamW.step

    def noting(self):
        indices = list(iterate(self))
        epochs.append(indices)
        return iter(indices)

    def step_and_note(self, *args):
        result = step(self, *args)
        state = hashlib.sha256()
        for group in self.param_groups:
            for parameter in group["params"]:
                state.update(parameter.detach().numpy().tobytes())
        weights.append(state.hexdigest())
        return result

    DistributedSampler.__iter__, torch.optim.AdamW.step = noting, step_and_note
    try:
        text = printed(script, [])
    finally:
        DistributedSampler.__iter__, torch.optim.AdamW.step = iterate, step
    return {"printed": text, "epochs": epochs, "steps": len(weights) - 1, "weights": weights[-1]}


@starts_its_own_group
def printed_and_first_text(script: str, arguments: list[str]) -> tuple[str, list[int]]:
    """What a script prints, and the first tokens that go through this rank's model."""
    from common.transformer import Transformer

    forward, first = Transformer.forward, []

    def noting(self, tokens, *rest):
        first.extend(tokens.flatten()[:16].tolist() if not first else [])
        return forward(self, tokens, *rest)

    Transformer.forward = noting
    try:
        return printed(script, arguments), first
    finally:
        Transformer.forward = forward


@starts_its_own_group
def largest_gradient_difference(folder: str, wrong_on: int) -> float:
    """What ddp/gradient_accumulation.py finds when one rank alone has a gradient that is off by 1."""
    import sys

    import torch

    sys.path.insert(0, folder)
    import gradient_accumulation as lesson

    from common.ranks import join

    ranks = join("cpu")
    small = ["--model.width", "32", "--model.ffn_width", "48", "--model.layers", "1", "--train.steps", "2"]
    config = lesson.parse(lesson.AccumulationConfig, small)
    reference = lesson.Transformer(config.model, config.seed).double()
    for parameter in reference.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def accumulate(ddp_model, micro_batches, scale):
        for parameter in ddp_model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        if ranks.rank == wrong_on:
            next(ddp_model.parameters()).grad[0, 0] = -1

    tokens = torch.zeros(1, 4, dtype=torch.int64)
    _, _, difference = lesson.train(accumulate, [[(tokens, tokens)]], config, ranks, reference)
    ranks.leave()
    return difference


def graphs_of_compiled_blocks() -> tuple[int, float]:
    """Graphs that DDP's compiled blocks become, and the largest difference from the gradients of eager ones."""
    import copy

    import torch
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch.nn.parallel import DistributedDataParallel

    from common.transformer import ModelConfig, Transformer

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = Transformer(ModelConfig(width=192, ffn_width=512, layers=2)).double()  # DDP's first bucket ends within it
    plain = copy.deepcopy(model)
    model.compile_blocks(backend=counter)
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(torch.distributed.get_rank()))
    for each in (model, plain):
        DistributedDataParallel(each)(tokens, tokens).backward()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    return counter.frame_count, max((a.grad - b.grad).abs().max().item() for a, b in pairs)
