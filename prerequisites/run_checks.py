"""Submit the sanity checks of prerequisites/checks/ as jobs, wait for them, and say which one failed, and why.

    python prerequisites/run_checks.py                                     # all, on two nodes with two GPUs each
    python prerequisites/run_checks.py --nodes 4 --gpus-per-node 8 -- --partition=gpu --account=me
    python prerequisites/run_checks.py --only one_device,file_system

On a login node, in the environment that the jobs use. What stands behind `--` goes to every sbatch, and wins over all
else. Exit code 0: every job is COMPLETED and its output says PASSED; 1: any other end; 2: called wrongly, or no Slurm.
Jobs that are not needed any more are cancelled, also at Ctrl-C. Nothing here needs Slurm's accounting database.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from doctor_packages import MODULES, installed
from doctor_results import ROOT
from tqdm import tqdm

CHECKS = ("user_space", "data_set", "file_system", "one_device", "several_devices", "several_nodes")
# States in which a job has ended: Slurm's, and three of our own.
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
ENDED += ("PREEMPTED", "REVOKED", "REFUSED", "NEVER STARTS", "UNKNOWN")
# Reasons with which a pending job waits for ever, unless someone changes the job or the site's rules:
# https://slurm.schedmd.com/job_reason_codes.html
NEVER = re.compile(
    r"BadConstraints|DependencyNeverSatisfied|Partition(Node|Time)Limit|JobHeld(User|Admin)|Invalid(Account|QOS)|"
    r"AccountNotAllowed|QOSNotAllowed|(Assoc|QOS)Max.*PerJob(Limit)?|(Assoc|QOS)Max.*PerNode"
)
VERDICT = re.compile(r"^(PASSED|FAILED) (\w+)(?:: (.*))?$", re.MULTILINE)


@dataclass
class Job:
    """One check on its way. `state` is Slurm's or one of ours, "-" for one that was not submitted."""

    check: str
    command: list[str]  # sbatch's options, the file, its arguments
    number: str = "-"
    state: str = "-"
    nodes: str = "-"
    reason: str = ""
    output: Path | None = None
    passed: bool = False

    @property
    def done(self) -> bool:
        return self.state in ENDED


def stop(message: str) -> NoReturn:
    """End with one line for a mistake that the user can mend; exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def slurm(*command: str) -> subprocess.CompletedProcess:
    """Run one of Slurm's commands in the repository root."""
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=ROOT)


def complaint(done: subprocess.CompletedProcess) -> str:
    """The last line that a command of Slurm complained with, without its prefixes."""
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return re.sub(r"^(\w+: )?(error: )?(Batch job submission failed: |allocation failure: )?", "", lines[-1])


def plan(names: list[str], nodes: int, gpus: int, further: list[str]) -> list[Job]:
    """The jobs, and what each asks for: a rank on every GPU, or one task on every node."""
    versions = [f"{name}={version}" for name in MODULES if (version := installed(name))]
    asked = {
        "one_device": [],
        "several_devices": [f"--ntasks-per-node={gpus}", f"--gpus-per-node={gpus}"],
        "several_nodes": [f"--nodes={nodes}", f"--ntasks-per-node={gpus}", f"--gpus-per-node={gpus}"],
    }
    jobs = []
    for name in names:
        file = f"prerequisites/checks/{name}.sbatch"
        arguments = versions if name == "user_space" else []
        jobs.append(Job(name, [*asked.get(name, [f"--nodes={nodes}"]), *further, file, *arguments]))
    return jobs


def submit(job: Job) -> None:
    """Submit one job; sets its number and the file that it will write, or says who refused it."""
    done = slurm("sbatch", "--parsable", *job.command)
    if done.returncode:
        job.state, job.reason = "REFUSED", complaint(done)
        return
    job.number, job.state = done.stdout.strip().partition(";")[0], "PENDING"
    shown = slurm("scontrol", "show", "job", "--oneliner", job.number).stdout
    if found := re.search(r"\bStdOut=(\S+)", shown):
        job.output = Path(found[1])


def verdict(job: Job) -> None:
    """Set `passed` and the reason of a job that has ended, from its state and from what it has written."""
    text, deadline = "", time.monotonic() + 5  # the file may come late over a network file system
    while job.output and not VERDICT.search(text) and time.monotonic() < deadline:
        text = job.output.read_text(errors="replace") if job.output.is_file() else ""
        if job.state != "COMPLETED":
            break
        time.sleep(0 if VERDICT.search(text) else 0.5)
    found = VERDICT.findall(text)
    lines = [line for line in text.splitlines() if line.strip()]
    job.passed = job.state == "COMPLETED" and found == [("PASSED", job.check, "")]
    if job.passed:
        job.reason = ""
    elif failed := [reason for word, _, reason in found if word == "FAILED"]:
        before = lines[-2] if len(lines) > 1 and "the line above" in failed[0] else ""
        job.reason = before or failed[0]
    elif not job.reason:
        job.reason = f"no verdict; it ends with: {lines[-1]}" if lines else "no verdict, and no output"


