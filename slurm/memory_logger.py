"""The memory of a job, host and GPUs, logged beside it: one process a host, one CSV a host.

    python slurm/memory_logger.py --output runs/memory-job123 --pid $$ &      # in a shell that then trains
    srun --overlap --ntasks-per-node=1 python slurm/memory_logger.py --output runs/memory-$SLURM_JOB_ID &
    python slurm/memory_logger.py summary runs/memory-job123 --plot memory.png

It ends on SIGTERM, SIGINT and SIGHUP, when the process of `--pid` has gone, and when its own parent has (the shell,
or Slurm's step): it never outlives the job. Then it prints peak, average and mode of what was used.

    host   memory in use on the whole machine, and how busy its cores are
    job    resident memory of the processes of this Slurm job (those with its SLURM_JOB_ID in their environment), or,
           outside Slurm, of all processes of this user; the logger is left out, and pages that several processes
           share count once for each of them
    gpuN   memory in use on GPU N as nvidia-smi numbers them, what the driver reserves included, and how busy it is;
           only GPUs that CUDA_VISIBLE_DEVICES shows; needs the package nvidia-ml-py
"""

import argparse
import contextlib
import csv
import datetime
import os
import signal
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import psutil

BIN_BYTES = 64 * 2**20  # the mode counts how often used memory was in the same 64 MiB: exact bytes hardly ever recur
TICK_SECONDS = 0.2  # how often it looks whether it is time to end
FIRST_COLUMNS = ["time", "seconds", "host_used_bytes", "host_available_bytes", "host_busy_percent", "job_used_bytes"]

Sample = dict[str, float]  # by column; without those that had no value


def fail(message: str) -> NoReturn:
    """One line on stderr, exit code 2. (That of common/ranks.py would load torch on every host, for a logger.)"""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)


# ------------------------------------------------------------------------------------------------ measuring


def job_bytes(job: str | None) -> int:
    """Resident memory of the processes of Slurm job `job`, or of this user where there is none, without our own."""
    total = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it ended meanwhile, or is not ours to look into
            ours = process.pid != os.getpid() and process.uids().real == os.getuid()
            if ours and (job is None or process.environ().get("SLURM_JOB_ID") == job):
                total += process.memory_info().rss
    return total


def visible_gpus(variable: str | None, uuids: list[str]) -> dict[str, str]:
    """The GPUs that CUDA shows this job: their names here (`gpu3`) and UUIDs, in CUDA's order.

    CUDA takes indices and UUIDs, which may be cut short, and stops at the first that fits no single GPU:
    https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/environment-variables.html

    Args:
        variable: the value of CUDA_VISIBLE_DEVICES; None, where it is not set, shows all.
        uuids: of all GPUs that the driver shows, in the order of nvidia-smi.
    """
    if variable is None:
        return {f"gpu{index}": uuid for index, uuid in enumerate(uuids)}
    found: dict[str, str] = {}
    for entry in (word.strip() for word in variable.split(",")):
        matches = [
            i for i, uuid in enumerate(uuids) if entry == str(i) or (entry[:4] == "GPU-" and uuid.startswith(entry))
        ]
        if entry.startswith("MIG-"):  # a slice of a GPU has a UUID of its own
            found[f"mig{len(found)}"] = entry
        elif len(matches) == 1:
            found[f"gpu{matches[0]}"] = uuids[matches[0]]
        else:
            break
    return found


def gpu_readers() -> dict[str, Callable[[], list[int | str]]]:
    """For each visible GPU a function that reads memory in use, in bytes, and utilisation, in percent."""
    driver = Path("/proc/driver/nvidia/version").exists()
    try:
        import pynvml
    except ImportError:
        if driver:
            print("memory_logger: no GPU is logged: nvidia-ml-py is missing; pip install nvidia-ml-py", file=sys.stderr)
        return {}
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        uuids = [pynvml.nvmlDeviceGetUUID(handle) for handle in handles]
        visible = visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), uuids)
        opened = {name: pynvml.nvmlDeviceGetHandleByUUID(uuid) for name, uuid in visible.items()}
    except pynvml.NVMLError as error:
        if driver:
            print(f"memory_logger: no GPU is logged: NVML says {error}; check nvidia-smi", file=sys.stderr)
        return {}

    def read(handle: Any) -> list[int | str]:
        values: list[int | str] = ["", ""]
        with contextlib.suppress(pynvml.NVMLError):  # NVML knows no utilisation of a MIG slice; a GPU can be lost
            values[0] = pynvml.nvmlDeviceGetMemoryInfo(handle).used
            values[1] = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
        return values

    return {name: lambda handle=handle: read(handle) for name, handle in opened.items()}


