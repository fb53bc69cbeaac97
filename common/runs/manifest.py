"""What makes a folder of files a checkpoint: a manifest, written last. Knows nothing of torch.

    checkpoints/step_120/manifest.json   step, files with sizes and checksums; no manifest, no checkpoint
    checkpoints/attempt                  who may commit here: the newest attempt of a run, no leftover

Renaming a directory is no commit on a shared file system, where another node may see the rename before the data.
Each rank syncs its own files before a barrier, and rank 0 writes the manifest after it.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from common.runs.records import sync_folder
from common.strict_files import read_json


@dataclass
class CheckpointConfig:
    """When to save, and how much to keep."""

    every: int = 0
    """Steps between two checkpoints; 0 saves only at the end, or when the run is told to stop."""
    keep: int = 2
    """How many committed checkpoints stay."""

    def __post_init__(self) -> None:
        if self.every < 0 or self.keep < 1:
            raise ValueError(
                f"checkpoint.every = {self.every} must be 0 or more, and checkpoint.keep = {self.keep} at least 1"
            )


class TakenOver(Exception):
    """A newer attempt of the run has claimed the folder: this one must not commit."""


def checksum(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file, as a manifest has them."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def claim(folder: Path) -> str:
    """Claim `folder` for this attempt: from now on, only it may commit there. Call it on rank 0 alone.

    A process of an attempt whose node was lost may still exist and wake up after the requeued run has gone on.

    Returns:
        The attempt's name, for `commit`.
    """
    name = uuid.uuid4().hex[:12]
    temporary = folder / f"attempt-{name}.tmp"
    try:
        temporary.write_text(name)
        temporary.replace(folder / "attempt")
    finally:
        temporary.unlink(missing_ok=True)  # where the disk is full, it is there and empty
    return name


def _is_current(folder: Path, attempt: str | None) -> bool:
    return attempt is None or (folder / "attempt").read_text() == attempt


def _taken_over(folder: Path) -> str:
    return f"another attempt has taken over {folder}; this one ends, and leaves the checkpoints to it"


def why_it_failed(folder: Path, attempt: str | None, found: str) -> str:
    """Return `found`, unless another attempt has taken over: that one removes what this one was writing."""
    with contextlib.suppress(OSError):
        if not _is_current(folder, attempt):
            return _taken_over(folder)
    return f"{found}; earlier checkpoints are untouched"


def commit(target: Path, content: dict[str, Any], keep: int, attempt: str | None) -> None:
    """Write the manifest of the checkpoint `target`, then remove old checkpoints. Call it on rank 0 alone.

    Args:
        content: step, files and the rest of the manifest.
        keep: how many committed checkpoints stay.
        attempt: what `claim` returned; None commits unasked.

    Raises:
        OSError: a file of another rank is not visible here, or the manifest cannot be written.
        TakenOver: another attempt has claimed the folder.
    """
    folder, shards = target.parent, target / content["shards"]
    for name, entry in content["files"].items():
        if not (shards / name).is_file() or (shards / name).stat().st_size != entry["bytes"]:
            raise OSError(f"rank 0 does not see {name} of another rank; is runs_dir on a shared file system?")
    temporary = target / f"manifest-{shards.name}.tmp"
    with open(temporary, "w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if _is_current(folder, attempt):
        try:  # only where there is none: an attempt that stops right here, and wakes late, cannot replace one
            os.link(temporary, target / "manifest.json")
            temporary.unlink()
        except OSError:  # there is one, of an attempt before this; or the file system knows no links
            if _is_current(folder, attempt):
                temporary.replace(target / "manifest.json")
        sync_folder(target)
    if not _is_current(folder, attempt):
        raise TakenOver(_taken_over(folder))
    _remove_old(folder, target, keep)


def _step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name; -1 for a file, a link, or a name that `save` does not give."""
    number = re.fullmatch(r"step_(0|[1-9][0-9]*)", checkpoint.name)
    return int(number[1]) if number and checkpoint.is_dir() and not checkpoint.is_symlink() else -1


def _steps(folder: Path, committed: bool) -> list[Path]:
    """The folders of this run's checkpoints with or without a manifest, by step; never what a user put there."""
    ours = sorted((path for path in folder.glob("step_*") if _step_of(path) >= 0), key=_step_of)
    return [path for path in ours if (path / "manifest.json").is_file() == committed]


def _remove(checkpoint: Path, keep_shards: str = "") -> None:
    """Remove what `save` wrote into the folder of a checkpoint without manifest; what else is in it stays."""
    for path in checkpoint.glob("shards-*"):
        if path.name != keep_shards and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    for path in checkpoint.glob("manifest-shards-*.tmp"):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something of the user's is in it, or shards that are still needed
        checkpoint.rmdir()


def discard(shards: Path) -> None:
    """Remove the shards of a save that failed, once no rank writes any more."""
    shutil.rmtree(shards, ignore_errors=True)
    with contextlib.suppress(OSError):  # a manifest, or something of the user's, is there too
        shards.parent.rmdir()


