"""Compare runs in a small table, from what each left in its folder: the last link of a chain of jobs.

    python slurm/report.py runs/a runs/b        # or runs/sweep-123-*; the lowest validation loss first

The validation loss is that of evaluation.json (slurm/evaluate.py) where there is one, else the run's own last.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import NoReturn

from common.runs import records


def fail(message: str) -> NoReturn:
    """One line on stderr, exit code 2. (That of common/ranks.py would load torch, for a table.)"""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read(folder: Path) -> list[str | float | None]:
    """The cells of one run, in the order of COLUMNS. Raises SystemExit (exit code 2) if it is no run with steps."""
    try:
        record, rows = records.read_record(folder), records.read_rows(folder)
    except ValueError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{folder}: {error.filename} cannot be read ({error.strerror}); give folders of runs that have begun")
    steps = [row for row in rows if "loss" in row]
    if not steps:
        fail(f"{folder} has no steps yet; wait until the run has trained")
    evaluated = folder / "evaluation.json"
    validation = [row["val_loss"] for row in rows if "val_loss" in row]
    if evaluated.is_file():
        validation.append(json.loads(evaluated.read_text())["val_loss"])
    rate = statistics.median(row[f"{record['unit']}_per_second"] for row in steps[1:] or steps)  # the first warms up
    peak = max(row["peak_memory_bytes"] for row in steps) / 2**30
    ends = [steps[0]["loss"], steps[-1]["loss"], validation[-1] if validation else None]
    return [folder.name, record["world_size"], record["launcher"], len(steps), *ends, f"{rate:,.0f}", f"{peak:.2f}"]


COLUMNS = ["run", "ranks", "launcher", "steps", "first loss", "last loss", "val loss", "tokens/s", "peak GiB"]


if __name__ == "__main__":
    if not sys.argv[1:]:
        fail("no run given; expected one or more folders: python slurm/report.py runs/NAME …")
    runs = sorted((read(Path(name)) for name in sys.argv[1:]), key=lambda cells: cells[6] or float("inf"))
    table = [COLUMNS, *([f"{c:.4f}" if isinstance(c, float) else str(c or "-") for c in cells] for cells in runs)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        print(cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)), sep="  ")
