"""Run a command with a time limit and leave nothing of it behind, whatever it started."""

import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

FAMILY = "TOOLS_PROCESS_FAMILY"  # an environment variable that all descendants inherit


@dataclass(frozen=True)
class Finished:
    """What a command left: `exit_code` is None when it was stopped at its time limit."""

    exit_code: int | None
    output: str
    seconds: float


def run(command: list[str], timeout_s: float, cwd: Path, environment: Mapping[str, str]) -> Finished:
    """Run `command`, standard error in the output, and stop it and its descendants after `timeout_s` seconds.

    The output goes to a file, not a pipe: a forgotten background process cannot keep us waiting for its end.
    """
    family = uuid.uuid4().hex
    started = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**environment, FAMILY: family},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        exit_code: int | None = None
        try:
            exit_code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            _send(process.pid, signal.SIGTERM)  # torchrun passes this on; a plain kill would orphan its workers
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
        finally:
            _end_family(process.pid, family)
            process.wait()
        seconds = time.monotonic() - started
        output.seek(0)
        return Finished(exit_code, output.read().decode(errors="replace"), seconds)


def kill_tree(pid: int) -> None:
    """Kill a process and all that descend from it: torchrun's workers live in sessions of their own."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        family = [*parent.children(recursive=True), parent]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=10)


def _send(group: int, what: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, what)


def _end_family(group: int, family: str) -> None:
    """Kill the process group and, on Linux, every process that carries our mark in its environment.

    The mark is needed because torchrun puts each worker into a session of its own.
    """
    _send(group, signal.SIGKILL)
    mark = f"{FAMILY}={family}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:  # it has ended meanwhile, or belongs to someone else
            continue