def remove_torn(folder: Path, attempt: str | None) -> None:
    """Remove shards that no manifest names, of attempts that died or failed. Call it on rank 0 before a save: where
    the disk is full, the same step needs their room.

    Raises:
        TakenOver: another attempt has claimed the folder, and may be writing such shards right now.
    """
    if not _is_current(folder, attempt):
        raise TakenOver(_taken_over(folder))
    for torn in _steps(folder, committed=False):
        _remove(torn)


def _remove_old(folder: Path, newest: Path, keep: int) -> None:
    committed = [path for path in _steps(folder, committed=True) if _step_of(path) <= _step_of(newest)]
    for old in committed[:-keep]:
        (old / "manifest.json").unlink(missing_ok=True)  # first of all: half-removed is not committed
        _remove(old)
    _remove(newest, keep_shards=json.loads((newest / "manifest.json").read_text())["shards"])


def latest(folder: Path) -> Path | None:
    """The committed checkpoint with the highest step in `folder`, or None. Call it on rank 0 and broadcast."""
    return next(reversed(_steps(folder, committed=True)), None)


def set_newer_aside(folder: Path, start: Path) -> list[Path]:
    """Rename committed checkpoints with a higher step than that of `start`, so that the run can go on from there.

    Returns:
        The new places.
    """
    step, moved = read(start)["step"], []
    for path in _steps(folder, committed=True):
        if _step_of(path) > step and not path.samefile(start):
            moved.append(path.rename(path.with_name(f"set-aside-{path.name}-{uuid.uuid4().hex[:4]}")))
    return moved


def is_whole(checkpoint: Path) -> bool:
    """Whether all files of a committed checkpoint have their checksums; reads all of them."""
    try:
        content = _read(checkpoint)
        shards = checkpoint / content["shards"]
        return all(checksum(shards / name) == entry for name, entry in content["files"].items())
    except (OSError, ValueError):
        return False


def use_another(checkpoint: Path, found: str) -> str:
    """Return `found`, what is wrong with a checkpoint, and which other one of the same folder is whole."""
    found = found.removesuffix("; use another checkpoint")
    others = [path for path in reversed(_steps(checkpoint.parent, committed=True)) if path.name != checkpoint.name]
    if whole := next((path for path in others if is_whole(path)), None):
        return f"{found}; the newest other one that is whole is {whole.name}: go on with --resume {quote(str(whole))}"
    return f"{found}; no other one there is whole: use another checkpoint, or begin again with another run_name"


def _require(condition: object, found: str) -> None:
    if not condition:
        raise ValueError(found)


def read(checkpoint: Path) -> dict[str, Any]:
    """Read and check a checkpoint's manifest, as `_read`; the message of its ValueError names another checkpoint."""
    try:
        return _read(checkpoint)
    except ValueError as error:
        raise ValueError(use_another(checkpoint, str(error))) from None


def _read(checkpoint: Path) -> dict[str, Any]:
    """Read and check a checkpoint's manifest: that it is ours, and its files are there in full size, and no others.

    The manifest may be anyone's: names in it that lead elsewhere are refused, and so are links.

    Raises:
        ValueError: with one line on what is wrong.
    """
    path = checkpoint / "manifest.json"
    if not path.is_file() or path.is_symlink():
        raise ValueError(
            f"{checkpoint} holds no manifest.json: not a checkpoint of this project, or one never finished"
        )
    try:
        manifest: dict[str, Any] = read_json(path)
        shards, files = checkpoint / manifest["shards"], manifest["files"]
        _require(re.fullmatch(r"[\w-]+", manifest["shards"]), f"shards = {manifest['shards']!r:.80}")
        for key, kind in {"step": int, "parameters": dict, "optimizer": str | None, "extra": dict}.items():
            _require(isinstance(manifest[key], kind), f"{key} = {manifest[key]!r:.80}")
        _require(".metadata" in files, "files lacks .metadata")
        for name in files:
            _require(re.fullmatch(r"\.metadata|__\d+_\d+\.distcp", name), f"files has {name!r:.80}")
        expected = {name: (entry["bytes"], len(entry["sha256"])) for name, entry in files.items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        words = f"{type(error).__name__}: {error}".removeprefix("ValueError: ")
        raise ValueError(f"{path} is not a manifest that this project wrote ({words})") from None
    for file in (shards, *(shards / name for name in files)):
        if file.is_symlink():
            raise ValueError(f"{file} is a link; expected the file itself; use another checkpoint")
    for name, (size, _) in expected.items():
        found = (shards / name).stat().st_size if (shards / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"is truncated or changed: {found} bytes"
            raise ValueError(f"{shards / name} {state}, the manifest says {size}; use another checkpoint")
    others = [name for name in os.listdir(shards) if name not in files and not name.startswith(".nfs")]
    if others:
        raise ValueError(
            f"{shards / min(others)} is not in the manifest; expected no other files; use another checkpoint"
        )
    if checksum(shards / ".metadata") != files[".metadata"]:
        raise ValueError(f"{shards}/.metadata does not have the checksum of its manifest; use another checkpoint")
    return manifest
