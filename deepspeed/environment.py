"""What has to be said before DeepSpeed starts: which accelerator, and that nothing is compiled unless asked for.

DeepSpeed picks its accelerator when it is imported, and compiles C++ extensions when something first needs one: minutes
on one core, and a build that was killed leaves a lock that later ones wait for. Import `deepspeed` from here.
"""

import os
import sys
from importlib import metadata
from pathlib import Path

import torch

from common.ranks import fail

try:
    metadata.version("deepspeed")  # `import deepspeed` alone would find this folder where the package is missing
except metadata.PackageNotFoundError:
    fail("this lesson needs the package deepspeed; install the core environment: make venv, or pip install deepspeed")

# With CUDA there, DeepSpeed takes it even where DEVICE=cpu asks for processes on the CPU.
if os.environ.get("DEVICE") == "cpu" or not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# Extensions are built, and loaded, by ninja. Another version of it on the PATH would compile all anew, for minutes.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"

import deepspeed

deepspeed.utils.logger.setLevel("WARNING")  # else some fifty lines on what was found and chosen, from every rank

# An extension that makes all-reduce on one machine faster; built at the first start, it takes half a minute. Private
# to DeepSpeed 0.19, hence in this one place. DEEPSPEED_SHM=1 leaves it on.
if os.environ.get("DEEPSPEED_SHM") != "1":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

__all__ = ["deepspeed"]
