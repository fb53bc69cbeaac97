"""Run finetune.py once for a row of compare_stages.py, and watch the memory of its processes from outside."""

import argparse
import contextlib
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from common.ranks import fail
from common.runs import records

SCRIPT = Path(__file__).with_name("finetune.py")
SECONDS_BETWEEN_SAMPLES = 0.25


def measure(row: dict[str, Any], name: str, options: argparse.Namespace, nodes: int, arguments: list[str]) -> dict:
    """Run `finetune.py` once. Returns loss, samples per second and memory in bytes; None for what nobody could see."""
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node={{ranks}}"
    template = options.launch or torchrun
    launch = shlex.split(template.replace("{ranks}", str(options.ranks)).replace("{nodes}", str(nodes)))
    few = ["--data.validation_samples", "4", "--data.answer_length", "4", "--train.log_every", "1", "--export", "false"]
    ours = ["--train.steps", str(options.steps), "--runs_dir", str(options.output), "--run_name", name]
    config = ["--deepspeed_config", row["config"]] if row["config"] else []
    command = [*launch, str(SCRIPT), *few, *arguments, *config, *ours]
    folder, gpus = options.output / name, gpu_reader()
    host, device = [], []
    with open(options.output / f"{name}.log", "w") as log:
        process = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            while process.poll() is None:
                if (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size:
                    host.append(resident_bytes(process))  # from the end of the first step on
                    device.append(gpus())
                time.sleep(SECONDS_BETWEEN_SAMPLES)
        finally:
            end(process)
    if process.returncode:
        lines = [line for line in (options.output / f"{name}.log").read_text().splitlines() if "error: " in line]
        fail(f"{name} ended with {process.returncode}: {lines[0] if lines else 'see'} ({options.output}/{name}.log)")
    trained, record = [r for r in records.read_rows(folder) if "loss" in r], records.read_record(folder)
    host, device = [value for value in host if value], [value for value in device if value]
    on_gpu = "CPU" not in record["device"]
    return {
        "loss_at_first": trained[0]["loss"],
        "loss_at_last": trained[-1]["loss"],
        "samples_per_second": statistics.median(r["samples_per_second"] for r in trained[1:]),
        "gpu_peak_bytes": max(record["peak_memory_bytes"]) if on_gpu else None,  # as torch allocated, on one rank
        "gpu_average_bytes": statistics.fmean(device) if on_gpu and device else None,  # as the driver says
        "cpu_peak_bytes": max(host) if host else None,
        "cpu_average_bytes": statistics.fmean(host) if host else None,
        "device": record["device"],
    }


def resident_bytes(process: psutil.Process) -> int:
    """Resident memory of all that the launcher has started on this machine; shared pages count in each."""
    total = 0
    with contextlib.suppress(psutil.Error):
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has just ended
                total += child.memory_info().rss
    return total


def gpu_reader() -> Any:
    """A function that says how many bytes are in use on the fullest GPU of this machine; 0 where there is none."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except Exception:  # no package, or no driver: finetune.py's own record has the peak
        return lambda: 0
    return lambda: max((pynvml.nvmlDeviceGetMemoryInfo(handle).used for handle in handles), default=0)


def end(process: psutil.Popen) -> None:
    """Leave no rank behind when we are interrupted."""
    if process.poll() is None:
        family = [*process.children(recursive=True), process]
        for member in family:
            with contextlib.suppress(psutil.Error):
                member.terminate()
        psutil.wait_procs(family, timeout=20)
