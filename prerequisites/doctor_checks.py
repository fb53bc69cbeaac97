"""What the doctor looks at: one small function a check, each giving a list of results.

Nothing here imports torch or another heavy package into this process: a broken installation is what is looked for,
and one import that crashes must not take the other checks along. They are imported in a process of their own.
"""

from __future__ import annotations  # so that an old Python gets as far as being told that it is too old

import contextlib
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
MODULES = {  # what is imported, and under which name; other packages are only tools, whose version is enough
    "torch": "torch", "torchvision": "torchvision", "numpy": "numpy", "PyYAML": "yaml", "tqdm": "tqdm",
    "psutil": "psutil", "matplotlib": "matplotlib", "scikit-learn": "sklearn", "setuptools": "setuptools",
    "transformers": "transformers", "safetensors": "safetensors", "torchdata": "torchdata",
    "tensorboard": "tensorboard",
}  # fmt: skip
FRAMEWORKS = ("deepspeed", "lightning", "horovod", "jax", "nemo")  # folders of lessons that bear a library's name
OLDEST_TORCH = (2, 11)
INSTALL = "make venv, or pip install -r requirements.txt"
NETWORK_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "fuse", "smb", "cifs", "afs", "wekafs", "panfs")


@dataclass(frozen=True)
class Result:
    """One finding. `status`: ok, warning (works, but …) or problem (will fail); `advice`: what to do unless ok."""

    name: str
    status: str
    found: str
    advice: str = ""


def ok(name: str, found: str) -> Result:
    return Result(name, "ok", found)


def warning(name: str, found: str, advice: str) -> Result:
    return Result(name, "warning", found, advice)


def problem(name: str, found: str, advice: str) -> Result:
    return Result(name, "problem", found, advice)


def output(command: list[str], timeout_s: float = 10) -> tuple[int, str]:
    """(exit code, what the command printed); 127 where there is no such command, 124 when it took too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout_s, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return 124, f"no answer within {timeout_s:g} s"
    except OSError as error:
        return 127, str(error)
    return done.returncode, (done.stdout if done.returncode == 0 else done.stdout + done.stderr).strip()


def read(path: Path) -> str:
    """The text of a file that this project has not written, whatever its encoding; "" where it cannot be read."""
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace")
    return ""


def count(value: str | None, otherwise: int = 0) -> int:
    """The number in a launcher's or Slurm's variable: `2`, `2(x3),1` and `gpu:a100:2(S:0)` → 2."""
    found = re.match(r"(?:[^(,]*:)?([0-9]{1,9})(?=$|[(,])", (value or "").strip())
    return int(found[1]) if found else otherwise


# ------------------------------------------------------------------------------------------ Python and packages


def check_python() -> list[Result]:
    """Version of Python, and which environment it belongs to."""
    if sys.prefix != sys.base_prefix:
        kind = "a virtual environment"
    else:
        kind = "a conda environment" if (Path(sys.prefix) / "conda-meta").is_dir() else "no environment of its own"
    found = f"Python {platform.python_version()}, {sys.prefix} ({kind})"
    if sys.version_info < (3, 11):  # noqa: UP036
        return [problem("python", found, "install Python 3.11 or newer: make venv PYTHON=python3.12")]
    active = os.environ.get("VIRTUAL_ENV") or os.environ.get("CONDA_PREFIX")
    if active and Path(active).resolve() != Path(sys.prefix).resolve():
        return [warning("python", f"{found}, while {active} is active", "start the python of the one you mean")]
    return [ok("python", found)]


def pins(*files: str) -> dict[str, str]:
    """Package → exact version, as the requirement files in the repository's root name them."""
    lines = [line for file in files for line in (ROOT / file).read_text().splitlines()]
    return dict(match.groups() for line in lines if (match := re.match(r"([\w.-]+)==([^\s#;]+)", line)))


def release(version: str) -> str:
    """`2.15.0+cu132` → `2.15.0`: the part after + names the build."""
    return version.split("+")[0]


