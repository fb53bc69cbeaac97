"""What a rank says when a collective fails: one line with the missing rank, in place of the backend's traceback.

A backend reports its own connection, not the rank that is missing. So each rank that fails writes into the store where
it waited. A rank that has written nothing a few seconds later is the one that was stopped, hangs, or has ended.
"""

import contextlib
import datetime
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from common.launching.launch import fail

PATIENCE_S = 3.0  # all ranks wait for the missing one, and give it up within a second or two
_LOST = re.compile(  # of Gloo and NCCL; whatever else a backend says is no other rank's doing
    r"/gloo/|Application timeout|Timed out waiting|[Cc]onnection (closed|reset|refused)|Broken pipe|"
    r"ncclRemoteError|remote process exited"
)
_processes: list[tuple[str, int]] = []  # of all ranks: host, process
_step: list[int] = []  # the one that the loop is in
_torchs_hook: list[Any] = []  # what sys.excepthook was


def note_step(step: int) -> None:
    """Remember the step that the loop is in, for the line. `common.run` calls it."""
    _step[:] = [step]


def limit_groups(timeout_s: float) -> None:
    """Give this timeout to groups that are made without one, a mesh's for example, in place of torch's 30 minutes."""
    timeout = datetime.timedelta(seconds=timeout_s)
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout


def this_process() -> tuple[str, int]:
    """Return host and number of this process."""
    return socket.gethostname(), os.getpid()


def speak_for_backend(processes: list[tuple[str, int]]) -> None:
    """Say it in one line when an exception of the backend ends this rank. `processes`: those of all ranks."""
    _processes[:] = processes
    _step.clear()
    if sys.excepthook is not _end:
        _torchs_hook[:] = [sys.excepthook]
        sys.excepthook = _end


def is_lost(error: BaseException | None) -> bool:
    """Whether an exception, or one that it was raised from, says that other ranks do not answer."""
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return True
    if isinstance(error, RuntimeError) and _LOST.search(str(error)):
        return True
    return error is not None and is_lost(error.__cause__ or error.__context__)


def explain(error: BaseException) -> tuple[str, list[int]]:
    """Return the line about a failed collective, the same on all ranks, and the ranks that are missing.

    Waits up to PATIENCE_S seconds for what the other ranks write.
    """
    rank, size, here = dist.get_rank(), dist.get_world_size(), _place(error)
    places = _ask(rank, size, here)
    advice = "started again, the run goes on from its last checkpoint"
    if places is None:  # the store is a part of rank 0, unless torchrun's agent has it
        return f"lost rank 0, or its node: the store does not answer; rank {rank} waited in {here}; {advice}", [0]
    missing = [other for other in range(size) if other not in places]
    if missing:
        shown = ", ".join("{} ({}, process {})".format(other, *_processes[other]) for other in missing[:4])
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        line = f"lost rank {shown}{more}: stopped, hanging or ended, while rank {rank} waited for it in {here}"
        line += f"; see what it said, and look at its node; {advice}"
    else:
        shown = "; ".join(f"rank {other} in {places[other]}" for other in list(places)[:4])
        line = f"the ranks have lost each other ({str(error).splitlines()[0]:.100}): {shown}; {advice}"
    found = _in_time(lambda: _store().compare_set("lost", "", line).decode())  # what the first has found
    return found or line, missing


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End this process: with one line when it has lost other ranks, otherwise as before."""
    if not dist.is_initialized():
        return _torchs_hook[0](kind, error, trace)
    if not is_lost(error):
        _ask(dist.get_rank(), 0, f"{_place(error)}, which raised {kind.__name__}")
        return _torchs_hook[0](kind, error, trace)
    line, missing = explain(error)
    try:
        fail(line, code=1)
    except SystemExit:
        gone = set(missing) - set(_wake(missing))
        _in_time(lambda: _leave(gone))
        sys.stdout.flush()
        os._exit(1)  # Python's own end would wait for the backend's threads, which wait for the missing rank


def _wake(missing: list[int]) -> list[int]:
    """Let stopped ranks of this machine go on, so that they find out, too: a launcher waits half a minute for them."""
    woken = []
    for rank in missing:
        host, process = _processes[rank]
        with contextlib.suppress(OSError):
            if host == this_process()[0]:
                os.kill(process, signal.SIGCONT)
                woken.append(rank)
    return woken


def _leave(gone: set[int]) -> None:
    """Let rank 0 end last: the others may not have read yet what its store holds."""
    store, others = _store(), set(range(dist.get_world_size())) - {0, *gone}
    if dist.get_rank():
        return store.set(f"left rank {dist.get_rank()}", "")
    while not all(store.check([f"left rank {other}"]) for other in others):
        time.sleep(0.05)


def _place(error: BaseException) -> str:
    """The collective, the step, and the line of this project from which an exception came."""
    root = f"{Path(__file__).parents[2]}{os.sep}"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f.filename.startswith(root) and "site-packages" not in f.filename]
    calls = [f.name for f in frames if f.filename.endswith("distributed_c10d.py") and f.name != "wrapper"]
    backward = ["backward"] if any(f.name == "_engine_run_backward" for f in frames) else []
    step = [f"step {_step[0]}"] if _step else []
    lines = [f"{Path(f.filename).relative_to(root)} line {f.lineno}" for f in ours[-1:]]
    return ", ".join(calls[:1] + backward + step + lines) or "a collective"


def _store() -> Any:
    return distributed_c10d._get_default_store()


def _ask(rank: int, size: int, place: str) -> dict[int, str] | None:
    """Write where this rank waited, and return where the others did; None where the store does not answer."""

    def ask() -> dict[int, str]:
        store, places = _store(), dict[int, str]()
        deadline = time.monotonic() + PATIENCE_S
        store.set(f"failed rank {rank}", place)
        while len(places) < size and time.monotonic() < deadline:
            for other in set(range(size)) - places.keys():
                if store.check([f"failed rank {other}"]):
                    places[other] = store.get(f"failed rank {other}").decode()
            time.sleep(0.05)
        return dict(sorted(places.items()))

    return _in_time(ask)


def _in_time(question: Callable[[], Any]) -> Any:
    """Return the answer of the store; None where it has none in time: its process was stopped, or is gone."""
    answers: list[Any] = []

    def ask() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(question())

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE_S + 1)
    return answers[0] if answers else None
