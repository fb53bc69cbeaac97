"""Checkpoints that are whole or not there: sharded, checksummed, committed by a manifest written last, reshardable.

    checkpoints/step_120/shards-3f9c…/__0_0.distcp …   every rank's part, in a folder that only this attempt writes
    checkpoints/step_120/manifest.json                 written last: no manifest, no checkpoint

    checkpoints/attempt                                who may commit here: the newest attempt of a run, no leftover

`torch.distributed.checkpoint` writes and reshards; the names are those of the bare model, so that a checkpoint fits
whatever wrapped the model when it was saved. Renaming a directory is no commit on a shared file system, where another
node may see the rename before the data; here each rank syncs its files before the barrier, and rank 0 writes the
manifest after it. DCP's `.metadata` is a pickle: only files whose checksums stand in the manifest are loaded.
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from common.ranks import Ranks, fail


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


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def checksum(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file, as a manifest has them."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


@runtime_checkable
class WholeState(Protocol):
    """Stands in a model's place where torch cannot tell how model and optimizer are cut, because it was done by hand.

    The state is that which torch would give of the plain model: {"model": name → tensor, "optimizer": {"state": name →
    entries, "param_groups": …}}. Of the tensors a rank gives those it has, whole or as DTensors; together the ranks
    give all, and what several give is equal. The param_groups are those of the whole model on every rank.
    """

    module: torch.nn.Module
    """What this rank holds of the model."""

    def whole_state(self) -> dict[str, Any]: ...
    def load_whole_state(self, state: dict[str, Any]) -> None: ...


Model = torch.nn.Module | WholeState


def _shapes(state: dict[str, Any], ranks: Ranks) -> dict[str, list[int]]:
    """Shapes of the whole model's parameters, by name: pipeline stages hold some each."""
    mine = {name: list(value.shape) for name, value in state["model"].items()}
    return {name: shape for part in ranks.all_gather(mine) for name, shape in part.items()}


