"""What the ranks of a `group` run for the tests of fsdp/train.py."""

import os

import scripts_on_ranks
from rank_worker import starts_its_own_group


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
