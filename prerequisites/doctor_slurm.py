"""Slurm's commands, the job, and the tokens of W&B and Hugging Face."""

from __future__ import annotations  # so that an old Python gets as far as being told that it is too old

import os
import shutil
from pathlib import Path

from doctor_results import ROOT, Result, count, ok, output, read, warning


def check_slurm() -> list[Result]:
    """Slurm's commands, its controller, its partitions; inside a job, what the job asked for."""
    return [judge_slurm(), *judge_job(dict(os.environ))]


def judge_slurm() -> Result:
    """Whether jobs can be submitted from here, and to which partitions."""
    missing = [name for name in ("sinfo", "sbatch", "srun", "squeue", "scancel") if not shutil.which(name)]
    if len(missing) == 5:
        return ok("slurm", "not on this machine; torchrun works without")
    if missing:
        return warning("slurm", f"missing: {', '.join(missing)}", "install Slurm's client commands, or load its module")
    code, text = output(["sinfo", "--noheader", "--format=%P %a %D %G"])
    if code:
        last = (text.splitlines() or ["no answer"])[-1]
        advice = "on a login node, ask the administrators; on a laptop without a cluster, ignore this"
        return warning("slurm", f"the commands are here, but no controller answers ({last})", advice)
    return ok("slurm", f"partitions: {partitions(text)}")


def partitions(text: str) -> str:
    """What sinfo prints in our format, in words: name (state, nodes, GPUs), by cluster where there are several."""
    clusters: dict[str, list[str]] = {}
    name = ""
    for row in filter(None, (line.split(maxsplit=3) for line in text.splitlines())):
        if row[0] == "CLUSTER:":  # SLURM_CLUSTERS, or a federation
            name = f"{' '.join(row[1:])}: "
            clusters.setdefault(name, [])
        elif len(row) == 4:
            gpus = row[3].replace("(null)", "no GPUs")
            clusters.setdefault(name, []).append(f"{row[0]} ({row[1]}, {row[2]} nodes, {gpus})")
        else:
            clusters.setdefault(name, []).append(" ".join(row))
    return "; ".join(f"{name}{', '.join(shown) or 'none'}" for name, shown in clusters.items()) or "none"


def judge_job(environment: dict[str, str]) -> list[Result]:
    """Inside a job: tasks against GPUs of a node, and whether srun will hand on the cores."""
    job = environment.get("SLURM_JOB_ID")
    if not job:
        return []
    get = environment.get
    tasks = count(get("SLURM_STEP_TASKS_PER_NODE") or get("SLURM_TASKS_PER_NODE"), 1)
    gpus = count(get("SLURM_GPUS_ON_NODE"))
    nodes, per_task = get("SLURM_NNODES", "1"), get("SLURM_CPUS_PER_TASK", "no number of")
    found = f"{job}: {nodes} node(s); here {tasks} task(s), {gpus} GPU(s), {per_task} cores asked for a task"
    if get("SLURM_CPUS_PER_TASK") and not get("SRUN_CPUS_PER_TASK") and "SLURM_STEP_ID" not in environment:
        # since Slurm 22.05 srun no longer takes --cpus-per-task from the job (release notes of 22.05)
        advice = "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK before srun; else a task may get a single core"
        return [warning("job", f"{found}; SRUN_CPUS_PER_TASK is not set", advice)]
    if tasks > 1 and gpus and tasks != gpus:
        advice = "one task a node with torchrun, or one task a GPU: --ntasks-per-node equal to --gpus-per-node"
        return [warning("job", found, advice)]
    return [ok("job", found)]


def check_tokens(home: Path | None = None, root: Path = ROOT) -> list[Result]:
    """Whether W&B and Hugging Face would find a token, never which; and that none is tracked by git."""
    home = home or Path(os.path.expanduser("~"))  # Path.home raises where there is none
    hugging = Path(
        os.environ.get("HF_TOKEN_PATH") or Path(os.environ.get("HF_HOME") or home / ".cache/huggingface") / "token"
    )
    netrc = Path(os.environ.get("NETRC") or home / ".netrc")
    known = read(netrc)
    places = {
        "W&B": "WANDB_API_KEY" if os.environ.get("WANDB_API_KEY") else str(netrc) if "api.wandb.ai" in known else "",
        "Hugging Face": "HF_TOKEN" if os.environ.get("HF_TOKEN") else str(hugging) if os.path.isfile(hugging) else "",
    }
    results = [ok("tokens", "; ".join(f"{name}: {place or 'no token, none needed'}" for name, place in places.items()))]
    for file in (netrc, hugging):
        if str(file) in places.values() and file.stat().st_mode & 0o077:
            results.append(warning("tokens", f"others can read {file}", f"chmod 600 {file}"))
    code, text = output(["git", "-C", str(root), "ls-files"])
    if code == 0 and (tracked := [name for name in text.splitlines() if looks_like_token(name)]):
        advice = "git rm --cached it, add it to .gitignore, and revoke the token: history keeps it"
        results.append(warning("tokens", f"git tracks {', '.join(tracked)}", advice))
    return results


def looks_like_token(name: str) -> bool:
    """Whether a tracked file is named as those are that hold secrets."""
    base = name.rpartition("/")[2].lower()
    example = base.endswith((".example", ".sample", ".template"))
    secret = base in (".env", ".netrc", "netrc", "_netrc", "token", "credentials", "id_rsa", "id_ed25519")
    return not example and (secret or base.startswith(".env.") or base.endswith((".token", ".pem", ".key")))
