"""What the ranks of a `group` run for the tests of deepspeed/: the scripts as they stand, one after the other."""

import sys
from collections import Counter

import scripts_on_ranks
import torch
from rank_worker import starts_its_own_group


def forget_groups() -> None:
    """DeepSpeed keeps process groups in module variables; those of the script before are gone. Only tests need this."""
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
def ends(script: str, arguments: list[str]) -> tuple[int, str]:
    """The same for a script that must end with a message: its exit code and that message."""
    forget_groups()
    return scripts_on_ranks.ends(script, arguments)


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
