"""Do all nodes read the same data, and how fast?

    srun --nodes=4 --ntasks-per-node=1 python prerequisites/checks/check_data.py /path/to/data    # in a Slurm job

The path is a text file, a folder of tokens, a folder of images by class, or any other folder. Without one (or with an
empty one) it is the default corpus, the sources of Python's standard library.
"""

import contextlib
import hashlib
import io
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from reporting import Result, finish, ok, problem

from common.data import TextConfig, standard_library_files, text_datasets
from common.ranks import join
from vision.images import ImageConfig, image_datasets

SAMPLED_FILES, SAMPLED_BYTES = 256, 2**20  # files, and bytes of each, whose content is compared and whose reading timed


@dataclass(frozen=True)
class Sight:
    """The data as one node sees it; `error` in the place of the rest where it cannot be read."""

    host: str
    files: int = 0
    size_bytes: int = 0
    fingerprint: str = ""  # of all names and sizes, and of the sample's content
    megabytes_per_second: float = 0.0
    opened: str = ""  # what the lessons' own reader says of it
    error: str = ""


def all_files(path: str) -> tuple[Path, list[Path]]:
    """(what names are relative to, the files in a fixed order). Raises OSError where a folder cannot be listed."""
    if not path:
        files = standard_library_files()
        return Path(os.path.commonpath(files)), files
    if not os.path.isdir(path):
        os.stat(path)
        return Path(path).parent, [Path(path)]

    def stop(error: OSError) -> None:
        raise error

    found = [Path(folder) / name for folder, _, names in os.walk(path, onerror=stop) for name in names]
    return Path(path), sorted(found)


def open_as_lessons_do(path: str) -> str:
    """Open the data with the lessons' own reader; return what it is, with its fingerprint.

    Raises:
        ValueError: the reader's own message, where it cannot open the data.
    """
    said, folder = io.StringIO(), Path(path)
    try:
        with contextlib.redirect_stderr(said):
            if path and folder.is_dir() and (folder / "train").is_dir():
                train, _, classes = image_datasets(ImageConfig("folder", path))
                train[0]
                return f"images, {len(train):,} for training in {classes} classes, {train.fingerprint()}"
            if path and folder.is_dir() and not (folder / "meta.json").exists():
                return "a folder that the lessons have no reader for: only its files are compared"
            source = "tokens" if folder.is_dir() and path else "text"
            train, _ = text_datasets(TextConfig(source, path or None), 2**32)
            return f"{source}, {len(train.tokens):,} tokens for training, {train.fingerprint()}"
    except SystemExit:
        raise ValueError(said.getvalue().strip().partition("error: ")[2]) from None


def look(path: str) -> Sight:
    """Count, compare and read, on this node."""
    host = socket.gethostname()
    try:
        root, files = all_files(path)
        if not files:
            return Sight(host, error=f"{path} holds no file")
        digest, total = hashlib.sha256(), 0
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.relative_to(root)}\0{size}\0".encode())
            total += size
        sample, read = files[:: -(-len(files) // SAMPLED_FILES)], 0
        start = time.perf_counter()
        for file in sample:
            with open(file, "rb") as stream:
                if hasattr(os, "posix_fadvise"):  # ask the system to forget what it has read before
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                content = stream.read(SAMPLED_BYTES)
            digest.update(content)
            read += len(content)
        speed = read / (time.perf_counter() - start) / 1e6
        return Sight(host, len(files), total, digest.hexdigest()[:16], speed, open_as_lessons_do(path))
    except OSError as error:
        return Sight(host, error=f"{error.filename or path}: {error.strerror}")
    except ValueError as error:
        return Sight(host, error=str(error))


def judge(path: str, sights: list[Sight]) -> list[Result]:
    """What all nodes saw: readable everywhere, and the same everywhere?"""
    shown, results = path or "the standard library's sources", []
    advice = "correct DATA or the argument, its permissions, or the mount on these nodes"
    for error in sorted({sight.error for sight in sights if sight.error}):
        hosts = ", ".join(sight.host for sight in sights if sight.error == error)
        results.append(problem("reading", f"{error}, on {hosts}", advice))
    good = [sight for sight in sights if not sight.error]
    if len({sight.opened for sight in good}) == 1:
        results.append(ok("opened", good[0].opened))
    same: dict[tuple[int, int, str, str], list[Sight]] = {}
    for sight in good:
        same.setdefault((sight.files, sight.size_bytes, sight.fingerprint, sight.opened), []).append(sight)
    for (files, size_bytes, fingerprint, _), some in same.items():
        found = (
            f"{shown}: {files:,} files, {size_bytes / 1e6:,.1f} MB, {fingerprint} on {', '.join(s.host for s in some)}"
        )
        advice = "let all nodes read one copy, or stage it to all of them again"
        results.append(ok("data", found) if len(same) == 1 else problem("data", f"not the same: {found}", advice))
        speeds = [sight.megabytes_per_second for sight in some]
        found = f"a sample read at {min(speeds):,.0f} to {max(speeds):,.0f} MB/s a node, all nodes at once"
        results.append(ok("speed", found))
    return results


def main() -> None:
    path = sys.argv[1] if len(sys.argv) > 1 else ""
    me = join("cpu", timeout_s=600)  # a million files take their time
    sights = me.all_gather(look(path))
    finish(judge(path, sights) if me.is_main else [], me)


if __name__ == "__main__":
    main()
