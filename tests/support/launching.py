"""Starting scripts as users start them, and groups of ranks that stay up for many cases."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import fork_server
import pytest
import rank_worker
from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "tools"))

from processes import kill_tree  # noqa: E402  (needs the path above; tests import it from here)

TIMEOUT_S = float(os.environ.get("GROUP_TIMEOUT_S", "120"))  # generous: a busy machine is not a hang
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DEVICE",
                      "TORCHELASTIC_USE_AGENT_STORE")  # fmt: skip


@dataclass(frozen=True)
class Function:
    """A function of a file of functions that run on ranks."""

    path: Path
    name: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.name}"


class OnRanks:
    """The functions of a `*_on_ranks.py` file: `OnRanks("tests/fsdp/finetune_on_ranks.py").train` names `train`.

    The file itself is imported on the ranks only: a lesson's scripts have names (`train`, `settings`) that other
    lessons' scripts have too.
    """

    def __init__(self, path: str) -> None:
        self._path = ROOT / path
        self._names = set(re.findall(r"^def (\w+)\(", self._path.read_text(), re.MULTILINE))

    def __getattr__(self, name: str) -> Function:
        if name not in self._names:
            raise AttributeError(f"{self._path} has no function {name}; it has {', '.join(sorted(self._names))}")
        return Function(self._path, name)


SCRIPTS = OnRanks("tests/support/scripts_on_ranks.py")  # runs the scripts of any lesson as they stand


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without what a launcher, a Slurm job around the tests, or a network profile left in it."""
    prefixes = ("SLURM_", "OMPI_", "PMI_", "TORCHELASTIC_", "TORCH_FR_", "TORCH_NCCL_", "NCCL_")
    keep = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES and not k.startswith(prefixes)}
    binaries = str(Path(sys.executable).parent)
    path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    return keep | {"PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1"} | more


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def whose_rank_1_dies(script: str, folder: Path) -> Path:
    """A script that runs `script`, and kills rank 1 after three steps."""
    path = ROOT / script
    (folder / "dies.py").write_text(
        "import os, runpy, signal, sys\n"
        f"sys.path.insert(0, {str(path.parent)!r})\n"
        "from common.run import Run\n"
        "log = Run.log\n"
        "def log_or_die(self, step, *rest):\n"
        "    if step == 3 and self.ranks.rank == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    log(self, step, *rest)\n"
        "Run.log = log_or_die\n"
        f"runpy.run_path({str(path)!r}, run_name='__main__')\n"
    )
    return folder / "dies.py"


def run_command(command: list[str], timeout: float = 120, check: bool = True, **environment: str):
    """Run a command from the repository root; at the timeout it and its descendants are killed."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=clean_environment(**environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        out, err = process.communicate()
        pytest.fail(f"{' '.join(command)} did not end within {timeout} s\n{out[-2000:]}\n{err[-4000:]}")
    if check and process.returncode != 0:
        pytest.fail(f"{' '.join(command)} ended with {process.returncode}\n{out[-2000:]}\n{err[-6000:]}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def assert_refused(answers: list[tuple[int, str]], words: str) -> None:
    """On every rank: exit code 2, and one line that says it; no traceback for a user's mistake."""
    assert answers
    for code, message in answers:
        assert code == 2, message
        lines = [line for line in message.splitlines() if "error: " in line]
        assert len(lines) == 1, message
        assert words in lines[0], message
        assert "Traceback" not in message


class Group:
    """Ranks that wait for work: each call runs one function on all of them at once.

    The ranks are forked from a server process that has imported torch once (tests/support/fork_server.py), so that
    a rank costs hundredths of a second instead of the seconds of an import.
    """

    def __init__(self, size: int) -> None:
        self.size, self.processes, self.connections = size, [], []
        self.stores: list[TCPStore] = []  # kept while a rank may be in a process group that began with one of them

    def start(self) -> None:
        context = fork_server.context()
        for rank in range(self.size):
            variables = {"RANK": rank, "WORLD_SIZE": self.size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": self.size}
            variables |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": True, "DEVICE": "cpu"}
            env = clean_environment(**{name: str(value) for name, value in variables.items()})
            ours, theirs = context.Pipe()
            process = context.Process(target=rank_worker.main, args=(theirs, env), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)

    def stop(self, kill: bool = False) -> None:
        for process, connection in zip(self.processes, self.connections, strict=True):
            if kill:
                process.kill()
            else:
                with contextlib.suppress(OSError):  # it has ended already
                    connection.send(None)
            connection.close()
        for process in self.processes:
            process.join(timeout=90)
        self.processes, self.connections, self.stores = [], [], []

    def __call__(self, function: Function, *args, timeout: float = TIMEOUT_S):
        """Call `function` of a file of functions for ranks on all ranks; returns the results by rank."""
        if ended := {rank: p.exitcode for rank, p in enumerate(self.processes) if p.exitcode is not None}:
            self.stop(kill=True)
            if set(ended.values()) != {-signal.SIGKILL}:  # that one comes from outside: the kernel wanted memory
                pytest.fail(f"rank(s) of the tests before ended by themselves, with exit codes {ended}")
        if not self.processes:
            self.start()
        # As under torchrun, the store is up before the ranks. One that rank 0 makes makes the others wait: torch tries
        # again half a second to a second after a refused connection.
        self.stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        for connection in self.connections:
            connection.send((self.stores[-1].port, str(function.path), function.name, args))
        answers, deadline = {}, time.monotonic() + timeout
        waiting = {connection: rank for rank, connection in enumerate(self.connections)}
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                missing = sorted(waiting.values())
                self.stop(kill=True)
                pytest.fail(f"{function}: rank(s) {missing} gave no answer in {timeout} s; others: {answers}")
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    answers[rank] = connection.recv()
                except (EOFError, ConnectionResetError):
                    answers[rank] = ("failed", "the process died", False)
                if answers[rank][0] == "failed":
                    deadline = min(deadline, time.monotonic() + 5)  # the others may wait for it forever
        if bad := {rank: answer for rank, (state, answer, _) in answers.items() if state != "ok"}:
            self.stop(kill=True)
            pytest.fail(f"{function} on {self.size} ranks:\n" + "\n".join(f"[{r}] {a}" for r, a in bad.items()))
        if not any(in_group for _, _, in_group in answers.values()):
            self.stores.clear()
        return [answers[rank][1] for rank in range(self.size)]


class Groups:
    """One group of each size, kept for the tests of one folder."""

    def __init__(self) -> None:
        self.groups: dict[int, Group] = {}
        self.folder = ""

    def __call__(self, size: int) -> Group:
        return self.groups.setdefault(size, Group(size))

    def enter(self, folder: str) -> None:
        """End the ranks of another folder."""
        if folder != self.folder:
            self.stop()
        self.folder = folder

    def stop(self) -> None:
        """End all ranks."""
        for group in self.groups.values():
            group.stop()
        self.groups = {}
