"""What the ranks of a `group` run for the tests of fsdp/train.py."""

import os
import runpy
from pathlib import Path

import scripts_on_ranks
from own_folder import own_folder
from rank_worker import starts_its_own_group

ROOT = Path(__file__).resolve().parents[2]


def settings() -> dict:
    """Return the names of fsdp/settings.py."""
    script = ROOT / "fsdp" / "settings.py"
    with own_folder(script):
        return runpy.run_path(str(script))


@starts_its_own_group
def ends_with(variables: dict[str, str], script: str, arguments: list[str]) -> tuple[int, str]:
    """Return how a script ends that finds these environment variables: exit code, and what it wrote to stderr."""
    assert not variables.keys() & os.environ.keys()
    os.environ.update(variables)
    try:
        return scripts_on_ranks.ends(script, arguments)
    finally:
        for name in variables:
            del os.environ[name]


def prefetched(count: int, ahead: int) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Return which of `count` blocks `set_prefetch` names to each block, for forward and for backward."""
    forward, backward = {}, {}

    class Block:
        def __init__(self, number: int) -> None:
            self.number = number

        def set_modules_to_forward_prefetch(self, blocks):
            forward[self.number] = [block.number for block in blocks]

        def set_modules_to_backward_prefetch(self, blocks):
            backward[self.number] = [block.number for block in blocks]

    settings()["set_prefetch"]([Block(number) for number in range(count)], ahead)
    return forward, backward
