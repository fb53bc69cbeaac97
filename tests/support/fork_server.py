"""The process from which the ranks of tests are forked: it has imported torch, and what the lessons import, once."""

import multiprocessing
import multiprocessing.forkserver
import os
from multiprocessing.context import BaseContext
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

# Imported by every lesson, or at the first use of what every lesson uses.
PRELOAD = [
    "torch", "torch._dynamo", "torch.distributed.nn", "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.pipelining",
    "torch.distributed.tensor.debug", "torch.distributed.elastic.multiprocessing.errors",
    "matplotlib.figure", "matplotlib.backends.backend_agg", "yaml", "tqdm", "sklearn.datasets",
    "common.run", "common.data", "common.transformer", "common.optimizer", "common.loss", "common.checkpoint",
    "common.data_sharding", "common.config", "common.flops", "common.launching.network",
    "equality", "own_folder",
]  # fmt: skip
# Imported too for the tests of a folder: slow imports that only its scripts need.
FOLDER_PRELOAD = {
    "deepspeed": ["deepspeed", "lightning.pytorch", "lightning.fabric", "transformers.trainer",
                  "transformers.models.llama.modeling_llama", "deepspeed.checkpoint.ds_to_universal"],
    "lightning": ["lightning.pytorch", "lightning.fabric"],
    "docs": ["deepspeed", "lightning.pytorch"],  # the exercises of all lessons
}  # fmt: skip
_wanted: list[str] = []  # of these, for the folder whose tests run now


def prepare_for(folder: str) -> None:
    """Let ranks of this folder's tests find imported what their scripts need; ends a server that has other imports."""
    wanted = FOLDER_PRELOAD.get(folder, [])
    if wanted != _wanted:
        _wanted[:] = wanted
        multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]  # private, and the only way
        if wanted:
            context()  # before anything else in this process starts a server without them


def context() -> BaseContext:
    """Return the context whose processes are forked from the server, which the first call starts.

    Where pytest itself was forked from a process with torch (tools/mutants.py), ranks are forked from pytest.
    """
    if os.environ.get("RANKS_FROM_PYTEST"):
        return multiprocessing.get_context("fork")
    os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when the server imports it
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([*PRELOAD, *_wanted])
    # Of the server, not of ours. DeepSpeed chooses its accelerator when it is imported.
    variables = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, Path(__file__).parent))), "DS_ACCELERATOR": "cpu"}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return server
