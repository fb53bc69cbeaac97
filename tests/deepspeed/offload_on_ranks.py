"""What the ranks of a `group` run for the tests of zero_offload.py, inference.py and convert_checkpoint.py."""

import contextlib
import io
import sys

import deepspeed_on_ranks
from rank_worker import starts_its_own_group


def forget_engines() -> None:
    """DeepSpeed's class remembers the ranks of the first engine, which are gone. Only tests have two in one process."""
    if engine := sys.modules.get("deepspeed.inference.engine"):
        engine.InferenceEngine.inference_mp_group = None


@starts_its_own_group
def says(script: str, arguments: list[str]) -> str:
    """Run a script on this rank; what it printed."""
    stdout = io.StringIO()
    forget_engines()
    with contextlib.redirect_stdout(stdout):
        deepspeed_on_ranks.train(script, arguments)
    return stdout.getvalue()


@starts_its_own_group
def ends(script: str, arguments: list[str]) -> tuple[int, str]:
    """Run a script that must end with a message: its exit code and that message."""
    forget_engines()
    return deepspeed_on_ranks.ends(script, arguments)