def is_running(process: psutil.Process) -> bool:
    """Whether it is still there; a process that has ended and waits for its parent to ask why is not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def open_file(folder: Path, host: str) -> Any:
    """A new CSV for this host: a job that is started again does not write over what it logged before."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        try:
            return open(folder / (f"{host}.csv" if number == 1 else f"{host}-{number}.csv"), "x", buffering=1)
        except FileExistsError:
            number += 1


def log(folder: Path, host: str, interval: float, pid: int | None) -> Path:
    """Write a sample every `interval` seconds until it is time to end. Returns the file.

    Raises:
        SystemExit: (exit code 2) the folder cannot be written to.
    """
    signals: list[int] = []
    parent = os.getppid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda caught, _: signals.append(caught))
    try:
        watched = psutil.Process(pid) if pid else None
    except psutil.NoSuchProcess:
        fail(f"--pid {pid}: there is no such process; give the one whose end is the job's")
    job, gpus = os.environ.get("SLURM_JOB_ID"), gpu_readers()
    psutil.cpu_percent()  # the first call begins to count
    try:
        with open_file(folder, host) as file:
            write = csv.writer(file, lineterminator="\n").writerow  # one system call a line: a kill tears none
            write(FIRST_COLUMNS + [f"{gpu}_{what}" for gpu in gpus for what in ("used_bytes", "busy_percent")])
            start = due = time.monotonic()
            while not signals and os.getppid() == parent and (watched is None or is_running(watched)):
                if (now := time.monotonic()) >= due:
                    memory, busy = psutil.virtual_memory(), psutil.cpu_percent() if due > start else ""
                    moment = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
                    row = [moment, f"{now - start:.3f}", memory.used, memory.available, busy, job_bytes(job)]
                    write(row + [value for read in gpus.values() for value in read()])
                    due = max(due + interval, now)
                time.sleep(max(0.0, min(TICK_SECONDS, due - time.monotonic())))
            return Path(file.name)
    except OSError as error:
        fail(f"--output {folder}: {error.strerror}; choose a folder you can write to")


# ---------------------------------------------------------------------------------------------- summarising


def read_samples(path: Path) -> list[Sample]:
    """The samples of one CSV; `time` as seconds since 1970. A last line that a kill cut short is left out.

    Raises:
        SystemExit: (exit code 2) not a file of ours, or one without any sample.
    """
    try:
        header, *rows = csv.reader(path.read_text().splitlines())  # an empty file: ValueError
    except (ValueError, csv.Error, OSError):
        header, rows = [], []
    if header[: len(FIRST_COLUMNS)] != FIRST_COLUMNS:
        fail(f"{path} is not a CSV of this logger; expected the columns {', '.join(FIRST_COLUMNS)} …")
    if rows and len(rows[-1]) < len(header):
        rows.pop()
    if not rows:
        fail(f"{path} holds no samples; the logger was stopped as soon as it had begun")
    samples = []
    for number, row in enumerate(rows, start=2):
        try:
            moment = datetime.datetime.fromisoformat(row[0]).timestamp()
            samples.append({"time": moment} | {n: float(v) for n, v in zip(header[1:], row[1:], strict=True) if v})
        except ValueError:
            fail(f"{path}, line {number}: found {','.join(row)!r:.80}; expected {len(header)} values of this logger")
    return samples


