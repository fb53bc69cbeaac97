"""Run every GPU path that this machine can show, in about six minutes, and print a verdict: `make gpu-check`.

    python tools/gpu_check.py                               # needs one or more NVIDIA GPUs
    python tools/gpu_check.py --list                        # the checks and their commands
    python tools/gpu_check.py --only speed ring             # those whose names hold one of these words
    python tools/gpu_check.py --device cpu --only one_fsdp  # the same commands on the CPU: it tests this tool alone

In three groups: `speed_…`, alone on the first GPU, because its figures count; `one_…`, every lesson as one process,
several at a time; `ranks_…`, several ranks over NCCL. With fewer GPUs than ranks the ranks share them, which NCCL 2.30
and newer can do (NCCL_MULTI_RANK_GPU_ENABLE=1). Outputs stay in the folder that the last lines name, with result.json.
"""

import argparse
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import processes
import readme_commands
from docs_markdown import ROOT
from gpu_check_list import CHECKS, Check


@dataclass(frozen=True)
class Row:
    """What became of a check. `status`: ok, failed, too slow, or left out; `note` says why."""

    name: str
    status: str
    seconds: float = 0.0
    note: str = ""
    rate: float | None = None  # tokens, or images, per second
    mfu: float | None = None
    peak_gib: float | None = None


def why_left_out(check: Check, gpus: int, memory_gb: float, nccl: tuple[int, ...], on_gpus: bool) -> str:
    """Why the check cannot run on this machine; empty if it can."""
    if not on_gpus:
        return "needs a GPU" if check.only_on_gpus else ""
    if not check.memory_gb <= memory_gb < check.below_gb:
        return f"for GPUs of {check.memory_gb:g} to {check.below_gb:g} GB, found {memory_gb:.0f}"
    if check.ranks > gpus and nccl < (2, 30):
        found = ".".join(map(str, nccl))
        return f"{check.ranks} ranks on {gpus} GPU(s) need NCCL 2.30, found {found}"
    return ""


def run(check: Check, gpus: int, device: str, folder: Path) -> Row:
    """Run a check; its output goes to `folder`/NAME.log, its run folder below `folder`/NAME."""
    environment = readme_commands.environment(folder / check.name) | {"DEVICE": device, "NCCL_DEBUG": "WARN"}
    if device == "cuda" and check.ranks > gpus:
        environment |= {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "2"}
    if device == "cuda" and check.name.startswith("speed"):
        environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    finished = processes.run(check.words, check.timeout_s, ROOT, environment)
    (folder / f"{check.name}.log").write_text(finished.output)
    return judge(check, finished, folder / check.name)


def judge(check: Check, finished: processes.Finished, runs: Path) -> Row:
    """The row of a check that has ended, with the figures of its run folder if it wrote one."""
    if finished.exit_code is None:
        return Row(check.name, "too slow", finished.seconds, f"stopped after {check.timeout_s:g} s: it hangs, or waits")
    if finished.exit_code:
        return Row(check.name, "failed", finished.seconds, cause(finished.output))
    found: dict[str, Any] = {}
    for file in sorted(runs.rglob("run.json")):
        found = json.loads(file.read_text())
    rate = found.get("tokens_per_second") or found.get("images_per_second") or found.get("samples_per_second")
    peaks = found.get("peak_memory_bytes") or [None]
    peak = max(peaks) / 2**30 if peaks[0] is not None else None
    return Row(check.name, "ok", finished.seconds, "", rate, found.get("mfu"), peak)


def cause(output: str) -> str:
    """The line of an output that says most: the project's own error, else the last that names one, else the last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    own = [line for line in lines if re.match(r"(\[rank \d+\] )?error: ", line)]
    named = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line)]
    return (own[:1] or named[-1:] or lines[-1:])[0][:200]


def verdict(rows: Iterable[Row], seconds: float) -> tuple[str, int]:
    """A table of the rows with one line below it, and the exit code: 1 if a check failed, or none ran."""
    rows = list(rows)
    lines = [f"{'check':32} {'':8} {'time':>6} {'rate/s':>10} {'MFU':>6} {'peak GiB':>8}"]
    for row in rows:
        shown = f"{row.rate or 0:>10,.0f} {row.mfu or 0:>6.1%} {row.peak_gib or 0:>8.2f}" if row.rate else " " * 26
        lines.append(f"{row.name:32} {row.status:8} {row.seconds:>4.0f} s {shown}  {row.note}".rstrip())
    ran = [row for row in rows if row.status != "left out"]
    bad = [row.name for row in ran if row.status != "ok"]
    lines.append(
        f"GPU check: {len(ran) - len(bad)} of {len(ran)} passed, {len(rows) - len(ran)} left out; {seconds:.0f} s"
    )
    if bad:
        lines[-1] += f"; failed: {', '.join(bad)}"
    return "\n".join(lines), 1 if bad or not ran else 0


def chosen(words: list[str]) -> list[Check]:
    """The checks whose names hold one of the words; all without words."""
    return [check for check in CHECKS if not words or any(word in check.name for word in words)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="checks whose names hold one of these")
    parser.add_argument("--list", action="store_true", help="print the checks and their commands, and run none")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to test this tool (default cuda)"
    )
    parser.add_argument(
        "--at_once", type=int, help="checks that run side by side (default: one for two cores, 8 at most)"
    )
    parser.add_argument("--output", type=Path, help="the folder for logs and result.json (default: below runs/)")
    options = parser.parse_args()
    checks = chosen(options.only)
    if options.list or not checks:
        print("\n".join(f"{check.name:32} {shlex.join(['python', *check.words[1:]])}" for check in checks))
        if not checks:
            print(f"error: no check's name holds {' or '.join(options.only)}; see --list", file=sys.stderr)
        return 0 if checks else 2
    import torch

    gpus, memory_gb, nccl, name = 0, 0.0, (0, 0), "CPU"
    if options.device == "cuda":
        if not torch.cuda.is_available():
            print(
                "error: CUDA finds no GPU here; run this on a machine with one (about its driver: make doctor)",
                file=sys.stderr,
            )
            return 2
        gpus, name, nccl = torch.cuda.device_count(), torch.cuda.get_device_name(0), torch.cuda.nccl.version()
        memory_gb = torch.cuda.get_device_properties(0).total_memory / 1e9
    when = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    folder = (options.output or Path(os.environ.get("RUNS_DIR") or ROOT / "runs") / f"gpu-check-{when}").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{gpus} × {name}, torch {torch.__version__}, NCCL {'.'.join(map(str, nccl))}; logs: {folder}", flush=True)

    start, rows = time.monotonic(), []
    at_once = options.at_once or max(1, min(8, (os.cpu_count() or 2) // 2))

    def one(check: Check) -> Row:
        if reason := why_left_out(check, gpus, memory_gb, nccl, options.device == "cuda"):
            return Row(check.name, "left out", note=reason)
        row = run(check, gpus, options.device, folder)
        print(f"{row.status:8} {row.name} {row.note}".rstrip(), flush=True)
        return row

    for group, side_by_side in (("speed", 1), ("one", at_once), ("ranks", max(1, at_once // 2))):
        with ThreadPoolExecutor(side_by_side) as pool:
            rows += pool.map(one, [check for check in checks if check.name.startswith(f"{group}_")])
    text, code = verdict(rows, time.monotonic() - start)
    record = {"device": name, "gpus": gpus, "torch": torch.__version__, "nccl": nccl, "date": when}
    (folder / "result.json").write_text(json.dumps(record | {"checks": [asdict(row) for row in rows]}, indent=1))
    for log in folder.glob("speed_facts.log"):
        print(log.read_text().strip())
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