def installed(name: str) -> str | None:
    """Version of an installed package, by its metadata."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def check_packages() -> list[Result]:
    """Installed versions against the pinned ones."""
    lesson = pins("requirements-lesson.txt")
    everything = lesson | pins("requirements.txt")
    results, missing, good = [], [], 0
    for name, pinned in everything.items():
        found = installed(name)
        if found is None and name in lesson:
            results.append(problem("packages", f"{name} is not installed", INSTALL))
        elif found is None:
            missing.append(name)
        elif name == "torch" and tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST_TORCH:
            older = f"torch {found} is older than 2.11, which the lessons need"
            results.append(problem("packages", older, f"pip install torch=={pinned}"))
        elif release(found) != pinned:
            advice = f"pip install {name}=={pinned}, unless you chose {found} on purpose"
            results.append(warning("packages", f"{name} {found} is installed, {pinned} is pinned", advice))
        else:
            good += 1
    if missing:
        found = f"not installed: {', '.join(missing)}; the DDP lesson works without"
        results.append(warning("packages", found, INSTALL))
    return results or [ok("packages", f"{good} of {len(everything)} as pinned in requirements.txt")]


IMPORTER = """
import importlib, json, os, sys
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what a package prints must not get among the answers
for name in sys.argv[1:]:
    print("?", name, file=out, flush=True)
    answer = {}
    try:
        module = importlib.import_module(name)
        answer = {"file": getattr(module, "__file__", None), "version": getattr(module, "__version__", None)}
    except BaseException as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print("!", json.dumps(answer), file=out, flush=True)
