"""What only GPUs can show: NCCL, one rank per GPU, and a loop that never waits for the device."""

import json

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: none is visible here"),
]

WATCH = """
import runpy, torch
from common.run import Run
log = Run.log
def watched(self, step, *rest):
    # From the third step on, any call that makes the host wait for the device is an error, until the last step.
    torch.cuda.set_sync_debug_mode("error" if 2 <= step < self.config.train.steps - 2 else "default")
    log(self, step, *rest)
Run.log = watched
runpy.run_path("ddp/train.py", run_name="__main__")
"""


def test_nccl_trains_on_every_gpu(launch, tmp_path):
    gpus = torch.cuda.device_count()
    arguments = ["--train.steps", "30", "--train.precision", "bf16", "--batch.global_size", str(24 * gpus)]
    launch("ddp/train.py", *arguments, "--run_name", "gpu", nproc=gpus, env={"DEVICE": ""})
    rows = [json.loads(line) for line in (tmp_path / "runs" / "gpu" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 1
    assert json.loads((tmp_path / "runs" / "gpu" / "run.json").read_text())["world_size"] == gpus


def test_no_host_sync_in_the_loop(launch, tmp_path):
    (tmp_path / "watched.py").write_text(WATCH)
    launch(tmp_path / "watched.py", "--train.steps", "12", nproc=1, env={"DEVICE": ""})
