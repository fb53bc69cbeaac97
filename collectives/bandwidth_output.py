"""The table and the plot of bandwidth.py."""

from pathlib import Path
from typing import Any

from bandwidth_operations import RUN

from common.ranks import Ranks, fail

HEADER = f"{'group':13}{'collective':15}{'bytes':>14}{'time, µs':>12}{'(least – greatest)':>24}{'algbw':>9}{'busbw':>9}"


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    middle, low, high = (row["seconds"][key] * 1e6 for key in ("median", "min", "max"))
    spread = f"({low:,.1f} – {high:,.1f})"
    bandwidths = f"{row['algorithm_gbytes_per_second']:9.3f}{row['bus_gbytes_per_second']:9.3f}"
    return f"{row['group']:13}{row['collective']:15}{row['bytes']:>14,}{middle:>12,.1f}{spread:>24}{bandwidths}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Time and bus bandwidth over message size, a line for each collective; dashed: within nodes."""
    from matplotlib.figure import Figure  # without pyplot: no window system is touched
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(11, 4.6), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = {name: f"C{index}" for index, name in enumerate(RUN)}
    names = list(dict.fromkeys((row["group"], row["collective"]) for row in result["rows"]))
    for group, collective in names:
        rows = [row for row in result["rows"] if (row["group"], row["collective"]) == (group, collective)]
        sizes, seconds = [row["bytes"] for row in rows], [row["seconds"] for row in rows]
        style = {"color": colors[collective], "linestyle": "-" if group == "all ranks" else "--"}
        left.plot(sizes, [s["median"] * 1e6 for s in seconds], "o", markersize=4, **style)
        left.fill_between(
            sizes,
            [s["min"] * 1e6 for s in seconds],
            [s["max"] * 1e6 for s in seconds],
            color=colors[collective],
            alpha=0.15,
        )
        right.plot(sizes, [row["bus_gbytes_per_second"] for row in rows], "o", markersize=4, **style)
    copy = result["memory_copy"]["together_gbytes_per_second"]
    right.axhline(copy, color="0.3", linestyle=":")
    sizes = sorted({row["bytes"] for row in result["rows"]})
    right.annotate("memory copy, all ranks at once", (sizes[0], copy), (0, 3), textcoords="offset points", fontsize=8)
    left.set(ylabel="µs", title="Time of one operation, slowest rank (band: least to greatest)")
    right.set(ylabel="GB/s", title="Bus bandwidth")
    for panel in (left, right):
        panel.set(xscale="log", yscale="log", xlabel="bytes")
        panel.grid(alpha=0.3)
    handles = [Line2D([], [], color=colors[c], label=c) for c in dict.fromkeys(c for _, c in names)]
    if len({group for group, _ in names}) > 1:
        handles += [
            Line2D([], [], color="0.3", linestyle=s, label=g) for s, g in (("-", "all ranks"), ("--", "within nodes"))
        ]
    left.legend(handles=handles, fontsize=8)
    figure.suptitle(
        f"{result['world_size']} ranks on {len(result['hosts'])} host(s), {result['backend']}, {result['dtype']}"
    )
    figure.savefig(path, format="png")


def check_outputs(ranks: Ranks, **files: str | None) -> None:
    """Find out now, not after the measurement, whether the files can be written.

    Args:
        files: by the option that names it; None: the option was not given.

    Raises:
        SystemExit: (exit code 2, on all ranks) a file cannot be written.
    """
    problem = None
    for key, name in files.items():
        if name and ranks.is_main:
            try:
                open(name, "a").close()
            except OSError as error:
                problem = f"{key} = {name}: {error.strerror}; give a file in a folder that exists and can be written to"
    if problem := ranks.broadcast(problem):
        fail(str(problem))