def mode(values: list[float]) -> float:
    """The middle one of the values in the 64 MiB-wide bin that holds most of them; of two such bins the higher."""
    counts = Counter(value // BIN_BYTES for value in values)
    fullest = max(counts, key=lambda number: (counts[number], number))
    return statistics.median_low(value for value in values if value // BIN_BYTES == fullest)


def summarise(samples: list[Sample]) -> dict[str, dict[str, float]]:
    """By device (host, job, gpu0 …): peak, average and mode of used bytes, and average utilisation in percent."""
    summary = {}
    columns = dict.fromkeys(column for sample in samples for column in sample)
    for device in [column.removesuffix("_used_bytes") for column in columns if column.endswith("_used_bytes")]:
        used, busy = (
            [sample[column] for sample in samples if column in sample]
            for column in (f"{device}_used_bytes", f"{device}_busy_percent")
        )
        summary[device] = {"peak": max(used), "average": statistics.fmean(used), "mode": mode(used)}
        if busy:
            summary[device]["busy_percent"] = statistics.fmean(busy)
    return summary


def table(hosts: dict[str, list[Sample]]) -> str:
    """Every host and device in a line, in GiB, and how long each host was watched."""
    width = max(map(len, [*hosts, "host"]))
    lines = [f"{'host':{width}}  {'device':6}{'peak GiB':>10}{'average':>10}{'mode':>10}{'busy %':>8}"]
    for host, samples in hosts.items():
        for device, of in summarise(samples).items():
            memory = "".join(f"{of[what] / 2**30:10.3f}" for what in ("peak", "average", "mode"))
            busy = f"{of['busy_percent']:8.0f}" if "busy_percent" in of else ""
            lines.append(f"{host:{width}}  {device:6}{memory}{busy}")
    for host, samples in hosts.items():
        lines.append(f"{host}: {len(samples)} samples in {samples[-1]['seconds'] - samples[0]['seconds']:.1f} s")
    return "\n".join([*lines, f"mode: the middle of those values that lie in the most frequent {BIN_BYTES >> 20} MiB"])


def plot(hosts: dict[str, list[Sample]], path: Path) -> None:
    """Used memory over time: a panel each for hosts, jobs and GPUs, in each a line per host and device."""
    from matplotlib.figure import Figure  # without pyplot: no window system is touched

    titles = {"host": "in use on the host", "job": "resident memory of the job's processes", "gpu": "in use on GPUs"}
    devices = {host: list(summarise(samples)) for host, samples in hosts.items()}
    kinds = ["host", "job"] + ["gpu"] * any(len(names) > 2 for names in devices.values())
    figure = Figure(figsize=(9, 2.6 * len(kinds)), dpi=120, layout="constrained")
    start = min(samples[0]["time"] for samples in hosts.values())
    for panel, kind in zip(figure.subplots(len(kinds), 1, sharex=True), kinds, strict=True):
        for host, samples in hosts.items():
            for device in (d for d in devices[host] if (d if d in titles else "gpu") == kind):
                column = f"{device}_used_bytes"
                points = [(s["time"] - start, s[column] / 2**30) for s in samples if column in s]
                label = f"{host} {device}" if kind == "gpu" else host
                panel.plot(*zip(*points, strict=True), ".-", markersize=3, linewidth=1, label=label)
        panel.set_title(titles[kind], loc="left", fontsize=10)
        panel.set_ylabel("GiB")
        panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    panel.set_xlabel("seconds since the first host's first sample")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:  # ValueError: a file type that matplotlib does not know
        fail(f"--plot {path}: {error}; give a .png in a folder you can write to")


def summary_command(arguments: list[str]) -> None:
    """`summary FOLDER [--plot FILE]`: all hosts of a folder."""
    parser = argparse.ArgumentParser("memory_logger.py summary", description="What the CSVs of all hosts say.")
    parser.error = fail  # type: ignore[method-assign]
    parser.add_argument("folder", type=Path, help="what --output was")
    parser.add_argument("--plot", type=Path, help="also draw memory over time to this PNG")
    options = parser.parse_args(arguments)
    files = sorted(options.folder.glob("*.csv"))
    if not files:
        fail(f"no CSV files in {options.folder}; give the folder that was the logger's --output")
    hosts = {file.stem: read_samples(file) for file in files}
    print(table(hosts))
    if options.plot:
        plot(hosts, options.plot)
        print(f"plot: {options.plot}")


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["summary"]:
        return summary_command(arguments[1:])
    parser = argparse.ArgumentParser(
        "memory_logger.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = fail  # type: ignore[method-assign]
    parser.add_argument("--output", type=Path, required=True, help="folder for <host>.csv, the same on all hosts")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two samples (default: 1)")
    parser.add_argument("--pid", type=int, help="also end when this process has gone")
    parser.add_argument("--host", default=socket.gethostname(), help=argparse.SUPPRESS)  # to play several hosts
    options = parser.parse_args(arguments)
    if not options.interval > 0:
        fail(f"--interval {options.interval:g} cannot work; allowed: more than 0 seconds")
    file = log(options.output, options.host, options.interval, options.pid)
    try:
        print(f"{table({file.stem: read_samples(file)})}\n{file}", flush=True)
    except BrokenPipeError:  # whoever read our output went with the job
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main(sys.argv[1:])
