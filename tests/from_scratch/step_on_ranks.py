"""What the ranks of a `group` run for the tests of the step scripts: a script under the meter."""

import contextlib
import functools
import gc
import io
import runpy
import sys
import tempfile
import weakref
from pathlib import Path

import torch.distributed as dist
from rank_worker import starts_its_own_group

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "from_scratch"))  # as when torchrun starts a script there

from common import data  # noqa: E402

data._embedded_text = functools.cache(data._embedded_text)  # each script reads the same text: once is enough here


@starts_its_own_group
def metered(script: str, steps: int) -> tuple[str, bool]:
    """Run a step script on this rank through step_meter.py, with this number of steps instead of its 12.

    Returns what it printed, and whether its process group is still there when what refers to itself is collected.
    """
    printed, seen, destroy = io.StringIO(), [], dist.destroy_process_group

    def watch_and_destroy() -> None:
        seen.append(weakref.ref(dist.group.WORLD))
        destroy()

    text = (ROOT / "from_scratch" / script).read_text()
    assert text.count("\nSTEPS, SEED, CLIP = 12, ") == 1
    dist.destroy_process_group = watch_and_destroy
    try:
        with contextlib.redirect_stdout(printed), tempfile.TemporaryDirectory() as folder:
            shorter = Path(folder) / script
            shorter.write_text(text.replace("\nSTEPS, SEED, CLIP = 12, ", f"\nSTEPS, SEED, CLIP = {steps}, "))
            sys.argv = ["step_meter.py", str(shorter)]
            runpy.run_path(str(ROOT / "from_scratch" / "step_meter.py"), run_name="__main__")
    finally:
        dist.destroy_process_group = destroy
    gc.collect()
    return printed.getvalue(), any(reference() is not None for reference in seen)
