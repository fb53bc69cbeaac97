"""The folder of one run: its name, whether a later start may continue it, and its record. Knows nothing of torch.

runs/<name>/config.yaml      the resolved settings
            run.json         framework, strategy, mesh, versions, hosts, git commit, data fingerprint
            metrics.jsonl    one object per step; evaluations have val_loss
            checkpoints/     step_N/, see common/checkpoint.py
            loss.png         the curve
"""

import math
import os
import platform
import secrets
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from common.runs import manifest, records

if TYPE_CHECKING:
    from common.config import RunConfig

AXES = ("dp_replicate", "dp_shard", "tp", "pp", "cp", "ep")  # of the mesh in run.json, the same for every lesson
MUST_MATCH = ("seed", "data", "model", "batch.global_size")  # a resumed run must go on with the same data and model
# What may change without a word: where things are, how often something is done, how the work is divided.
MAY_DIFFER = (
    "data.path", "data.workers", "data.validation_samples", "batch.micro_size", "train.steps", "train.log_every",
    "train.eval_every", "train.check_replicas_every", "checkpoint", "resume", "device", "run_name", "runs_dir",
    "timeout_s", "network_profile", "tensorboard", "wandb", "mesh", "fsdp", "strategy", "framework", "export",
)  # fmt: skip


def full_mesh(mesh: dict[str, int] | None, world_size: int) -> dict[str, int]:
    """Return the sizes of all six axes; those not given are 1. Without a mesh all ranks are data-parallel replicas.

    Raises:
        ValueError: an axis has another name, or the product of the sizes is not the world size (`ep` divides the
            data-parallel ranks again, so it does not count).
    """
    given = {"dp_replicate": world_size} if mesh is None else mesh
    if unknown := given.keys() - set(AXES):
        raise ValueError(f"mesh axis {sorted(unknown)[0]!r} in run.json; expected some of {', '.join(AXES)}")
    full = {axis: given.get(axis, 1) for axis in AXES}
    ranks = full["dp_replicate"] * full["dp_shard"] * full["tp"] * full["pp"] * full["cp"]
    if ranks != world_size:
        raise ValueError(f"mesh {given} in run.json has {ranks} places; expected the world size {world_size}")
    return full


def open_folder(
    config: "RunConfig", settings: dict[str, Any], fingerprint: str | None
) -> tuple[Path, Path | None, bool, str | None]:
    """Choose and make the run's folder, and find the checkpoint to start from. Call it on rank 0 alone.

    What is in the folder stays as it is: another attempt may be running, and this one may still fail; see `take_over`.

    Args:
        config: the resolved settings; `settings` is the same as plain dicts and lists.
        fingerprint: of the data; a run is continued with the same data only.

    Returns:
        The folder; the checkpoint (None: start from step 0); whether the user named this checkpoint of the run itself;
        a line on what has changed since it was made, or None.

    Raises:
        ValueError: in one line, why this run cannot start in that folder.
    """
    script, resume, name = Path(sys.argv[0]), config.resume, config.run_name
    kind = f"{script.resolve().parent.name}-{script.stem}" if script.suffix == ".py" else "notebook"
    job = os.environ.get("SLURM_JOB_ID")  # a requeued job keeps its id, and so finds its run again
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and not job and not name:
        cause = f"torchrun --max-restarts={restarts} without --run_name"
        raise ValueError(f"{cause}: a restart would begin a new run, not continue; give the run a name")
    unique = f"job{job}" if job else f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    folder = Path(config.runs_dir) / (name or f"{kind}-{unique}")
    checkpoints = folder / "checkpoints"
    again = any(os.environ.get(f"{launcher}_RESTART_COUNT", "0") != "0" for launcher in ("SLURM", "TORCHELASTIC"))
    try:
        own = manifest.latest(checkpoints)
        exists = own is not None or (folder / "config.yaml").is_file()
        if exists and resume == "never":
            raise ValueError(f"run {folder} exists already, and resume = never; choose another run_name")
        if exists and not name and not again:
            advice = f"name the second with --run_name, or go on with --run_name {folder.name}"
            raise ValueError(f"this Slurm job has a run {folder} already; {advice}")
        named = resume not in ("auto", "never")
        # A checkpoint of this very run counts once: a requeued job goes on from its newest, not from there again.
        back = named and not again and Path(resume).resolve().is_relative_to(checkpoints.resolve())
        start = own
        if named and (back or own is None):
            start = manifest.latest(Path(resume, "checkpoints")) or Path(resume)
            try:
                manifest.read(start)
            except ValueError as error:
                raise ValueError(f"resume = {resume}: {error}") from None
        changes = _compare(folder, start, settings, fingerprint) if start else None
        checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"run folder {folder}: {_trouble(error)}") from None
    return folder, start, back, changes