def _state(model: Model, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    if isinstance(model, WholeState):
        return model.whole_state()
    if optimizer is None:
        return {"model": get_model_state_dict(model)}
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def claim(folder: Path) -> str:
    """Become the attempt that may commit in `folder`; none before it may any more. Call it on rank 0 alone.

    Of an attempt whose node was lost, a process may still be there, and wake: requeued, the run goes on meanwhile.

    Returns:
        The attempt's name, for `save`.
    """
    name = uuid.uuid4().hex[:12]
    (folder / f"attempt-{name}.tmp").write_text(name)
    (folder / f"attempt-{name}.tmp").replace(folder / "attempt")
    return name


def _is_current(folder: Path, attempt: str | None) -> bool:
    return attempt is None or (folder / "attempt").read_text() == attempt


def _taken_over(folder: Path) -> str:
    return f"another attempt has taken over {folder}; this one ends, and leaves the checkpoints to it"


def _why_it_failed(folder: Path, attempt: str | None, found: str) -> str:
    """Return `found`, unless another attempt has taken over: that one removes what this one was writing."""
    with contextlib.suppress(OSError):
        if not _is_current(folder, attempt):
            return _taken_over(folder)
    return f"{found}; earlier checkpoints are untouched"


def save(
    folder: Path,
    step: int,
    model: Model,
    optimizer: torch.optim.Optimizer | None,
    ranks: Ranks,
    extra: dict[str, Any] | None = None,
    keep: int = 2,
    attempt: str | None = None,
) -> Path:
    """Save the state after `step` steps into `folder`/step_N. All ranks must call it.

    Args:
        model, optimizer: plain, or wrapped by DDP, FSDP or torch.compile; or a `WholeState`, and the optimizer for
            its kind.
        extra: small JSON values that travel along (a gradient scaler's state, say).
        keep: older committed checkpoints beyond this many are removed, after the new one is committed.
        attempt: what `claim` returned on rank 0: nothing is committed, or removed, once another attempt has claimed.

    Raises:
        SystemExit: (exit code 2, on all ranks) the files could not be written, or a newer attempt has taken over;
            earlier checkpoints are untouched.
    """
    target = folder / f"step_{step}"
    shards = target / str(ranks.broadcast(f"shards-{uuid.uuid4().hex[:12]}"))
    state, problem, files = _state(model, optimizer), None, {}
    try:
        shards.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # told before the others begin to write, which they do together
        problem = f"checkpoint {target} could not be written: {error}; earlier checkpoints are untouched"
    ranks.fail_together(problem)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process: as meant
            dcp.save(state, storage_writer=dcp.FileSystemWriter(shards, sync_files=True))
        mine = [f"__{ranks.rank}_*.distcp"] + ([".metadata"] if ranks.is_main else [])
        files = {path.name: checksum(path) for pattern in mine for path in sorted(shards.glob(pattern))}
        _sync_folder(shards)
    except (OSError, dcp.CheckpointException) as error:
        problem = _why_it_failed(folder, attempt, f"checkpoint {target} could not be written: {error}")
    ranks.fail_together(problem)
    everything = {name: entry for part in ranks.all_gather(files) for name, entry in part.items()}
    shapes = _shapes(state, ranks)
    if ranks.is_main:
        manifest = {
            "step": step,
            "world_size": ranks.world_size,
            "optimizer": type(optimizer).__name__ if optimizer else None,
            "parameters": shapes,
            "extra": extra or {},
            "shards": shards.name,
            "files": everything,
        }
        try:
            for name, entry in everything.items():
                if not (shards / name).is_file() or (shards / name).stat().st_size != entry["bytes"]:
                    raise OSError(f"rank 0 does not see {name} of another rank; is runs_dir on a shared file system?")
            temporary = target / f"manifest-{shards.name}.tmp"
            with open(temporary, "w") as file:
                json.dump(manifest, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            if _is_current(folder, attempt):
                try:  # only where there is none: an attempt that stops right here, and wakes late, cannot replace one
                    os.link(temporary, target / "manifest.json")
                    temporary.unlink()
                except OSError:  # there is one, of an attempt before this; or the file system knows no links
                    if _is_current(folder, attempt):
                        temporary.replace(target / "manifest.json")
                _sync_folder(target)
            if _is_current(folder, attempt):
                _remove_old(folder, target, keep)
            else:
                problem = _taken_over(folder)
        except OSError as error:
            problem = _why_it_failed(folder, attempt, f"checkpoint {target} could not be committed: {error}")
    ranks.fail_together(problem)
    return target


def _step_of(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix("step_")
    return int(number) if number.isdigit() else -1


def _remove_old(folder: Path, newest: Path, keep: int) -> None:
    committed = sorted((m.parent for m in folder.glob("step_*/manifest.json")), key=_step_of)
    torn = [p for p in folder.glob("step_*") if p not in committed and _step_of(p) < _step_of(newest)]
    for old in committed[:-keep] + torn:
        (old / "manifest.json").unlink(missing_ok=True)  # first of all: half-removed is not committed
        shutil.rmtree(old, ignore_errors=True)
    current = json.loads((newest / "manifest.json").read_text())["shards"]
    for leftover in newest.glob("shards-*"):  # of an attempt at the same step that died before its commit
        if leftover.name != current:
            shutil.rmtree(leftover, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """The committed checkpoint with the highest step in `folder`, or None. Call it on rank 0 and broadcast."""
    return max((manifest.parent for manifest in folder.glob("step_*/manifest.json")), key=_step_of, default=None)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read and check a checkpoint's manifest: that it is ours, and that its files are there in their full size.

    Raises:
        ValueError: with one line on what is wrong.
    """
    path = checkpoint / "manifest.json"
    if not path.is_file():
        raise ValueError(
            f"{checkpoint} holds no manifest.json: not a checkpoint of this project, or one never finished"
        )
    try:
        manifest = json.loads(path.read_text())
        for name, entry in manifest["files"].items():
            file = checkpoint / manifest["shards"] / name
            found = file.stat().st_size if file.is_file() else None
            if found != entry["bytes"]:
                state = "is missing" if found is None else f"is truncated or changed: {found} bytes"
                raise ValueError(f"{file} {state}, the manifest says {entry['bytes']}; use another checkpoint")
        assert {"step", "parameters", "optimizer", "extra"} <= manifest.keys()
    except (KeyError, TypeError, AttributeError, AssertionError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a manifest that this project wrote ({type(error).__name__}: {error})"
        ) from None
    return manifest


def load(checkpoint: Path, model: Model, optimizer: torch.optim.Optimizer | None, ranks: Ranks) -> dict[str, Any]:
    """Load a checkpoint into a model (and its optimizer), whatever world size saved it. All ranks must call it.

    Returns:
        The manifest: `step` is the number of steps done, `extra` what was given to `save`.

    Raises:
        SystemExit: (exit code 2, on all ranks) truncated, changed, foreign, or of another model or optimizer.
    """
    manifest: dict[str, Any] = ranks.first_or_fail(lambda: read_manifest(checkpoint))
    problem: str | None = None
    shards = checkpoint / manifest["shards"]
    names = sorted(manifest["files"])[ranks.rank :: ranks.world_size]  # each rank checks its share of the files
    try:
        bad = [name for name in names if checksum(shards / name) != manifest["files"][name]]
        problem = (
            f"{shards / bad[0]} does not have the checksum of its manifest; use another checkpoint" if bad else None
        )
    except OSError as error:
        problem = (
            f"checkpoint {checkpoint} cannot be read on rank {ranks.rank}: {error}; is it on a shared file system?"
        )
    ranks.fail_together(problem)

    state = _state(model, optimizer)
    ours = _shapes(state, ranks)
    for name in sorted(ours.keys() | manifest["parameters"].keys()):
        mine, theirs = ours.get(name, "none"), manifest["parameters"].get(name, "none")
        if mine != theirs:
            fail(f"{checkpoint} is of another model: {name} has shape {theirs} there, {mine} here; check model.*")
    kind = type(optimizer).__name__ if optimizer else None
    if optimizer and kind != manifest["optimizer"]:
        fail(f"{checkpoint} is of {manifest['optimizer']}, this run uses {kind}; set optimizer.name to match")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process: as it was meant
        dcp.load(state, storage_reader=dcp.FileSystemReader(shards))
    if isinstance(model, WholeState):
        model.load_whole_state(state)
    elif optimizer is None:
        set_model_state_dict(model, state["model"])
    else:
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return manifest
