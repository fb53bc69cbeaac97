"""Is the run folder one and the same on all nodes, also a moment after a write? How fast are it and the local disks?

    srun --nodes=4 --ntasks-per-node=1 python prerequisites/checks/check_file_system.py runs /tmp    # in a Slurm job

Checkpoints depend on it: what a rank has written and synced before a barrier, all others must find behind it. Locks are
not tried, because nothing here needs them.
"""

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from reporting import Result, check_folder, finish, ok, problem, warning

from common.ranks import Ranks, fail, join

PATIENCE = 5.0  # seconds: network file systems may remember for a while what was not there
ADVICE = "put runs (RUNS_DIR) on a file system that all nodes mount, and where you may write"


def write(path: Path) -> str:
    """Write a mebibyte of noise, and return only when it is on the disk, the entry in the folder included."""
    content = os.urandom(2**20)
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return hashlib.sha256(content).hexdigest()


def read_when_there(path: Path, digest: str) -> tuple[str, float]:
    """("", seconds until the file was there with its content), or (what was found in its place, seconds waited)."""
    start = time.monotonic()
    while True:
        try:
            found = "" if hashlib.sha256(path.read_bytes()).hexdigest() == digest else "with other content"
        except FileNotFoundError:
            found = "not there"
        except OSError as error:
            found = f"not readable ({error.strerror})"
        waited = time.monotonic() - start
        if not found or waited > PATIENCE:
            return found, waited
        time.sleep(0.2)


def exchange(me: Ranks, runs: Path, hosts: list[str]) -> list[Result]:
    """Rank 0 writes and all others read; then the same file anew; then all others write and rank 0 reads."""
    here, results = hosts[me.rank], []
    folder = runs / f".check-{os.environ.get('SLURM_JOB_ID', os.getpid())}"

    def attempt(path: Path, writers: list[int]) -> dict[int, str]:
        """Let these ranks write; returns digests by rank. "" stands for one that could not."""
        digest = ""
        if me.rank in writers:
            try:
                if me.is_main:
                    folder.mkdir(exist_ok=True)
                digest = write(path)
            except OSError as error:
                results.append(problem("writing", f"{here} cannot write {path}: {error.strerror}", ADVICE))
        return dict(enumerate(me.all_gather(digest)))  # a barrier as well

    def look(path: Path, digest: str, writer: int, what: str) -> None:
        found, waited = read_when_there(path, digest)
        sentence = f"{what} {hosts[writer]} wrote to {runs} "
        if found:
            results.append(problem("sharing", f"{sentence}is {found} on {here}, {waited:.0f} s after a sync", ADVICE))
        elif waited > 1:
            found = f"{sentence}was seen on {here} only {waited:.1f} s after a sync and a barrier"
            results.append(warning("sharing", found, "mount it with a shorter attribute cache (NFS: actimeo)"))
        else:
            results.append(ok("sharing", f"{sentence}was there at once on {here}"))

    try:
        for what in ("the file that", "the second version that"):
            digests = attempt(folder / "rank-0", [0])
            if not me.is_main and digests[0]:
                look(folder / "rank-0", digests[0], 0, what)
            if any(me.all_gather(any(result.status == "problem" for result in results))):  # a barrier as well
                return results
        mine = folder / f"rank-{me.rank}"
        digests = attempt(mine, list(range(1, me.world_size)))
        if me.is_main:
            for rank in range(1, me.world_size):
                if digests[rank]:
                    look(folder / f"rank-{rank}", digests[rank], rank, "the file that")
        me.barrier()
        return results
    finally:
        with contextlib.suppress(OSError):
            (folder / f"rank-{me.rank}").unlink()
        me.barrier()
        if me.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def own_disk(me: Ranks, local: Path, hosts: list[str]) -> list[Result]:
    """Is node-local storage really each node's own?"""
    mark, error = None, None
    try:
        mark = tempfile.NamedTemporaryFile(prefix=f".check-{me.rank}-", dir=local)  # noqa: SIM115
    except OSError as caught:
        error = caught
    marks = enumerate(me.all_gather(mark.name if mark else ""))
    others = sorted({hosts[rank] for rank, name in marks if rank != me.rank and name and os.path.exists(name)})
    me.barrier()
    if mark is None:
        return [problem("local disk", f"{hosts[me.rank]}: {local}: {error.strerror}", "correct LOCAL_STORAGE")]
    mark.close()
    if others:
        found = f"{local} of {', '.join(others)} is also that of {hosts[me.rank]}"
        return [warning("local disk", found, "stage nothing there: name a disk of the node in LOCAL_STORAGE")]
    return [ok("local disk", f"{local} is {hosts[me.rank]}'s own")]


def main() -> None:
    if len(sys.argv) != 3:
        fail("expected two folders, the runs' and a node-local one; submit prerequisites/checks/file_system.sbatch")
    runs, local = Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute()
    me = join("cpu", timeout_s=300)
    hosts = me.all_gather(os.uname().nodename)
    if me.is_main and len(set(hosts)) < 2:
        fail("all tasks are on one node, so nothing can be compared; expected several: sbatch --nodes=2")
    results = exchange(me, runs, hosts) + own_disk(me, local, hosts)
    # All nodes at the same time, as when they save a checkpoint.
    results += check_folder("run folder", runs) + check_folder("local disk", local)
    finish(results, me)


if __name__ == "__main__":
    main()
