"""torch by itself, its backends and its GPUs; torch is imported in a process of its own."""

from __future__ import annotations  # so that an old Python gets as far as being told that it is too old

import json
import os
import re
import sys

from doctor_packages import INSTALL, installed
from doctor_results import GIB, Result, ok, output, problem, warning

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

    from common.launching.launch import allocated_gpus  # not above: an old Python shall be told that it is too old

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
