"""The table of compare_stages.py."""

import json
import statistics
from pathlib import Path
from typing import Any

from common.ranks import fail


def read_results(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text())
        assert results["runs"]
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        fail(f"--table {path}: not a results.json of this script ({error})")
    return results


def print_table(results: dict[str, Any], path: Path | None = None) -> None:
    """A Markdown table: a row for each run, the medians over its rounds."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        runs.setdefault(run["run"], []).append(run)
    lines = [
        "| run | differs from | by | loss, first → last | samples/s | GPU GiB: peak / mean | CPU GiB: peak / mean |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rounds in runs.items():

        def median(key: str, rounds: list[dict[str, Any]] = rounds) -> float | None:
            found = [run[key] for run in rounds if run[key] is not None]
            return statistics.median(found) if found else None

        def gib(kind: str, median: Any = median) -> str:
            values = (median(f"{kind}_peak_bytes"), median(f"{kind}_average_bytes"))
            return " / ".join("–" if value is None else f"{value / 2**30:.2f}" for value in values)

        first = rounds[0]
        lines.append(
            f"| `{name}` | {first['differs_from'] or '–'} | {first['by']} | {median('loss_at_first'):.4f} → "
            f"{median('loss_at_last'):.4f} | {median('samples_per_second'):.1f} | {gib('gpu')} | {gib('cpu')} |"
        )
    everyone = results["runs"]
    spread = max(
        max(run[key] for run in everyone) - min(run[key] for run in everyone)
        for key in ("loss_at_first", "loss_at_last")
    )
    device, rounds = everyone[0]["device"], max(run["round"] for run in everyone)
    lines += [
        "",
        f"{results['ranks']} ranks on {results['nodes']} node(s), {device}; {rounds} round(s), "
        f"{results['started'][:10]}. Losses of all rows within {spread:.1e} of each other.",
    ]
    print("\n".join(["", *lines]))
    if path:
        path.write_text("\n".join(lines) + "\n")
