"""A Slurm cluster for tests: slurm/cluster.py, started once, and jobs submitted as users submit them."""

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT, run_command

CLUSTER = [sys.executable, str(ROOT / "slurm" / "cluster.py")]
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}


def why_not() -> str:
    """Why Slurm cannot run on this machine; empty where it can."""
    programs = ("slurmctld", "slurmd", "sbatch", "ip", "tc", "unshare", "nsenter")
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if missing := [name for name in programs if not shutil.which(name, path=path)]:
        return f"Slurm cluster: not installed: {', '.join(missing)} (slurm/README.md says which packages)"
    return ""


class SlurmCluster:
    """One cluster by name, and a folder for what its jobs write: outputs in `folder`, runs in `folder/runs`."""

    def __init__(self, name: str, folder: Path, nodes: int = 2, gpus: int = 2) -> None:
        self.name, self.folder = name, folder
        self("up", "--nodes", str(nodes), "--gpus-per-node", str(gpus))

    def __call__(self, *arguments: str, check: bool = True, timeout: float = 60, **environment: str):
        """Run slurm/cluster.py with these arguments."""
        return run_command([*CLUSTER, "--name", self.name, *arguments], timeout, check, **environment)

    def on_login(self, *command: str, check: bool = True, timeout: float = 60, **environment: str):
        """Run a command on the login node, from the repository root, with the tests' Python environment."""
        variables = {
            "RUNS_DIR": str(self.folder / "runs"),
            "VENV": sys.prefix,
            "SBATCH_OUTPUT": str(self.folder / "%x-%j.out"),  # instead of the repository root
        }
        return self("exec", *command, check=check, timeout=timeout, **(variables | environment))

    def submit(self, *sbatch: str, **environment: str) -> str:
        """`sbatch` with these arguments; returns the job's number."""
        done = self.on_login("sbatch", "--parsable", *map(str, sbatch), **environment)
        return done.stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` knows."""
        done = self.on_login("scontrol", "show", "job", "--oneliner", job)
        return dict(re.findall(r"(\w+)=(\S*)", done.stdout.splitlines()[0]))

    def _wait(self, job: str, states: set[str], timeout: float) -> str:
        """Wait until the job is in one of `states`, or the time is over; returns the state it is in then.

        The login node's shell asks, not Python, which would take a third of a core from the ranks.
        """
        ask = 'state=$(scontrol show job --oneliner "$1"); state=${state#*JobState=}; state=${state%% *}'
        loop = f'until {ask}; [[ " $2 " == *" $state "* || $SECONDS -ge $3 ]]; do sleep 0.2; done; echo "$state"'
        words = ["bash", "-c", loop, "wait", job, " ".join(states), str(int(timeout))]
        return self.on_login(*words, timeout=timeout + 60).stdout.strip()

    def wait_for(self, job: str, state: str, timeout: float = 60) -> dict[str, str]:
        """Wait until the job is in `state`; the test fails if it ends in another, or takes too long."""
        if self._wait(job, {state, *ENDED}, timeout) != state:
            shown = self.show(job)
            now = f"{shown['JobState']} ({shown['Reason']})"
            pytest.fail(f"job {job} is {now}, expected {state}\n{self.output(job)[-4000:]}")
        return self.show(job)

    def wait_for_text(self, job: str, pattern: str, timeout: float = 180) -> str:
        """Wait until the job's output holds `pattern`; returns the output."""
        deadline = time.monotonic() + timeout
        for turn in itertools.count():
            over = time.monotonic() > deadline or (turn % 10 == 9 and self.show(job)["JobState"] in ENDED)
            if re.search(pattern, text := self.output(job)):
                return text
            if over:
                pytest.fail(f"job {job} ({self.show(job)['JobState']}) never said {pattern!r}\n{text[-4000:]}")
            time.sleep(0.1)

    def end_of(self, job: str, timeout: float = 120) -> str:
        """Wait until the job has ended in whatever way; returns its state."""
        if (state := self._wait(job, ENDED, timeout)) not in ENDED:
            self.on_login("scancel", job)
            pytest.fail(f"job {job} is still {state} after {timeout} s\n{self.output(job)[-4000:]}")
        return state

    def completed(self, job: str, timeout: float = 120) -> str:
        """Wait until the job is COMPLETED, and return its output; the test fails when it ends otherwise."""
        state = self.end_of(job, timeout)
        if state != "COMPLETED":
            pytest.fail(f"job {job} is {state}\n{self.output(job)[-6000:]}")
        return self.output(job)

    def output(self, job: str) -> str:
        """What the job has written so far."""
        files = sorted(self.folder.glob(f"*-{job}.out")) + sorted(self.folder.glob(f"*-{job}_*.out"))
        return "".join(file.read_text(errors="replace") for file in files)

    def run_folder(self, job: str) -> Path:
        """The one run that this job left, named after it."""
        (folder,) = (self.folder / "runs").glob(f"*-job{job}")
        return folder

    def pids(self, node: str, pattern: str) -> list[int]:
        """The processes on a node (or "login") whose command line matches, as this machine numbers them."""
        done = self.on_login("true") and (Path(self.state_folder()) / f"{node}.machine").read_text().split()
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and os.readlink(entry / "ns/net") == done[1]:
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if re.search(pattern, command):
                        found.append(int(entry.name))
        return found

    def state_folder(self) -> str:
        """Where slurm/cluster.py keeps this cluster's files."""
        return self.on_login("bash", "-c", 'dirname "$SLURM_CONF"').stdout.strip()

    def down(self) -> None:
        """Switch it off."""
        subprocess.run([*CLUSTER, "--name", self.name, "down"], check=True, timeout=60)
