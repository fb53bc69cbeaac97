"""When to stop: signals and stop files. Each rank asks for itself; `common/runs/metrics.py` makes the ranks agree."""

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C; the launcher or Slurm; Slurm's early warning


class StopRequest:
    """Whether this rank was asked to stop: by a signal, by a file `stop` in the run folder, or by STOP_FILE.

    Args:
        folder: of the run. The variable STOP_FILE names a second file: slurm/job_env.sh makes it when Slurm is about
            to take the nodes away.
        watch_files: on one rank only; the others learn of it from that one.
        alone: no launcher passes Ctrl-C on a second time: a second one ends the process at once.
    """

    def __init__(self, folder: Path, watch_files: bool, alone: bool = False) -> None:
        self._speaks, self._alone = watch_files, alone
        by_job = os.environ.get("STOP_FILE")
        self._files = [folder / "stop", *([Path(by_job)] if by_job else [])] if watch_files else []
        self._requested, self._looked_at = threading.Event(), 0.0
        self._handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._speaks and not self._requested.is_set():
            what = "this run saves a checkpoint and ends, after the step or evaluation that it is in"
            again = "; once more: it ends at once, without saving" if self._alone and number == signal.SIGINT else ""
            os.write(
                2, f"\n{signal.Signals(number).name}: {what}{again}\n".encode()
            )  # print may be in the middle of a line
        if self._alone and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        self.request()

    def request(self) -> None:
        """Ask this rank to stop."""
        self._requested.set()

    def is_set(self) -> bool:
        """Whether this rank was asked to stop; looks for the files at most once a second."""
        now = time.monotonic()
        if self._files and now - self._looked_at > 1:
            self._looked_at = now
            if any(file.exists() for file in self._files):
                self.request()
        return self._requested.is_set()

    def close(self) -> None:
        """Restore the signal handlers of before."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
