"""The process from which the ranks of tests are forked: it has imported torch, and what the lessons import, once."""

import multiprocessing
import multiprocessing.forkserver
import os
from multiprocessing.context import ForkServerContext
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

# Imported by every lesson, or at the first use of what every lesson uses.
PRELOAD = [
    "torch", "torch._dynamo", "torch.distributed.nn", "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.pipelining",
    "torch.distributed.tensor.debug", "torch.distributed.elastic.multiprocessing.errors",
    "matplotlib.figure", "matplotlib.backends.backend_agg", "yaml", "jsonargparse", "tqdm", "sklearn.datasets",
    "common.run", "common.data", "common.transformer", "common.optimizer", "common.loss", "common.checkpoint",
    "common.data_sharding", "common.config", "common.flops", "common.network",
    "equality", "own_folder",
]  # fmt: skip
# Imported too, when tests of this folder are to run: slow imports that only their scripts need.
ROOM_PRELOAD = {
    "deepspeed": ["deepspeed", "lightning.pytorch", "lightning.fabric", "transformers.trainer",
                  "transformers.models.llama.modeling_llama", "deepspeed.checkpoint.ds_to_universal"],
    "lightning": ["lightning.pytorch", "lightning.fabric", "torch.utils.tensorboard"],
}  # fmt: skip
rooms: set[str] = set()  # the folders of the collected tests; conftest.py fills it


def context() -> ForkServerContext:
    """Return the context whose processes are forked from the server, which the first call starts."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when the server imports it
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([*PRELOAD, *(name for room in sorted(rooms) for name in ROOM_PRELOAD.get(room, []))])
    # Of the server, not of ours. DeepSpeed chooses its accelerator when it is imported.
    wanted = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, Path(__file__).parent))), "DS_ACCELERATOR": "cpu"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return server
