"""The end of a run: run.json, the curve, and the summary."""

import shlex
import sys
from typing import TYPE_CHECKING

from common.runs import metrics, records, run_folder

if TYPE_CHECKING:
    from common.run import Run


def write_end(
    run: "Run", file: metrics.MetricsFile | None, peaks: list[int], problem: str | None, evaluated: bool
) -> None:
    """Complete run.json, draw the curve and print the summary. Rank 0 alone calls it.

    Args:
        file: the run's rows.
        peaks: bytes of memory by rank.
        problem: what could not be written before.
        evaluated: this attempt has evaluated.

    Raises:
        ValueError: in one line, what could not be written.
    """
    assert file is not None
    rows, validation = file.rows, file.validation
    rate = metrics.median_rate(rows, run.unit, run.first_step)
    flops_per_rank = rate * run.flops_per_unit / run.ranks.world_size if rate and run.flops_per_unit else None
    run.record |= {
        "status": "finished" if run.is_complete else "stopped",
        "steps_done": run.steps_done,
        "ended": run_folder.now(),
        "peak_memory_bytes": peaks,
    }
    if rate is not None:
        run.record |= {
            f"{run.unit}_per_second": rate,
            "model_flops_per_second_per_rank": flops_per_rank,
            "mfu": run.mfu(rate),
        }
    try:
        records.write_record(run.folder, run.record)
        if rows:
            metrics.plot_loss(rows, validation, run.folder / "loss.png")
    except OSError as error:
        problem = problem or f"{run.folder}: run.json and loss.png cannot be written: {error.strerror}"
    done = f"{run.steps_done} of {run.config.train.steps} steps"
    if problem:
        raise ValueError(f"{problem}; {done} are done, and what was committed in checkpoints/ is whole")
    if run.steps_done == run.first_step and not evaluated:
        print(f"\nnothing to do: {done} were done already; run folder {run.folder}")
        return
    print(_summary(run, rows, validation, rate or 0.0, max(peaks)), flush=True)


def _summary(run: "Run", rows: list[metrics.Row], validation: dict[int, float], rate: float, peak: int) -> str:
    steps, size, status = run.config.train.steps, run.ranks.world_size, run.record["status"]
    val_loss = f"{validation[max(validation)]:.4f}" if validation else "not evaluated"
    loss = f"{rows[0]['loss']:.4f} at first, {rows[-1]['loss']:.4f} at last" if rows else "its rows are lost"
    lines = [
        f"\n{status} after {run.steps_done} of {steps} steps",
        f"  loss             {loss}",
        f"  validation loss  {val_loss}",
        f"  speed            {rate:,.0f} {run.unit}/s (median)",
        f"  peak memory      {peak / 2**30:.2f} GiB on one rank",
        f"  run folder       {run.folder} (metrics.jsonl, loss.png, checkpoints/)",
    ]
    if run.config.resume != "never":  # which config.yaml holds, and which would refuse
        again = ["torchrun", f"--nproc-per-node={size}"] if size > 1 else ["python"]
        again += [sys.argv[0], "--config", f"{run.folder}/config.yaml", "--run_name", run.folder.name]
        again += ["--train.steps", str(2 * steps)] if status == "finished" else []
        lines.append(f"  to go on         {shlex.join(again)}")
    return "\n".join(lines)
