"""Run the check of one exercise on N ranks and say, in words that help, what came of it.

The check of an exercise is the function `check(module, rank, world_size)` in ROOM/exercises/checks/NAME.py. It runs on
every rank, inside a Gloo process group, with the learner's file as `module`; it calls `expect`, and returns when all
is right. What several checks use stands in shared.py beside them.
"""

import contextlib
import faulthandler
import importlib.util
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

PASSED, NOT_STARTED, WRONG, CRASHED, HANGS = "passed", "not started", "wrong", "crashed", "hangs"


class Wrong(Exception):
    """The check's verdict on a wrong answer; its text is shown to the learner."""


def expect(condition: Any, found: str, expected: str, hint: str) -> None:
    """Raise `Wrong` unless `condition` holds: what was found, what was expected, and where to think next."""
    if not condition:
        raise Wrong(f"found:    {found}\nexpected: {expected}\nhint:     {hint}")


@dataclass(frozen=True)
class Outcome:
    """The result of one check at one world size. `output` is what the learner's code printed on rank 0."""

    status: str
    message: str = ""
    output: str = ""


def load(path: Path, name: str) -> ModuleType:
    """Import a file that belongs to no package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def run_check(source: Path, check: Path, world_size: int, timeout_s: float = 30.0) -> Outcome:
    """Call the `check` of the file `check` on `world_size` ranks with the module `source`, then end all ranks.

    The ranks are forked from a server process that has imported torch once, so that a check costs a fraction
    of a second. They meet through a file: no port can be taken.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "torch.distributed", "sklearn.datasets"])
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        ranks, ours = [], {}
        for rank in range(world_size):
            here, there = context.Pipe()
            arguments = (there, source, check, rank, world_size, folder)
            process = context.Process(target=_rank_main, args=arguments, daemon=True)
            process.start()
            there.close()
            ranks.append(process)
            ours[here] = rank
        try:
            outcomes = _collect(ours, timeout_s)
            waiting = sorted(set(range(world_size)) - set(outcomes))
            if waiting and all(outcome.status == PASSED for outcome in outcomes.values()):
                return _hang(source, folder, {r: ranks[r].pid or 0 for r in waiting}, sorted(outcomes), timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        failures = [outcomes[rank] for rank in sorted(outcomes) if outcomes[rank].status != PASSED]
        # A rank that died tells less than one that says what is wrong.
        failures.sort(key=lambda outcome: outcome.status == CRASHED)
        printed = _read(folder / "rank0.log")
        if failures:
            return Outcome(failures[0].status, failures[0].message, printed)
        return Outcome(PASSED, "", printed)


def _collect(ours: dict[Connection, int], timeout_s: float) -> dict[int, Outcome]:
    """The outcomes by rank, until all are there, time is up, or a second has passed since one failed."""
    outcomes: dict[int, Outcome] = {}
    pending, deadline = dict(ours), time.monotonic() + timeout_s
    while pending and (left := deadline - time.monotonic()) > 0:
        for connection in wait(list(pending), timeout=left):
            rank = pending.pop(connection)  # type: ignore[index]
            try:
                outcomes[rank] = Outcome(*connection.recv())  # type: ignore[union-attr]
            except EOFError:
                outcomes[rank] = Outcome(CRASHED, f"rank {rank} ended without a word (a crash, or os._exit)")
            if outcomes[rank].status != PASSED:
                deadline = min(deadline, time.monotonic() + 1.0)
    return outcomes


def _hang(source: Path, folder: Path, waiting: dict[int, int], done: list[int], timeout_s: float) -> Outcome:
    """Ask the ranks that still run where they are, and explain."""
    for pid in waiting.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)  # faulthandler writes the stack, even out of a blocked collective
    time.sleep(0.5)
    places, in_collective = [], False
    for rank in waiting:
        stack = _read(folder / f"rank{rank}.stack")
        in_collective |= bool(re.search(r"distributed_c10d\.py|torch/autograd|nn/parallel", stack))
        line = re.search(rf'File "[^"]*{re.escape(source.name)}", line (\d+) in (\S+)', stack)
        places.append(f"rank {rank} is in line {line[1]} ({line[2]})" if line else f"rank {rank} still runs")
    if done:
        places.append(f"rank{'s' * (len(done) > 1)} {', '.join(map(str, done))} went past it")
    if done or in_collective:
        reason = "your code waits for a collective that not all ranks entered"
    else:
        reason = "your code did not come to an end; an endless loop?"
    return Outcome(
        HANGS, f"{reason} (stopped after {timeout_s:.0f} s):\n{'; '.join(places)}", _read(folder / "rank0.log")
    )


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def _rank_main(connection: Connection, source: Path, check: Path, rank: int, world_size: int, folder: Path) -> None:
    with _redirected(folder, rank):
        status, message = _judge(source, check, rank, world_size, folder)
        sys.stdout.flush()
    connection.send((status, message))
    with contextlib.suppress(EOFError):
        connection.recv()  # stay until the parent ends us: who leaves early breaks the others' collectives
    os._exit(0)


@contextlib.contextmanager
def _redirected(folder: Path, rank: int) -> Iterator[None]:
    """What this rank prints goes to rankN.log; its stack to rankN.stack at SIGUSR1."""
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  (the fork server may have none)
    sys.stderr = sys.stdout
    stack = open(folder / f"rank{rank}.stack", "w")  # noqa: SIM115  (open as long as the process lives)
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
    yield


def _judge(source: Path, check: Path, rank: int, world_size: int, folder: Path) -> tuple[str, str]:
    """(status, message) of the check on this rank."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        module = load(source, f"exercise_{source.stem}")
    except NotImplementedError:
        return NOT_STARTED, ""
    except BaseException as error:  # also SyntaxError, SystemExit
        return CRASHED, f"the file cannot be imported: {_explain(error, source)}"
    method = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=world_size, timeout=timedelta(minutes=30))
    try:
        sys.path.insert(0, str(check.parent))  # for what checks share
        load(check, "the_check").check(module, rank, world_size)
    except NotImplementedError as error:
        return NOT_STARTED, str(error)
    except Wrong as error:
        return WRONG, str(error)
    except BaseException as error:
        return CRASHED, f"rank {rank}: {_explain(error, source)}"
    return PASSED, ""


def _explain(error: BaseException, source: Path) -> str:
    """One line for an exception: what, and where in the learner's file."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(source)]
    place = f" (line {frames[-1].lineno}: {frames[-1].line})" if frames else ""
    return f"{type(error).__name__}: {str(error).split(chr(10))[0]}{place}"
