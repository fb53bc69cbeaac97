"""The folder of one run: its name, whether a later start may continue it, and its record. Knows nothing of torch.

runs/<name>/config.yaml      the resolved settings
            run.json         framework, strategy, mesh, versions, hosts, git commit, data fingerprint
            metrics.jsonl    one object per step; evaluations have val_loss
            checkpoints/     step_N/, see common/checkpoint.py
            loss.png         the curve
"""

import json
import os
import platform
import secrets
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from common import manifest

if TYPE_CHECKING:
    from common.config import RunConfig

AXES = ("dp_replicate", "dp_shard", "tp", "pp", "cp", "ep")  # of the mesh in run.json, the same for every lesson
MUST_MATCH = ("seed", "data", "model", "batch.global_size")  # a resumed run must go on with the same data and model
MAY_DIFFER = ("path", "workers", "validation_samples")  # within the section data; the fingerprint covers the content


def write_whole(path: Path, text: str) -> None:
    """Write a file so that, whenever the process dies, the old or the new one is there."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


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
) -> tuple[Path, Path | None, str]:
    """Choose and make the run's folder, and find the checkpoint to start from. Call it on rank 0 alone.

    Args:
        config: the resolved settings; `settings` is the same as plain dicts and lists.
        fingerprint: of the data; a run is continued with the same data only.

    Returns:
        The folder, the checkpoint (None: start from step 0), and the name of this attempt, for `checkpoint.save`.

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
    try:
        exists = (folder / "config.yaml").is_file()
        if exists and resume == "never":
            raise ValueError(f"run {folder} exists already, and resume = never; choose another run_name")
        again = (os.environ.get(f"{launcher}_RESTART_COUNT", "0") != "0" for launcher in ("SLURM", "TORCHELASTIC"))
        if exists and not name and not any(again):
            advice = f"name the second with --run_name, or go on with --run_name {folder.name}"
            raise ValueError(f"this Slurm job has a run {folder} already; {advice}")
        from_elsewhere = resume not in ("auto", "never")
        if from_elsewhere and Path(resume).resolve().is_relative_to(folder.resolve()):
            advice = "leave resume out to go on with it, or choose another run_name to begin a new run from there"
            raise ValueError(f"resume = {resume} lies in the folder of this very run; {advice}")
        start = manifest.latest(checkpoints)
        if start:
            _compare(folder, settings, fingerprint)
        elif from_elsewhere:
            start = manifest.latest(Path(resume, "checkpoints")) or Path(resume)
            try:
                manifest.read(start)
            except ValueError as error:
                raise ValueError(f"resume = {resume}: {error}") from None
        checkpoints.mkdir(parents=True, exist_ok=True)
        (folder / "stop").unlink(missing_ok=True)
        attempt = manifest.claim(checkpoints)
        # Until the claim, an earlier attempt could still commit a checkpoint, and remove an old one.
        start = manifest.latest(checkpoints) or start
        write_whole(folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    except yaml.YAMLError as error:
        raise ValueError(f"{folder}/config.yaml is not valid YAML: {error}") from None
    except OSError as error:
        advice = "choose a folder you can write to with --runs_dir"
        raise ValueError(f"run folder {folder}: {error.strerror}; {advice}") from None
    return folder, start, attempt


def _lookup(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part, {})
    return {name: value for name, value in tree.items() if name not in MAY_DIFFER} if key == "data" else tree


def _compare(folder: Path, settings: dict[str, Any], fingerprint: str | None) -> None:
    """ValueError: the run in `folder` has seen other data, or is of another model."""
    before = yaml.safe_load((folder / "config.yaml").read_text())
    changed = [key for key in MUST_MATCH if _lookup(before, key) != _lookup(settings, key)]
    if changed:
        advice = f"go on with the same ones (--config {folder}/config.yaml), or choose another run_name"
        raise ValueError(f"run {folder} was made with other settings of {', '.join(changed)}; {advice}")
    record = folder / "run.json"  # fsdp/checkpoint.py writes none
    seen = json.loads(record.read_text())["data_fingerprint"] if record.is_file() else fingerprint
    if fingerprint != seen:
        difference = f"run {folder} was made with other data (fingerprint {seen}, now {fingerprint})"
        raise ValueError(f"{difference}; go on with the same files, or choose another run_name")


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


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write run.json."""
    write_whole(folder / "run.json", json.dumps(record, indent=1) + "\n")
