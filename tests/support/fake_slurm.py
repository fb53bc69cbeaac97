"""Job files without a Slurm: they run in bash, and what they would start is written down and answered by a stand-in.

What a file computes (ranks, ports, names), which exit code it ends with and what it does at a signal is seen in
tenths of a second. That Slurm and torchrun take what it starts is shown on the real cluster (slurm_cluster.py).
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from launching import ROOT, clean_environment

# Each of them writes its words down, then does what the variable FAKE_<NAME> says.
PROGRAMS = ("srun", "mpirun", "sbatch", "scontrol", "scancel", "sbcast")
STAND_IN = r"""#!/bin/bash
name=${0##*/}
printf '%s\x1f' "$name" "$@" >>"$FAKE_CALLS"
printf '\x1e' >>"$FAKE_CALLS"
answer=FAKE_${name^^}
if [[ $name == scontrol ]]; then
    case $1 in
        show) printf '%s\n' $FAKE_HOSTS ;;
        requeue) (sleep 0.2; kill -TERM 0) & ;;  # Slurm ends the job and all that it has started
    esac
fi
eval "${!answer:-}"
"""
OPTION = re.compile(r"^#SBATCH --([\w-]+)(?:=(\S+))?", re.MULTILINE)


@dataclass
class Ended:
    """What became of a job: its exit code, its output, and the calls that it made, each a list of words."""

    code: int
    output: str
    calls: list[list[str]] = field(default_factory=list)

    def of(self, *programs: str) -> list[list[str]]:
        """The calls of these programs, without their names."""
        return [words[1:] for words in self.calls if words[0] in programs]


def job_files() -> list[str]:
    """All sbatch files, by their paths from the repository root; a new one is in here by itself."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.sbatch"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return sorted(set(listed.stdout.split()))


def free_ports(count: int) -> int:
    """The first of `count` free ports in a row, among those that job_env.sh derives from job numbers."""
    for first in range(20000 + os.getpid() % 5000, 31999 - count):
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise OSError("no free ports")


class FakeSlurm:
    """Runs job files as if Slurm had started them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"
        self.port = free_ports(3)
        self.job = str(60000 + self.port - 20000)  # 60000 is a multiple of 12000: the job's port is self.port
        self.calls = folder / "calls"
        (folder / "bin").mkdir()
        for name in PROGRAMS:
            (folder / "bin" / name).write_text(STAND_IN)
            (folder / "bin" / name).chmod(0o755)

    def variables(self, options: dict[str, str]) -> dict[str, str]:
        """What Slurm tells a job that was submitted with these options, on nodes `localhost` and `node2`."""
        nodes, gpus = int(options.get("nodes", 1)), options.get("gpus-per-node", "")
        tasks = int(options.get("ntasks-per-node", 1))
        values = {
            "SLURM_JOB_ID": self.job, "SLURM_NNODES": nodes, "SLURM_JOB_NODELIST": "list",
            "SLURM_NTASKS": nodes * tasks,
            "SLURM_CPUS_PER_TASK": options.get("cpus-per-task", 1), "SLURM_CPUS_ON_NODE": 8,
            "SLURM_GPUS_ON_NODE": gpus, "SLURM_GPUS_PER_NODE": gpus, "SLURM_SUBMIT_HOST": "login",
            "FAKE_HOSTS": " ".join(["localhost", "node2", "node3"][:nodes]), "FAKE_CALLS": self.calls,
            "RUNS_DIR": self.runs, "VENV": sys.prefix, "CLUSTER": "laptop",
        }  # fmt: skip
        return {name: str(value) for name, value in values.items()}

    def start(self, file: str | Path, *arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.Popen:
        """Start a job file, or a script, in a session of its own."""
        self.calls.write_text("")
        options = dict(OPTION.findall((ROOT / file).read_text()))
        variables = clean_environment() | self.variables(options) | environment
        # VENV/bin comes first on the job's path, and has none of the stand-ins' names.
        variables["PATH"] = f"{self.folder / 'bin'}{os.pathsep}{variables['PATH']}"
        command = ["bash", str(ROOT / file), *arguments]
        return subprocess.Popen(
            command, cwd=cwd, env={name: value for name, value in variables.items() if value != "unset"},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def end(self, process: subprocess.Popen, timeout: float = 60) -> Ended:
        """Wait for the job; nothing of it is left afterwards."""
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return Ended(process.returncode, output, self.called())

    def called(self) -> list[list[str]]:
        return [call.split("\x1f")[:-1] for call in self.calls.read_text().split("\x1e")[:-1]]

    def run(self, file: str | Path, *arguments: str, cwd: Path = ROOT, **environment: str) -> Ended:
        """Run a job file to its end."""
        return self.end(self.start(file, *arguments, cwd=cwd, **environment))

    def signalled(self, number: int, file: str | Path, *arguments: str, **environment: str) -> Ended:
        """Run a job file, and send its shell a signal once it has started its ranks."""
        process = self.start(file, *arguments, **environment)
        deadline = time.monotonic() + 60
        while not any(words[0] in ("srun", "mpirun") for words in self.called()):
            assert process.poll() is None and time.monotonic() < deadline, "the job started no ranks"
            time.sleep(0.02)
        time.sleep(0.1)  # the shell is then in its wait
        os.kill(process.pid, number)
        return self.end(process)