def ask(jobs: list[Job]) -> None:
    """Bring states, nodes and reasons up to date, with one question for all jobs."""
    waiting = {job.number: job for job in jobs if not job.done}
    form = "--format=%i|%T|%r|%N"
    done = slurm("squeue", "--noheader", "--states=all", f"--jobs={','.join(waiting)}", form)
    answered = dict(line.split("|", 1) for line in done.stdout.splitlines() if "|" in line)
    for number, job in waiting.items():
        if number in answered:
            job.state, why, job.nodes = answered[number].split("|")
            job.nodes = job.nodes or "-"
            if job.state == "PENDING" and NEVER.fullmatch(why):
                job.state, job.reason = "NEVER STARTS", f"Slurm's reason: {why}"
                slurm("scancel", number)
        elif done.returncode == 0 or "Invalid job id" in done.stderr:
            job.state, job.reason = "UNKNOWN", "Slurm has forgotten it"


def wait(jobs: list[Job], timeout_s: float) -> None:
    """Wait until all have ended, or the time is up."""
    start = time.monotonic()
    with tqdm(total=len(jobs), unit="check", desc="checks", disable=None, leave=False) as bar:
        while left := [job for job in jobs if not job.done]:
            waited = time.monotonic() - start
            if waited > timeout_s:
                for job in left:
                    was = f"{job.state.lower()} after {timeout_s:g} s; --timeout gives it more"
                    job.state, job.reason = "CANCELLED", was
                return
            # Rarely, when it takes long: the controller serves all users.
            time.sleep(min(5.0, 0.5 + waited / 20))
            ask(jobs)
            for job in left:
                if job.done:
                    verdict(job)
                    bar.write(f"{'passed' if job.passed else 'failed':7} {job.check}")
                    bar.update()
            states = [job.state.lower() for job in jobs if not job.done]
            bar.set_postfix_str(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))


def table(jobs: list[Job]) -> str:
    """A line for each job."""
    rows = [("check", "job", "state", "nodes", "reason")]
    rows += [(job.check, job.number, job.state, job.nodes, job.reason) for job in jobs]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join([*map(str.ljust, row[:4], widths), row[4]]).rstrip() for row in rows)


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """(the options, what stands behind `--`)."""
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(
        "run_checks.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(CHECKS), metavar="NAME,…", help=f"some of {', '.join(CHECKS)}")
    parser.add_argument("--nodes", type=int, default=2, help="nodes of what needs several (default 2)")
    parser.add_argument("--gpus-per-node", type=int, default=2, help="GPUs on each (default 2)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for all, queueing included (default 600)")
    options = parser.parse_args(given[:end])
    for name in (names := options.only.split(",")):
        if name not in CHECKS:
            stop(f"--only {name}: there is no such check; expected some of {', '.join(CHECKS)}")
    options.only = list(dict.fromkeys(names))
    if options.nodes < 2 or options.gpus_per_node < 1 or options.timeout <= 0:
        found = f"--nodes {options.nodes} --gpus-per-node {options.gpus_per_node} --timeout {options.timeout:g}"
        stop(f"{found}: expected two nodes or more, a GPU or more on each, seconds above 0")
    return options, given[end + 1 :]


def main() -> int:
    """The exit code: 0 when all have passed, else 1."""
    options, further = parse_arguments()
    if missing := [name for name in ("sbatch", "squeue", "scontrol", "scancel") if not shutil.which(name)]:
        stop(f"no {', '.join(missing)} here; start it on a login node, or make one: python slurm/cluster.py up")
    if (done := slurm("sinfo", "--noheader")).returncode:
        stop(f"Slurm does not answer ({complaint(done)}); start this where sinfo works")
    jobs = plan(options.only, options.nodes, options.gpus_per_node, further)

    # Refused now is better than refused halfway: an impossible number of nodes concerns most of the checks.
    for job in jobs:
        if (done := slurm("sbatch", "--test-only", *job.command)).returncode:
            job.state, job.reason = "REFUSED", complaint(done)
    if refused := [job for job in jobs if job.state == "REFUSED"]:
        print(table(jobs))
        names = ", ".join(job.check for job in refused)
        asked = " ".join([f"--nodes {options.nodes} --gpus-per-node {options.gpus_per_node}", *further])
        print(f"refused by Slurm: {names}; asked for {asked}; see sinfo -o '%P %D %G'. No job was submitted")
        return 1

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for job in jobs:
            submit(job)
        wait(jobs, options.timeout)
    except KeyboardInterrupt:
        for job in jobs:
            if not job.done:
                job.state, job.reason = "CANCELLED", "interrupted"
    finally:
        if over := [job.number for job in jobs if job.number != "-" and job.state not in ENDED[:2] and not job.passed]:
            slurm("scancel", *over)
    failed = [job for job in jobs if not job.passed]
    print(table(jobs))
    print(f"{len(jobs) - len(failed)} passed, {len(failed)} failed")
    for job in failed:
        if job.output and job.output.is_file():
            print(f"read {os.path.relpath(job.output)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
