"""What every benchmark says with its numbers: medians and their spread, the machine, its other load, the command."""

import json
import os
import platform
import re
import shlex
import statistics
import time
from pathlib import Path
from typing import Any

import psutil

from common.ranks import Ranks, fail
from common.runs.run_folder import environment_record


def plural(count: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{count} {noun}{'s' * (count != 1)}"


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest of what the rounds gave."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles; of fewer than two values, the value itself."""
    several = len(values) > 1
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if several else values * 3
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_count() -> int:
    """GPUs on this machine."""
    import torch

    return torch.cuda.device_count()


def hardware(device: str) -> dict[str, Any]:
    """Processor, cores, memory and GPUs, not the machine's name; `device` as run.json calls it."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    if found := re.search(r"^model name\s*:\s*(.*)$", cpuinfo, re.MULTILINE):
        model = " ".join(found[1].split())
    memory = round(psutil.virtual_memory().total / 2**30, 1)
    about: dict[str, Any] = {"cpu": model, "cores": cores(), "memory_gib": memory}
    return about | ({} if "CPU" in device else {"gpu": device, "gpus": gpu_count()})


def describe_hardware(about: dict[str, Any]) -> str:
    """`hardware` as a reader likes it."""
    gpus = f"{about['gpus']} × {about['gpu']}, " if "gpu" in about else ""
    return f"{gpus}{about['cpu']}, {plural(about['cores'], 'core')}, {about['memory_gib']:.0f} GiB"


def processor_seconds() -> tuple[float, float, float]:
    """Seconds on the clock, busy ones of all this machine's cores, and ours of them, ended children included."""
    machine = psutil.cpu_times()
    busy = (getattr(machine, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
    return time.monotonic(), sum(busy), sum(os.times()[:4])


def other_load_note(seconds: float, busy: float, ours: float) -> str | None:
    """A warning where other programs were at work meanwhile: what is busy and not ours (5 % are forgiven)."""
    machine = os.cpu_count() or 1
    if busy - ours < 0.05 * machine * seconds:
        return None
    kept = f"other programs kept {(busy - ours) / seconds:.1f} of its {plural(machine, 'core')} busy meanwhile"
    return f"measured on a shared machine: {kept}"


def oversubscription_note(ranks: int, threads: int, cores: int, gpus: int) -> str | None:
    """A plain word where the ranks of one node outnumber its devices; gpus=0: they run on the CPU."""
    if gpus and ranks > gpus:
        return f"{ranks} ranks share {plural(gpus, 'GPU')}: this measures sharing, not scaling"
    if not gpus and ranks * threads > cores:
        who = plural(ranks, "rank") + (f" of {threads} threads" if threads > 1 else "")
        return f"{who} share {plural(cores, 'core')}: this measures sharing, not scaling"
    return None


def without_paths(words: list[str]) -> str:
    """A command line as others can use it: paths relative to here, those outside cut to their last part."""

    def shorten(word: str) -> str:
        name, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
        if not value.startswith("/"):
            return word
        path = Path(value)
        inside = path.is_relative_to(Path.cwd())
        return f"{name}{equals}{path.relative_to(Path.cwd()) if inside else path.name}"

    return shlex.join(map(shorten, words))


def since(before: tuple[float, float, float]) -> tuple[float, float, float]:
    """Return what `processor_seconds` counts, since it returned `before`."""
    seconds, busy, ours = (now - then for now, then in zip(processor_seconds(), before, strict=True))
    return seconds, busy, ours


def date() -> str:
    """Return the date and time in UTC, as results state it."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())


def git_commit() -> str | None:
    """Return the commit of this checkout, as run.json states it."""
    return environment_record("torch")["git_commit"]


def launched(ranks: Ranks, script: str, arguments: list[str]) -> str:
    """Return the command line that started `script` on the ranks of one node, for others to repeat."""
    torchrun = ["torchrun", f"--nproc-per-node={ranks.local_world_size}"]
    return without_paths([*(["python"] if ranks.launcher == "python" else torchrun), script, *arguments])


def measured_on(result: dict[str, Any]) -> str:
    """Return the machine, the versions, the commit and the date of a result, for the lines under its table."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{describe_hardware(result['hardware'])}; {versions}; commit {result['git_commit']}; {result['date']}"


def write_json(result: dict[str, Any], path: Path, option: str) -> None:
    """Write a result to the file that `option` names.

    Raises:
        SystemExit: (exit code 2) the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        fail(f"{option} {path}: {error.strerror}; choose a file you can write")
