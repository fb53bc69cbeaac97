"""Evaluate what a run has learned: its last checkpoint, on its validation set, in one process.

    python slurm/evaluate.py runs/NAME                 # validation loss, perplexity; writes runs/NAME/evaluation.json
    sbatch slurm/evaluate.sbatch runs/NAME

Model, data, seed, precision and batch come from the run's own config.yaml. The run may be of any script that trains the
transformer on text, on any number of ranks: the checkpoint is resharded to this one process, and the loss is the one
that the run reported.
"""

import json
import math
import sys
import warnings
from pathlib import Path

import torch

from common import checkpoint
from common.config import read_run_config
from common.data import text_datasets
from common.data_sharding import evaluation_batches
from common.loss import count_valid
from common.ranks import fail, single_process
from common.runs import manifest
from common.transformer import Transformer


@torch.no_grad()
def main(folder: Path) -> None:
    if not (folder / "config.yaml").is_file():
        fail(f"{folder} holds no config.yaml; expected the folder of a run; give one of runs/")
    try:
        config = read_run_config(folder)
    except ValueError as error:
        fail(f"{error}; evaluate.py evaluates no other runs; the run's own results are in {folder}/metrics.jsonl")
    saved = manifest.latest(folder / "checkpoints")
    if saved is None:
        fail(f"{folder} holds no finished checkpoint; expected checkpoints/step_N; let the training save one first")
    ranks = single_process()

    _, validation_set = text_datasets(config.data, config.model.vocabulary)
    model = Transformer(config.model, config.seed).to(ranks.device)
    if config.train.precision == "fp64":
        model.double()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process needs no group
    steps = checkpoint.load(saved, model, None, ranks)["step"]

    low_precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.train.precision)
    loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
    count = torch.zeros((), dtype=torch.int64, device=ranks.device)
    with torch.autocast(ranks.device.type, dtype=low_precision, enabled=low_precision is not None):
        for tokens, targets in evaluation_batches(validation_set, config.batch.micro_size or 8, ranks.device):
            loss_sum += model(tokens, targets)
            count += count_valid(targets)
    loss = loss_sum.item() / count.item()

    unit = "byte" if config.data.source == "text" else "token"  # the embedded corpus and text files are read as bytes
    result = {
        "checkpoint": saved.name,
        "steps": steps,
        "val_loss": loss,
        f"bits_per_{unit}": loss / math.log(2),
        f"perplexity_per_{unit}": math.exp(loss),
        "tokens": int(count),
    }
    (folder / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{folder.name} after {steps} steps: validation loss {loss:.4f}, {loss / math.log(2):.4f} bits per {unit}, "
        f"perplexity {math.exp(loss):.2f} per {unit}, over {int(count):,} {unit}s"
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        fail(f"found {len(sys.argv) - 1} arguments; expected one run folder: python slurm/evaluate.py runs/NAME")
    main(Path(sys.argv[1]))
