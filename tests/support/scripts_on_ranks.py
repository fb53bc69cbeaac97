"""What the ranks of a `group` run for the tests of ddp/."""

import contextlib
import io
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

from ended_together import leave_together
from own_folder import own_folder
from rank_worker import starts_its_own_group

ROOT = Path(__file__).resolve().parent.parent.parent


@starts_its_own_group
def train(script: str, arguments: list[str]) -> None:
    """Run a lesson script as it stands, with these arguments, on this rank."""
    sys.argv = [str(ROOT / script), *arguments]
    with own_folder(ROOT / script):
        runpy.run_path(str(ROOT / script), run_name="__main__")


@starts_its_own_group
def ends(script: str, arguments: list[str]) -> tuple[int, str]:
    """The same for a script that must end with a message: its exit code, and what it wrote to stderr."""
    stderr = io.StringIO()
    code = 0
    with contextlib.redirect_stderr(stderr):
        try:
            train(script, arguments)
        except SystemExit as ended:
            code = ended.code
    leave_together()
    return code, stderr.getvalue()


@starts_its_own_group
def printed(script: str, arguments: list[str]) -> str:
    """The same; what it printed."""
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        train(script, arguments)
    return stdout.getvalue()


@contextlib.contextmanager
def stopping_after(steps: int) -> Iterator[None]:
    """Tell a run to stop when `steps` steps are done, as a signal would."""
    from common.run import Run

    log = Run.log

    def log_and_stop(self, step, *rest):
        if step == steps - 2:  # the wish travels with this step's numbers and is read with the next one's
            self.stop_request.request()
        log(self, step, *rest)

    Run.log = log_and_stop
    try:
        yield
    finally:
        Run.log = log


@starts_its_own_group
def train_until(script: str, arguments: list[str], steps: int) -> None:
    """Run a lesson script and tell it to stop when `steps` steps are done."""
    with stopping_after(steps):
        train(script, arguments)


@starts_its_own_group
def ends_unlike(script: str, arguments: list[list[str]]) -> tuple[int, str]:
    """As `ends`, each rank with arguments of its own: as on nodes with different files."""
    return ends(script, arguments[int(os.environ["RANK"])])


@starts_its_own_group
def other_script(scripts: list[str], arguments: list[str]) -> tuple[int, str]:
    """As `ends`, each rank with a script of its own, by its whole path."""
    return ends(scripts[int(os.environ["RANK"])], arguments)


@starts_its_own_group
def fails_in_evaluation(script: str, arguments: list[str]) -> tuple[int, str]:
    """Run a lesson script whose evaluation after the last step does not get to its result: how it ends."""
    from common.ranks import fail
    from common.run import Run

    log_validation = Run.log_validation

    def log_or_fail(self, step, *values, **more):
        if step + 1 == self.config.train.steps:
            fail("the evaluation failed")
        log_validation(self, step, *values, **more)

    Run.log_validation = log_or_fail
    try:
        return ends(script, arguments)
    finally:
        Run.log_validation = log_validation
