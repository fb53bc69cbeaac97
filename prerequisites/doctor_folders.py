"""The folders for runs and for data: file system, speed, space."""

from __future__ import annotations  # so that an old Python gets as far as being told that it is too old

import os
import shutil
import tempfile
import time
from pathlib import Path

from doctor_results import GIB, Result, ok, problem, read, warning

NETWORK_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "fuse", "smb", "cifs", "afs", "wekafs", "panfs")


def check_folders(runs: Path, data: Path) -> list[Result]:
    """Speed of the folders for runs and for data."""
    if data.is_dir() and not os.access(data, os.W_OK):
        reading = [ok("data folder", f"{data.resolve()}, {file_system(data.resolve())}, read-only: not measured")]
    elif data.is_dir():
        reading = check_folder("data folder", data)
    else:
        reading = [ok("data folder", f"there is no {data}; the default data need none, yours: doctor.py --data FOLDER")]
    return check_folder("run folder", runs) + reading


def existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def check_folder(name: str, folder: Path) -> list[Result]:
    """Write, sync and read 64 MB, and make, look at and remove 200 small files. The bounds are this project's."""
    place = existing(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as scratch:
            write, read, small = measure(Path(scratch))
    except OSError as error:
        advice = (
            "choose a folder that you can write to: RUNS_DIR=FOLDER, or --runs_dir"
            if name == "run folder"
            else "choose another"
        )
        return [problem(name, f"{folder}: {error.strerror}", advice)]
    free = shutil.disk_usage(place).free
    found = (
        f"{place}, {file_system(place)}, {free / GIB:.0f} GiB free; 64 MB written at {write:.0f} and read at "
        f"{read:.0f} MB/s, small files {small:.2f} ms each"
    )
    if free < 10 * GIB:
        return [warning(name, found, "a checkpoint takes 12 bytes a parameter, each: remove old runs, or move")]
    if min(write, read) < 20 or small > 20:
        return [warning(name, found, "slow: stage data to a local disk, pack many small files into few large ones")]
    return [ok(name, found)]


def measure(folder: Path) -> tuple[float, float, float]:
    """(MB/s written and synced, MB/s read again, ms for each small file). Reading asks the system to forget first."""
    block, path = os.urandom(2**20), folder / "large"
    start = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(64):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    written = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begun = time.perf_counter()
        while file.read(2**20):
            pass
    read = time.perf_counter()
    for number in range(200):
        (folder / str(number)).touch()
    for number in range(200):
        (folder / str(number)).stat()
        (folder / str(number)).unlink()
    megabytes = 64 * 2**20 / 1e6
    return megabytes / (written - start), megabytes / (read - begun), (time.perf_counter() - read) * 1e3 / 200


def file_system(folder: Path, mounts: str = "/proc/self/mounts") -> str:
    """The kind of file system a folder lies on, such as `ext4` or `nfs4 (network)`."""
    best, kind = "", "unknown file system"
    for line in read(Path(mounts)).splitlines():
        place, this = line.split(" ")[1].replace("\\040", " "), line.split(" ")[2]
        if folder.is_relative_to(place) and len(place) >= len(best):
            best, kind = place, this
    return f"{kind} (network)" if kind.startswith(NETWORK_FILE_SYSTEMS) else kind
