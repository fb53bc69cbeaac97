"""What only GPUs can show: every stage under NCCL, offload that copies, fused AdamW, and fp16."""

import json
import math

import pytest
import torch
from launching import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: none is visible here"),
]
ON_GPUS = {"DEVICE": "", "DS_ACCELERATOR": "cuda"}


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train(launch, tmp_path, *options):
    """Train on all GPUs; returns the training rows of the run."""
    gpus = torch.cuda.device_count()
    given = ["--batch.global_size", str(24 * gpus), "--run_name", "gpu", *options]
    launch("deepspeed/train.py", *given, nproc=gpus, env=ON_GPUS)
    run = tmp_path / "runs" / "gpu"
    assert json.loads((run / "run.json").read_text())["world_size"] == gpus
    return [row for row in rows(run) if "loss" in row]


@pytest.mark.parametrize(("config", "precision"), [
    *((f"zero{stage}", "fp32") for stage in range(4)), *((f"zero{stage}", "bf16") for stage in (1, 2, 3)),
    ("zero2_cpu_offload_pinned_memory", "bf16"), ("zero3_cpu_offload", "bf16"),
])  # fmt: skip
def test_every_stage_trains(launch, tmp_path, config, precision):
    """Some steps, and some more from the checkpoint."""
    options = ["--deepspeed_config", f"deepspeed/configs/{config}.json", "--train.precision", precision]
    train(launch, tmp_path, *options, "--train.steps", "20")
    found = train(launch, tmp_path, *options, "--train.steps", "30")
    assert [row["step"] for row in found] == list(range(30))
    assert found[-1]["loss"] < found[0]["loss"] - 1


@pytest.mark.parametrize("config", ["zero1", "zero2", "zero3"])
def test_fp16_with_an_overflow(launch, tmp_path, config):
    """A loss scale of 2^32 is no number in fp16: DeepSpeed leaves such steps out, and halves it until gradients fit."""
    settings = json.loads((ROOT / "deepspeed" / "configs" / f"{config}.json").read_text())
    settings["fp16"] |= {"initial_scale_power": 32, "hysteresis": 1}
    (tmp_path / "fp16.json").write_text(json.dumps(settings))
    options = ["--deepspeed_config", tmp_path / "fp16.json", "--train.precision", "fp16", "--train.steps", "50"]
    found = train(launch, tmp_path, *options)
    assert len(found) == 50
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], abs=0.1)  # the first step changed nothing
    assert found[-1]["loss"] < found[0]["loss"] - 1
    assert math.isfinite(found[-1]["grad_norm"])