"""


def import_all(modules: list[str], timeout_s: float = 300) -> dict[str, dict]:
    """Import each module in a process that may die: name → {file, version} or {error}.

    `-P` keeps the working directory off the path, as it is when a script of a lesson is started.
    """
    answers: dict[str, dict] = {}
    left, deadline = list(modules), time.monotonic() + timeout_s
    while left:
        command = [sys.executable, "-P", "-c", IMPORTER, *left]
        try:
            seconds = max(1.0, deadline - time.monotonic())
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=seconds, stdin=subprocess.DEVNULL
            )
            text, end = done.stdout, f"the import killed Python (exit status {done.returncode})"
        except subprocess.TimeoutExpired as error:
            text, end = (error.stdout or b"").decode(errors="replace"), f"the import took longer than {timeout_s:g} s"
        tried = None
        for line in text.splitlines():
            mark, _, rest = line.partition(" ")
            if mark == "?":
                tried = rest
            elif tried:
                answers[tried], tried = json.loads(rest), None
        dead = tried or next((name for name in left if name not in answers), None)
        if dead:  # go on behind it
            answers[dead] = {"error": end}
        left = [name for name in left if name not in answers]
    return answers


def check_imports() -> list[Result]:
    """Does each package import, is it the version that was installed, and from the place where it was installed?"""
    everything = pins("requirements-lesson.txt", "requirements.txt")
    present = {name: module for name, module in MODULES.items() if installed(name) is not None}
    answers = import_all([*present.values(), "common"])
    found = f"{len(answers)} packages, each from its place"
    return judge_imports(present, answers, everything) or [ok("imports", found)]


def judge_imports(present: dict[str, str], answers: dict[str, dict], pinned: dict[str, str]) -> list[Result]:
    """What is wrong with the answers of `import_all`, for the installed packages `present` (name → module)."""
    strays, broken = [], []  # the first are often the cause of the second
    for name, module in present.items():
        answer, version = answers[module], installed(name) or ""
        place = Path(str(metadata.distribution(name).locate_file(""))).resolve()
        if error := answer.get("error"):
            found = f"{module} does not import: {' '.join(error.split())[:200]}"
            advice = f"mend what is said above, or pip install --force-reinstall {name}=={pinned.get(name, version)}"
            if "torchvision::nms" in error:
                found = f"{found}: torch {installed('torch')} and torchvision {version} are not built for each other"
                both = " ".join(f"{name}=={pinned[name]}" for name in ("torch", "torchvision"))
                advice = f"pip install {both}, both from one index; until then lightning and transformers break too"
            broken.append(problem("imports", found, advice))
        elif not answer["file"] or not Path(answer["file"]).resolve().is_relative_to(place):
            where = answer["file"] or "a folder without __init__.py"
            found = f"{module} is loaded from {where}, in place of {name} {version} in {place}"
            strays.append(problem("imports", found, "rename it, or take its parent out of PYTHONPATH"))
        elif answer["version"] and release(answer["version"]) != release(version):
            found = f"{module} is loaded as {answer['version']}, but its metadata say {version}: two copies are mixed"
            strays.append(problem("imports", found, f"pip uninstall {name} until it is gone, then install it once"))
    common = answers["common"]
    if "error" in common:
        broken.append(problem("imports", f"common does not import: {common['error']}", "pip install -e ."))
    elif Path(common["file"] or "").resolve().parent != ROOT / "common":
        found = f"common is loaded from {common['file']}, not from this checkout"
        strays.append(problem("imports", found, "pip install -e . in the checkout that you work in"))
    return strays + broken


def check_shadows(root: Path = ROOT) -> list[Result]:
    """Files of the repository that would be imported in the place of a library with the same name."""
    names = {*MODULES.values(), *FRAMEWORKS}
    folders = [root, *(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))]
    found = []
    for folder in folders:
        for name in names:
            found += [p for p in (folder / f"{name}.py", folder / name / "__init__.py") if p.is_file()]
    if not found:
        return [ok("shadows", "nothing in the repository hides a library")]
    advice = "rename it; folders named like a library must not hold an __init__.py"
    return [problem("shadows", f"{path.relative_to(root)} hides a library", advice) for path in sorted(found)]


# ------------------------------------------------------------------------------------------------- torch and GPUs

TORCH_PROBE = """
import json, torch, torch.distributed as dist
cuda = torch.cuda.is_available()
gpus = range(torch.cuda.device_count() if cuda else 0)
print("\\n" + json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip,
    "gloo": dist.is_available() and dist.is_gloo_available(), "nccl": dist.is_available() and dist.is_nccl_available(),
    "nccl_version": ".".join(map(str, torch.cuda.nccl.version())) if cuda else "",
    "gpus": [torch.cuda.get_device_name(i) for i in gpus],
    "memory": [torch.cuda.get_device_properties(i).total_memory for i in gpus],
    "bf16": bool(cuda and torch.cuda.is_bf16_supported(including_emulation=False)),
    "sum": float(torch.ones(8, device="cuda" if cuda else "cpu").sum()),
}))
"""


def check_torch() -> list[Result]:
    """torch by itself, its backends, and its GPUs: used for a sum, not only counted."""
    if installed("torch") is None:
        return [problem("torch", "torch is not installed", INSTALL)]
    code, text = output([sys.executable, "-P", "-c", TORCH_PROBE], 300)
    if code:
        last = (text.splitlines() or ["it died without a word"])[-1]
        return [problem("torch", f"torch does not work: {last}", "read the results on packages and imports first")]
    answer = [line for line in text.splitlines() if line.startswith('{"version"')]  # a library may print after it
    if not answer:
        return [problem("torch", "torch gave no answer", "read the results on packages and imports first")]
    torch = json.loads(answer[-1])
    build = f"CUDA {torch['cuda']}" if torch["cuda"] else f"ROCm {torch['hip']}" if torch["hip"] else "no GPU support"
    backends = [name for name in ("gloo", "nccl") if torch[name]]
    found = f"torch {torch['version']}, built with {build}; backends: {', '.join(backends) or 'none'}"
    if not torch["gloo"]:
        return [problem("torch", found, "install the wheel of PyPI: this build cannot join ranks on the CPU")]
    smi_code, smi = output(["nvidia-smi"], 30)
    return [ok("torch", found), *judge_gpus(torch, smi if smi_code == 0 else None, dict(os.environ))]


def driver_of(smi: str) -> tuple[str, str]:
    """(driver, newest CUDA version that it runs) from what nvidia-smi prints, each "" where it is not said."""
    patterns = (r"Driver Version:\s*([\d.]+)", r"CUDA (?:\w+ )?Version:\s*([\d.]+)")
    return tuple((re.search(pattern, smi) or ["", ""])[1] for pattern in patterns)  # type: ignore[return-value]


def judge_gpus(torch: dict, smi: str | None, environment: dict[str, str]) -> list[Result]:
    """GPUs from what torch says of itself (`TORCH_PROBE`) and the text of nvidia-smi, None where it does not run.

    A newer CUDA major version than the driver's cannot run (https://docs.nvidia.com/deploy/cuda-compatibility/).
    """
    on_cpu = environment.get("DEVICE") == "cpu"
    driver, newest = driver_of(smi or "")
    about_driver = (
        f"driver {driver or 'unknown'} for CUDA up to {newest or 'unknown'}" if smi else "no NVIDIA driver answers"
    )
    if torch["gpus"]:
        kinds = sorted(set(zip(torch["gpus"], torch["memory"], strict=True)))
        names = ", ".join(f"{torch['gpus'].count(name)} × {name} ({memory / GIB:.0f} GiB)" for name, memory in kinds)
        found = f"{names}; {about_driver}; NCCL {torch['nccl_version']}; {'bf16' if torch['bf16'] else 'no bf16'}"
        if torch["sum"] != 8:
            return [problem("gpus", f"{found}; a sum of 8 ones gave {torch['sum']}", "have this GPU examined")]
        if not torch["bf16"]:
            return [warning("gpus", found, "use --train.precision fp16: these GPUs have no bf16 arithmetic")]
        if len(kinds) > 1:
            return [warning("gpus", found, "ranks wait for the slowest GPU; ask for equal ones")]
        return [ok("gpus", found)]

    from common.launch import allocated_gpus  # not above: an old Python shall be told that it is too old

    allocated = allocated_gpus(environment)
    shown = " ".join(f"{name}={value}" for name, value in allocated.items())
    if on_cpu or not (smi or allocated):
        said = f"; {shown} is ignored, for DEVICE=cpu" if allocated and on_cpu else ""
        return [ok("gpus", f"none used, everything runs on the CPU{said}; {about_driver}")]
    found = f"GPUs are allocated ({shown}) but torch can use none" if allocated else "torch can use no GPU"
    if smi and not torch["cuda"]:
        advice = f"this torch is built without CUDA: install one with CUDA {newest} or older, or set DEVICE=cpu"
    elif smi and newest and int(torch["cuda"].split(".")[0]) > int(newest.split(".")[0]):
        advice = f"torch wants CUDA {torch['cuda']}: update the driver, or install a torch for CUDA {newest}"
    elif smi:
        advice = "see nvidia-smi for errors; other users may hold the GPUs; or set DEVICE=cpu"
    else:
        advice = "look at nvidia-smi on this node (in a container: --gpus all, or --nv); or set DEVICE=cpu"
    return [problem("gpus", f"{found}; {about_driver}", advice)]


# -------------------------------------------------------------------------------------------- memory, cores, limits


def check_shared_memory(path: str = "/dev/shm") -> list[Result]:
    """Data loader workers and NCCL pass data through it; containers get 64 MB. NCCL's guide asks for 1 GB:
    https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting.html
    """
    if not os.path.isdir(path):
        return [ok("shared memory", f"{path} is not used on this system")]
    usage = shutil.disk_usage(path)
    found = f"{path} {usage.total / GIB:.1f} GiB, {usage.free / GIB:.1f} GiB free"
    if usage.free < 10**9:
        return [warning("shared memory", found, "docker run --ipc=host, or --shm-size=8g; remove files left there")]
    return [ok("shared memory", found)]


def check_limits() -> list[Result]:
    """What `ulimit` allows, as far as ranks need it."""

    def soft(name: str) -> float:
        value = resource.getrlimit(getattr(resource, name))[0] if hasattr(resource, name) else resource.RLIM_INFINITY
        return float("inf") if value == resource.RLIM_INFINITY else value

    files, processes, locked, stack = map(soft, ("RLIMIT_NOFILE", "RLIMIT_NPROC", "RLIMIT_MEMLOCK", "RLIMIT_STACK"))
    shown = f"files {files:g}, processes {processes:g}, locked memory {size(locked)}, stack {size(stack)}"
    low = []
    if files < 4096:
        low.append("ulimit -n 65536 (files: sockets of all ranks, tensors of data loader workers)")
    if processes < 4096:
        low.append("ulimit -u unlimited (processes: threads count too)")
    if locked < GIB and any(Path("/sys/class/infiniband").glob("*")):
        low.append("ulimit -l unlimited (locked memory: InfiniBand registers its buffers)")
    if GIB <= stack < float("inf"):
        low.append("ulimit -s 8192 (stack: every thread reserves as much)")
    return [warning("limits", shown, "; ".join(low))] if low else [ok("limits", shown)]


def size(value: float) -> str:
    """Bytes as a reader likes them."""
    return (
        "unlimited" if value == float("inf") else f"{value / GIB:.1f} GiB" if value >= GIB else f"{value / 2**20:g} MiB"
    )


def cgroup_value(controller: str, file_v1: str, file_v2: str) -> list[str]:
    """What this process's cgroup and those above it set, version 1 or 2; nothing where there is no such file."""
    values = []
    for line in read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, name = Path("/sys/fs/cgroup"), file_v2
        elif controller in controllers.split(","):
            base, name = Path("/sys/fs/cgroup") / controllers, file_v1
        else:
            continue
        folder = base / path.strip("/")
        for place in (folder, *folder.parents):  # a limit holds for all that is below
            values += filter(None, [read(place / name).strip()])
            if place == base:
                break
    return values


