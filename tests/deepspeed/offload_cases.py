"""What the ranks of a `group` run for the tests of zero_offload.py, inference.py and convert_checkpoint.py."""

import contextlib
import importlib.util
import io
import sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("deepspeed_cases", Path(__file__).with_name("cases.py"))
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)


def forget_engines() -> None:
    """DeepSpeed's class remembers the ranks of the first engine, which are gone. Only tests have two in one process."""
    if engine := sys.modules.get("deepspeed.inference.engine"):
        engine.InferenceEngine.inference_mp_group = None


def says(script: str, arguments: list[str]) -> str:
    """Run a script on this rank; what it printed."""
    stdout = io.StringIO()
    forget_engines()
    with contextlib.redirect_stdout(stdout):
        cases.train(script, arguments)
    return stdout.getvalue()


def ends(script: str, arguments: list[str]) -> tuple[int, str]:
    """Run a script that must end with a message: its exit code and that message."""
    forget_engines()
    return cases.ends(script, arguments)


says.joins_itself = ends.joins_itself = True
