"""Checkpoints that are whole or not there: sharded, checksummed, committed by a manifest written last, reshardable.

    checkpoints/step_120/shards-3f9c…/__0_0.distcp …   every rank's part, in a folder that only this attempt writes
    checkpoints/step_120/manifest.json                 written last: no manifest, no checkpoint

    checkpoints/attempt                                who may commit here: the newest attempt of a run, no leftover

`torch.distributed.checkpoint` writes and reshards; the names are those of the bare model, so that a checkpoint fits
whatever wrapped the model when it was saved. Renaming a directory is no commit on a shared file system, where another
node may see the rename before the data; here each rank syncs its files before the barrier, and rank 0 writes the
manifest after it. Only files whose checksums stand in the manifest are loaded, and those without trust: see
`checkpoint_reader.py`.
"""

import shutil
import uuid
import warnings
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
from torch.distributed.tensor import DTensor

from common.ranks import Ranks, fail
from common.runs import manifest
from common.runs.checkpoint_reader import Planner, Reader
from common.runs.records import sync_folder


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


def _tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All tensors of a state by name: weights, buffers and the optimizer's."""
    named = dict(state["model"])
    for name, entries in state.get("optimizer", {}).get("state", {}).items():
        named |= {f"{name} {key}": value for key, value in entries.items()}
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}


def _not_finite(state: dict[str, Any]) -> str | None:
    """The first tensor of this rank with a value that is nan or inf; the device is asked once."""
    named = {name: value for name, value in _tensors(state).items() if value.is_floating_point()}
    local = [value.to_local() if isinstance(value, DTensor) else value for value in named.values()]
    device = next((value.device for value in local if value.is_cuda), torch.device("cpu"))
    finite = [value.isfinite().all().to(device, non_blocking=True) for value in local]
    good = torch.stack(finite).tolist() if finite else []
    return next((name for name, is_good in zip(named, good, strict=True) if not is_good), None)


def _room(folder: Path, state: dict[str, Any], ranks: Ranks) -> str:
    """How much a checkpoint needs, and how much is free. All ranks must call it."""
    sizes = {name: value.numel() * value.element_size() for name, value in _tensors(state).items()}
    whole = {name: size for part in ranks.all_gather(sizes) for name, size in part.items()}
    free = shutil.disk_usage(folder).free if folder.exists() else 0
    return f"it needs {sum(whole.values()) / 2**20:,.1f} MiB, and {free / 2**20:,.1f} MiB are free"


def _cause(error: BaseException) -> str:
    """What went wrong, in a line: DCP folds the errors of all ranks, with their tracebacks, into one."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        rank, (first, _) = min(error.failures.items())
        return f"rank {rank}: {_cause(first)}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


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
        attempt: on rank 0, what `manifest.claim` returned: once another attempt has claimed the folder, nothing is
            committed or removed.

    Raises:
        SystemExit: (exit code 2, on all ranks) a weight or moment is nan or inf, the files could not be written, or a
            newer attempt has taken over; earlier checkpoints are untouched.
    """
    target = folder / f"step_{step}"
    shards = target / str(ranks.broadcast(f"shards-{uuid.uuid4().hex[:12]}"))
    state, files, problem = _state(model, optimizer), {}, None
    if bad := _not_finite(state):
        problem = f"after {step} steps {bad} holds nan or inf: not saved; earlier checkpoints are untouched"
    elif ranks.is_main:
        try:
            manifest.remove_torn(folder, attempt)
        except (OSError, manifest.TakenOver) as error:
            problem = manifest.why_it_failed(folder, attempt, f"checkpoint {target}: {_cause(error)}")
    ranks.fail_together(problem)
    try:
        shards.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # told before the others begin to write, which they do together
        problem = f"checkpoint {target} could not be written: {_cause(error)}; earlier checkpoints are untouched"
    ranks.fail_together(problem)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process: as meant
            dcp.save(state, storage_writer=dcp.FileSystemWriter(shards, sync_files=True))
        mine = [f"__{ranks.rank}_*.distcp"] + ([".metadata"] if ranks.is_main else [])
        files = {path.name: manifest.checksum(path) for pattern in mine for path in sorted(shards.glob(pattern))}
        sync_folder(shards)
    except (OSError, dcp.CheckpointException) as error:
        problem = _cause(error)
    if problems := [each for each in ranks.all_gather(problem) if each]:
        room = _room(folder, state, ranks)
        if ranks.is_main:
            manifest.discard(shards)  # the next attempt at this step needs their room
        found = f"checkpoint {target} could not be written: {problems[0]}; {room}"
        ranks.fail_together(manifest.why_it_failed(folder, attempt, found))
    everything = {name: entry for part in ranks.all_gather(files) for name, entry in part.items()}
    shapes = _shapes(state, ranks)
    if ranks.is_main:
        content = {
            "step": step,
            "world_size": ranks.world_size,
            "optimizer": type(optimizer).__name__ if optimizer else None,
            "parameters": shapes,
            "extra": extra or {},
            "shards": shards.name,
            "files": everything,
        }
        try:
            manifest.commit(target, content, keep, attempt)
        except OSError as error:
            problem = manifest.why_it_failed(
                folder, attempt, f"checkpoint {target} could not be committed: {_cause(error)}"
            )
        except manifest.TakenOver as error:
            problem = str(error)
    ranks.fail_together(problem)
    return target


def load(checkpoint: Path, model: Model, optimizer: torch.optim.Optimizer | None, ranks: Ranks) -> dict[str, Any]:
    """Load a checkpoint into a model (and its optimizer), whatever world size saved it. All ranks must call it.

    Returns:
        The manifest: `step` is the number of steps done, `extra` what was given to `save`.

    Raises:
        SystemExit: (exit code 2, on all ranks) truncated, changed, foreign, or of another model or optimizer.
    """
    content: dict[str, Any] = ranks.first_or_fail(lambda: manifest.read(checkpoint))
    problem: str | None = None
    shards = checkpoint / content["shards"]
    names = sorted(content["files"])[ranks.rank :: ranks.world_size]  # each rank checks its share of the files
    try:
        bad = [name for name in names if manifest.checksum(shards / name) != content["files"][name]]
        if bad:
            raise ValueError(f"{shards / bad[0]} does not have the checksum of its manifest")
        reader = Reader(shards, content["files"])
    except ValueError as error:
        problem = manifest.use_another(checkpoint, str(error))
    except OSError as error:
        problem = (
            f"checkpoint {checkpoint} cannot be read on rank {ranks.rank}: {error}; is it on a shared file system?"
        )
    ranks.fail_together(problem)

    state = _state(model, optimizer)
    ours = _shapes(state, ranks)
    for name in sorted(ours.keys() | content["parameters"].keys()):
        mine, theirs = ours.get(name, "none"), content["parameters"].get(name, "none")
        if mine != theirs:
            fail(f"{checkpoint} is of another model: {name} has shape {theirs} there, {mine} here; check model.*")
    kind = type(optimizer).__name__ if optimizer else None
    if optimizer and kind != content["optimizer"]:
        fail(f"{checkpoint} is of {content['optimizer']}, this run uses {kind}; set optimizer.name to match")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process: as it was meant
        try:
            dcp.load(state, storage_reader=reader, planner=Planner())
        except dcp.CheckpointException as error:
            why = "; ".join({str(reason).partition("\n")[0] for reason, _ in error.failures.values()})
            fail(f"{checkpoint} cannot be loaded: {why:.300}; use another checkpoint")
    if isinstance(model, WholeState):
        model.load_whole_state(state)
    elif optimizer is None:
        set_model_state_dict(model, state["model"])
    else:
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return content