def affinity() -> list[int]:
    """The cores on which this process may run."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def cores() -> tuple[int, float]:
    """(how many cores this process may run on, cores' worth of time that its cgroup grants: inf without a limit)."""
    granted = [float("inf")]
    for value in cgroup_value("cpu", "cpu.cfs_quota_us", "cpu.max"):  # "max 100000"; version 1: the quota alone
        quota, _, period = value.partition(" ")
        if quota.isdigit():
            granted.append(int(quota) / int(period or 100_000))
    return len(affinity()), min(granted)


def check_cores(ranks: int | None = None) -> list[Result]:
    """Cores against ranks × threads: too many threads are slower than too few. `ranks`: how many share these cores."""
    ranks = ranks or count(os.environ.get("LOCAL_WORLD_SIZE")) or 1
    usable, granted = cores()
    limit = f", of which the cgroup grants {granted:g}" if granted < usable else ""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    found = f"{usable} of the machine's {os.cpu_count()} usable{limit}; OMP_NUM_THREADS={threads or '(not set: all)'}"
    if threads and count(threads) < 1:
        return [problem("cores", found, "set it to cores divided by ranks, 1 or more")]
    if ranks > 1:
        found = f"{found}, for each of {ranks} ranks"
    if ranks * (count(threads) or usable) > min(usable, granted) and (threads or ranks > 1):
        each = max(1, int(min(usable, granted) // ranks))
        return [warning("cores", found, f"OMP_NUM_THREADS={each}, or fewer ranks, or more cores (--cpus-per-task)")]
    return [ok("cores", found)]


def check_memory() -> list[Result]:
    """Memory that is free, also as the cgroup sees it."""
    import psutil

    limits = cgroup_value("memory", "memory.limit_in_bytes", "memory.max")
    total = psutil.virtual_memory().total
    limit = min([int(value) for value in limits if value.isdigit()] + [total])
    free = min(psutil.virtual_memory().available, limit)
    found = f"{size(free)} available of {size(total)}" + (f", cgroup limit {size(limit)}" if limit < total else "")
    if free < 2 * GIB * (count(os.environ.get("LOCAL_WORLD_SIZE")) or 1):
        advice = "2 GiB a rank is little: end other programs, start fewer ranks, or ask Slurm for more (--mem)"
        return [warning("memory", found, advice)]
    return [ok("memory", found)]


# ----------------------------------------------------------------------------------------------------- file systems


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


# ------------------------------------------------------------------------------------------------- Slurm and tokens


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
