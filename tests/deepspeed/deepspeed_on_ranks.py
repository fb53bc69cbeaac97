"""What the ranks of a `group` run for the tests of deepspeed/: the scripts as they stand, one after the other."""

import os
import sys
from collections import Counter

import scripts_on_ranks
import torch
from rank_worker import starts_its_own_group
from variables import PLAIN_PYTHON, variables, without_package


def forget_groups() -> None:
    """DeepSpeed keeps process groups in module variables; those of the script before are gone. Only tests need this."""
    if engine := sys.modules.get("deepspeed.inference.engine"):
        engine.InferenceEngine.inference_mp_group = None
    if "deepspeed.comm.comm" in sys.modules:
        from deepspeed.utils import groups

        sys.modules["deepspeed.comm.comm"].cdb = None
        for name, value in vars(groups).items():
            if name.startswith("_") and name.isupper():
                setattr(groups, name, {} if isinstance(value, dict) else None)


@starts_its_own_group
def train(script: str, arguments: list[str]) -> None:
    """Run a script with these arguments on this rank."""
    forget_groups()
    scripts_on_ranks.train(script, arguments)


@starts_its_own_group
def train_until(script: str, arguments: list[str], steps: int) -> None:
    """The same, told to stop when `steps` steps are done."""
    forget_groups()
    scripts_on_ranks.train_until(script, arguments, steps)


@starts_its_own_group
def printed(script: str, arguments: list[str], changes: dict[str, str | None] | None = None) -> str:
    """The same, with some environment variables changed; what it printed."""
    forget_groups()
    with variables(changes or {}):
        return scripts_on_ranks.printed(script, arguments)


@starts_its_own_group
def fails_in_evaluation(script: str, arguments: list[str]) -> tuple[int, str]:
    """The same for a script whose last evaluation fails: how it ends."""
    forget_groups()
    return scripts_on_ranks.fails_in_evaluation(script, arguments)


@starts_its_own_group
def by_plain_python(script: str, arguments: list[str]) -> str:
    """The same on a single rank without a launcher: no variable gives a rank. What it printed."""
    return printed(script, arguments, PLAIN_PYTHON)


@starts_its_own_group
def ends(script: str, arguments: list[str], changes: dict[str, str | None] | None = None) -> tuple[int, str]:
    """The same for a script that must end with a message: its exit code and that message."""
    forget_groups()
    with variables(changes or {}):
        return scripts_on_ranks.ends(script, arguments)


@starts_its_own_group
def ends_with_another_accelerator(script: str, arguments: list[str]) -> tuple[int, str]:
    """The same where DeepSpeed has chosen CUDA when it was imported."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    accelerator.device_name = lambda index=None: "cuda"
    try:
        return ends(script, arguments)
    finally:
        del accelerator.device_name


@starts_its_own_group
def ends_without_the_package(script: str) -> tuple[int, str]:
    """The same where the package deepspeed is not installed."""
    with without_package("deepspeed"):
        return ends(script, [], PLAIN_PYTHON)


@starts_its_own_group
def sent(script: str, arguments: list[str]) -> list[dict[str, int]]:
    """Run a script, and count by step how many numbers go through each kind of collective (its largest tensor)."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from common.run import Run

    steps, now, log = [], Counter(), Run.log

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "c10d":
                given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
                whole = max((x.numel() for x in given), default=0)
                now[function._schema.name.removeprefix("c10d::").strip("_")] += whole
            return function(*args, **(kwargs or {}))

    def log_and_cut(self, *rest):
        steps.append(dict(now))
        now.clear()
        log(self, *rest)

    Run.log = log_and_cut
    try:
        with Counting():
            train(script, arguments)
    finally:
        Run.log = log
    return steps


@starts_its_own_group
def drawn(script: str, arguments: list[str]) -> list[int]:
    """Run a script; the first random tokens that this rank drew."""
    draw, seen = torch.randint, []

    def noted(*given, **named):
        seen.append(draw(*given, **named))
        return seen[-1]

    torch.randint = noted
    try:
        train(script, arguments)
    finally:
        torch.randint = draw
    return seen[0].flatten()[:32].tolist()


@starts_its_own_group
def ends_with_another_head(script: str, arguments: list[str], rank: int, added: float) -> tuple[int, str]:
    """Run inference.py, where the engine of one rank, and of no other, gives another logit."""
    import deepspeed

    make = deepspeed.init_inference

    def wrong(logits):
        logits[..., 7] += added

    def make_wrong(*given, **named):
        engine = make(*given, **named)
        if int(os.environ["RANK"]) == rank:
            engine.module.register_forward_hook(lambda module, given, output: wrong(output.logits))
        return engine

    deepspeed.init_inference = make_wrong
    try:
        return ends(script, arguments)
    finally:
        deepspeed.init_inference = make


@starts_its_own_group
def ends_with_another_model(script: str, arguments: list[str]) -> tuple[int, str]:
    """Run convert_checkpoint.py, where transformers reads other weights than were written."""
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained

    def read_wrong(*given, **named):
        model = read(*given, **named)
        with torch.no_grad():
            model.lm_head.weight[7] += 1.0
        return model

    AutoModelForCausalLM.from_pretrained = read_wrong
    try:
        return ends(script, arguments)
    finally:
        del AutoModelForCausalLM.from_pretrained
