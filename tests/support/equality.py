"""Reading what a run left behind, to compare it with another run."""

import json
import os
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

# A wrong gradient shows in the first two steps; twenty are for drift (`make test-all`).
STEPS = 20 if os.environ.get("TESTS") == "all" else 4

# A transformer run that takes a second; what is proved does not depend on the width. 25 validation samples divide
# among no number of ranks used in the tests: a padded evaluation would differ.
SMALL = ["--model.width", "32", "--model.ffn_width", "48", "--model.layers", "2", "--data.sequence_length", "16",
         "--data.validation_samples", "25", "--optimizer.warmup_steps", "3"]  # fmt: skip


def read_rows(run: Path) -> list[dict]:
    """The training rows of a run's metrics.jsonl, in order."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def read_validation(run: Path) -> dict[int, float]:
    """Validation losses of a run by the number of steps done."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}


def read_checkpoint(run: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name: weights (`model.…`) and optimizer state (`optimizer.state.…`)."""
    folder = run / "checkpoints" / f"step_{step}"
    shards = folder / json.loads((folder / "manifest.json").read_text())["shards"]
    entries = dcp.FileSystemReader(shards).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if hasattr(entry, "properties")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no process group here is no surprise
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(shards), no_dist=True)
    return tensors


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], prefix: str = "") -> float:
    """The largest absolute difference between tensors of equal names; both must have the same names."""
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    names = [name for name in a if name.startswith(prefix) and a[name].is_floating_point()]
    assert names, f"no tensor called {prefix}…"
    return max((a[name].double() - b[name].double()).abs().max().item() for name in names)


def assert_same_rows(one: Path, many: Path, tolerance: float) -> None:
    """The same steps, tokens and learning rates; losses, gradient norms and validation losses within the tolerance."""
    for a, b in zip(read_rows(one), read_rows(many), strict=True):
        assert (a["step"], a["tokens"], a["lr"]) == (b["step"], b["tokens"], b["lr"])
        assert abs(a["loss"] - b["loss"]) <= tolerance, (a, b)
        # Norms are of order 10 where losses are of order 1.
        assert abs(a["grad_norm"] - b["grad_norm"]) <= 10 * tolerance, (a, b)
    assert read_validation(one).keys() == read_validation(many).keys()
    for step, value in read_validation(one).items():
        assert abs(value - read_validation(many)[step]) <= tolerance


def assert_same_training(one: Path, many: Path) -> None:
    """For fp64: everything within 1e-12, AdamW's averages of all gradients too, parameter by parameter."""
    assert_same_rows(one, many, 1e-12)
    last = len(read_rows(one))
    a, b = read_checkpoint(one, last), read_checkpoint(many, last)
    assert largest_difference(a, b, "model.") <= 1e-12
    assert largest_difference(a, b, "optimizer.") <= 1e-12


def assert_same_first_gradients(one: Path, many: Path, count: int) -> None:
    """For one fp32 step without clipping, of `count` parameters.

    AdamW's exp_avg is then 0.1 times the gradient: a factor of 2 hides from AdamW, not here.
    """
    a, b = (
        {name: tensor / 0.1 for name, tensor in read_checkpoint(run, 1).items() if name.endswith("exp_avg")}
        for run in (one, many)
    )
    assert len(a) == count
    assert largest_difference(a, b) <= 1e-5


def assert_trains_in_low_precision(one: Path, low: Path, tolerance: float = 3e-2) -> None:
    """Beside an fp32 run: losses are close, not equal; 3e-2 is some seven bf16 roundings (2^-8) of a loss of 5.6."""
    rows = read_rows(low)
    differences = [abs(a["loss"] - b["loss"]) for a, b in zip(read_rows(one), rows, strict=False)]
    assert differences[0] < tolerance
    # Two fp32 trainings agree to 1e-5.
    assert max(differences) > 2e-5, "as close as this, it computes in fp32"
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    weights = read_checkpoint(low, len(rows))
    assert all(tensor.dtype == torch.float32 for name, tensor in weights.items() if name.startswith("model."))