def _trouble(error: OSError) -> str:
    link = Path(str(error.filename))
    if link.is_symlink() and not link.exists():
        return f"{link} is a link to {os.readlink(link)}, which is gone; bring that back, or remove the link"
    return f"{error.strerror}: {error.filename}; choose a folder you can write to with --runs_dir"


def take_over(
    folder: Path, start: Path | None, back: bool, settings: dict[str, Any], record: dict[str, Any]
) -> tuple[str, Path | None, list[Path]]:
    """Make this attempt the one that may commit, and write config.yaml and run.json. Call it on rank 0 alone, once
    nothing that can be tried before can fail any more: another attempt that runs ends by it.

    Args:
        start, back: from `open_folder`.
        settings, record: of the run.

    Returns:
        The name of this attempt, for `checkpoint.save`; the checkpoint to start from, which is another one if the
        attempt before committed it meanwhile; and where newer checkpoints were moved, if the user went back.

    Raises:
        ValueError: in one line, what cannot be written.
    """
    checkpoints, aside = folder / "checkpoints", []
    try:
        (folder / "stop").unlink(missing_ok=True)
        attempt = manifest.claim(checkpoints)
        if back and start:
            aside = manifest.set_newer_aside(checkpoints, start)
        else:
            start = manifest.latest(checkpoints) or start
        inside = Path(settings["resume"]).resolve().is_relative_to(checkpoints.resolve())
        records.write_settings(folder, settings | ({"resume": "auto"} if inside else {}))  # going back counts once
        records.write_record(folder, record)
    except OSError as error:
        raise ValueError(f"run folder {folder}: {_trouble(error)}") from None
    return attempt, start, aside


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _within(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def lasting(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings by dotted name, without those of `MAY_DIFFER`: a checkpoint keeps what it was made with."""
    flat = {key: value for key, value in _flatten(settings).items() if not _within(key, MAY_DIFFER)}
    # JSON knows no infinity, which `optimizer.clip` may be.
    return {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in flat.items()}


def _compare(folder: Path, start: Path, settings: dict[str, Any], fingerprint: str | None) -> str | None:
    """Return a line on what has changed since `start` was made.

    Raises:
        ValueError: `start` is of the run in `folder`, which has seen other data, or is of another model or precision.
    """
    made_in = start.parent.parent
    extra = manifest.read(start)["extra"] or {}
    if "settings" not in extra:  # made before checkpoints said so, or by a tool
        settings_file, record_file = made_in / "config.yaml", made_in / "run.json"
        if settings_file.is_file():
            extra = extra | {"settings": lasting(records.read_settings(made_in))}
        if record_file.is_file():  # fsdp/checkpoint.py writes none
            extra = extra | {"data_fingerprint": records.read_record(made_in).get("data_fingerprint")}
    before, now = extra.get("settings", {}), lasting(settings)
    own = start.resolve().is_relative_to(folder.resolve())
    common = now.keys() & before.keys()
    if own and before:  # from elsewhere, it may be of a script with other settings
        common |= {k for k in now | before if _within(k, MUST_MATCH)}
    changed = [k for k in now | before if k in common and now.get(k) != before.get(k)]
    doubles = "fp64" in (before.get("train.precision"), now.get("train.precision"))
    refused = [k for k in changed if _within(k, MUST_MATCH) or (k == "train.precision" and doubles)]
    seen = extra.get("data_fingerprint", fingerprint)
    if own and refused:
        sections = [name for name in (*MUST_MATCH, "train.precision") if any(_within(k, (name,)) for k in refused)]
        advice = f"go on with the same ones (--config {quote(f'{folder}/config.yaml')}), or choose another run_name"
        raise ValueError(f"run {folder} was made with other settings of {', '.join(sections)}; {advice}")
    if own and fingerprint != seen:
        difference = f"run {folder} was made with other data (fingerprint {seen}, now {fingerprint})"
        raise ValueError(f"{difference}; go on with the same files, or choose another run_name")
    found = [f"{k} was {before.get(k)}, is {now.get(k)}" for k in changed]
    if fingerprint != seen:
        found.append(f"the data's fingerprint was {seen}, is {fingerprint}")
    return f"changed since {start} was made: {'; '.join(found)}" if found else None


def _git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).resolve().parent, capture_output=True, text=True)
    except OSError:  # there is no git
        return None
    return done.stdout.strip() or None


def environment_record(framework: str) -> dict[str, Any]:
    """Return what run.json says of the software: git commit, versions (of the framework too), time of the start."""
    packages = ["torch", "numpy"]
    try:
        metadata.version(framework)
        packages += [framework] if framework not in packages else []
    except metadata.PackageNotFoundError:
        pass  # from_scratch/ is no package
    return {
        "git_commit": _git_commit(),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
        "started": now(),
    }


def now() -> str:
    """The time with its zone, as run.json has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
