"""What the ranks of a `group` run for test_checkpoint.py."""

import contextlib
import io
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "ddp"))

from cases import train


def printed(arguments: list[str]) -> str:
    """Run fsdp/checkpoint.py on this rank; what it printed."""
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        train("fsdp/checkpoint.py", arguments)
    return stdout.getvalue()


printed.joins_itself = True
