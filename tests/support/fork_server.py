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
    "matplotlib.figure", "matplotlib.backends.backend_agg", "yaml", "tqdm", "sklearn.datasets",
    "common.run", "common.data", "common.transformer", "common.optimizer", "common.loss", "common.checkpoint",
    "common.data_sharding", "common.config", "common.flops", "common.network",
    "equality", "own_folder",
]  # fmt: skip


def context() -> ForkServerContext:
    """Return the context whose processes are forked from the server, which the first call starts."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when the server imports it
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOAD)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, Path(__file__).parent)))  # of the server, not of ours
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return server
