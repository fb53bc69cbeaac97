"""What the ranks of a `group` run for the tests of the step scripts: a script as it stands, under the meter."""

import contextlib
import functools
import io
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "from_scratch"))  # as when torchrun starts a script there

from common import data  # noqa: E402

data._embedded_text = functools.cache(data._embedded_text)  # each script reads the same text: once is enough here


def metered(script: str) -> str:
    """Run a step script on this rank through step_meter.py; returns what it printed."""
    printed = io.StringIO()
    sys.argv = ["step_meter.py", str(ROOT / "from_scratch" / script)]
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(ROOT / "from_scratch" / "step_meter.py"), run_name="__main__")
    return printed.getvalue()


metered.joins_itself = True
