"""Starting scripts as users start them, and groups of ranks that stay up for many cases."""

import contextlib
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DEVICE")


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without what a launcher, or a Slurm job around the tests, left in it."""
    prefixes = ("SLURM_", "OMPI_", "PMI_", "TORCHELASTIC_")
    keep = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES and not k.startswith(prefixes)}
    binaries = str(Path(sys.executable).parent)
    path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    return keep | {"PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1"} | more


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def kill_tree(process: subprocess.Popen) -> None:
    """Kill a process and all that descend from it: torchrun's workers live in sessions of their own."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=10)


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
        kill_tree(process)
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
    """Ranks that wait for work: each call runs one function on all of them at once."""

    def __init__(self, size: int) -> None:
        self.size, self.processes = size, []

    def start(self) -> None:
        for rank in range(self.size):
            variables = {"RANK": rank, "WORLD_SIZE": self.size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": self.size}
            env = clean_environment(MASTER_ADDR="127.0.0.1", DEVICE="cpu", **{k: str(v) for k, v in variables.items()})
            worker = [sys.executable, str(ROOT / "tests" / "support" / "rank_worker.py")]
            self.processes.append(
                subprocess.Popen(worker, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            )

    def stop(self, kill: bool = False) -> None:
        for process in self.processes:
            process.kill() if kill else process.stdin.close()
        for process in self.processes:
            process.wait(timeout=90)
            process.stdout.close()
        self.processes = []

    def __call__(self, path: str, function: str, *args, timeout: float = 120):
        """Call `function` of the file `path` (from the repository root) on all ranks; returns the results by rank."""
        if ended := {rank: code for rank, p in enumerate(self.processes) if (code := p.poll()) is not None}:
            self.stop(kill=True)
            if set(ended.values()) != {-signal.SIGKILL}:  # that one comes from outside: the kernel wanted memory
                pytest.fail(f"rank(s) of the tests before ended by themselves, with exit codes {ended}")
        if not self.processes:
            self.start()
        port = free_port()
        for process in self.processes:
            pickle.dump((port, str(ROOT / path), function, args), process.stdin)
            process.stdin.flush()
        answers, deadline = {}, time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self.processes):
                selector.register(process.stdout, selectors.EVENT_READ, rank)
            while len(answers) < self.size:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    missing = sorted(set(range(self.size)) - set(answers))
                    self.stop(kill=True)
                    pytest.fail(
                        f"{path}:{function}: rank(s) {missing} gave no answer in {timeout} s; others: {answers}"
                    )
                for key, _ in ready:
                    try:
                        answers[key.data] = pickle.load(key.fileobj)
                    except EOFError:
                        answers[key.data] = ("failed", "the process died")
                    selector.unregister(key.fileobj)
                if any(state == "failed" for state, _ in answers.values()):
                    deadline = min(deadline, time.monotonic() + 5)  # the others may wait for it for ever
        if bad := {rank: answer for rank, (state, answer) in answers.items() if state != "ok"}:
            self.stop(kill=True)
            pytest.fail(f"{path}:{function} on {self.size} ranks:\n" + "\n".join(f"[{r}] {a}" for r, a in bad.items()))
        return [answers[rank][1] for rank in range(self.size)]


class Groups:
    """One group of each size, kept for the tests of one room."""

    def __init__(self) -> None:
        self.groups: dict[int, Group] = {}
        self.room = ""

    def __call__(self, size: int) -> Group:
        return self.groups.setdefault(size, Group(size))

    def enter(self, room: str) -> None:
        """End the ranks of another room."""
        if room != self.room:
            self.stop()
        self.room = room

    def stop(self) -> None:
        """End all ranks."""
        for group in self.groups.values():
            group.stop()
        self.groups = {}
