"""What offload to NVMe needs: DeepSpeed's extension async_io, compiled once.

    python deepspeed/nvme.py             # builds it, 7 to 15 minutes of one core; afterwards it is there for all runs

DeepSpeed itself would compile at the first start of a training, for minutes without a word, or wait for a build that
somebody else has begun. Here what is missing is one line.
"""

import fcntl
import os
import shutil
import time
from pathlib import Path

import torch
from environment import deepspeed
from torch.utils import cpp_extension

from common.ranks import Ranks, fail, single_process


def main() -> None:
    """Compile async_io; a second time it is only loaded."""
    single_process("cpu")
    if problem := locked(folder()) or cannot_build():
        fail(problem)
    start = time.perf_counter()
    deepspeed.ops.op_builder.AsyncIOBuilder().load(verbose=False)
    print(f"async_io: ready in {folder()} after {time.perf_counter() - start:.1f} s")


def nvme_problem(ranks: Ranks) -> str:
    """What is missing for offload to NVMe, in one line; empty if nothing is. Collective.

    One rank looks: ranks that tried the lock at the same time would see each other.
    """
    return ranks.broadcast(missing() if ranks.is_main else "")


def missing() -> str:
    """What is missing on this node."""
    if problem := locked(folder()):
        return problem
    if not cpp_extension.is_ninja_available():
        return "ninja is missing, with which DeepSpeed loads its extension async_io; install it: pip install ninja"
    if not (folder() / "async_io.so").is_file():
        if problem := cannot_build():
            return problem
        once = "python deepspeed/nvme.py"
        return f"the extension async_io is not built; build it once, 7 to 15 minutes of one core: {once}"
    return ""


def folder() -> Path:
    """Where torch builds the extension, and finds it."""
    return Path(cpp_extension._get_build_directory("async_io", verbose=False))


def cannot_build() -> str:
    """What a build of async_io would lack: a compiler, or the headers of libaio."""
    if not (shutil.which("c++") or os.environ.get("CXX")):
        return "no C++ compiler (c++) for DeepSpeed's extension async_io; install g++, or load your site's module"
    if torch.cuda.is_available() and cpp_extension.CUDA_HOME is None:  # DeepSpeed would raise a TypeError
        found = f"no CUDA toolkit (nvcc {torch.version.cuda}), with which DeepSpeed compiles async_io for GPUs"
        return f"{found}; load your site's module, or set CUDA_HOME; DS_SKIP_CUDA_CHECK=1 takes another minor version"
    if not deepspeed.ops.op_builder.AsyncIOBuilder().is_compatible(verbose=False):
        where = "CFLAGS and LDFLAGS may say where it is"
        return (
            f"libaio with its headers is missing for the extension async_io; install libaio-dev (libaio-devel); {where}"
        )
    return ""


def locked(folder: Path) -> str:
    """Whether the lock of a build stands in the way. Without this a rank would wait in silence while it is there."""
    lock = folder / "lock"
    if not lock.exists():
        return ""
    if not hasattr(cpp_extension, "FileLock"):  # an older torch: what counts is that the file is there
        return f"{lock}: the lock of a build that is going on, or was killed; if no ninja is running, remove that file"
    with lock.open("a") as file:  # since 2.15 the kernel holds the lock, and frees it when the builder dies
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return f"{lock} is held: another process is building this extension now; wait for it, or end it"
    return ""


if __name__ == "__main__":
    main()
