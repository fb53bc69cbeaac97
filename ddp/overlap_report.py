"""What communication_overlap.py measured, as a table and as a picture."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def print_report(results: list[dict[str, Any]], where: str, detailed: str) -> None:
    """The table of all settings, and one setting bucket by bucket."""
    sizes = [bucket["bytes"] for bucket in results[0]["buckets"]]
    print(f"{where}; {sum(sizes) // 4:,} parameters in fp32; {len(results[0]['step_ms'])} steps of each, in turns\n")
    columns = "{:31}{:>8}{:>9}{:>7}{:>12}{:>14}{:>24}{:>10}"
    print(
        columns.format("", "buckets", "messages", "MB", "MB held in", "all-reducing", "ms a step: median", "gradient")
    )
    print(columns.format("", "", "", "sent", "gradients", "in backward", "(middle half)", "off by"))
    for row in results:
        low, median, high = quartiles(row["step_ms"])
        print(
            columns.format(
                row["setting"],
                len(row["buckets"]),
                len(row["message_bytes"]),
                f"{sum(row['message_bytes']) / 1e6:.2f}",
                f"{row['gradient_memory_bytes'] / 1e6:.2f}",
                f"{row['share_inside_backward']:.0%}",
                f"{median:.1f} ({low:.1f} to {high:.1f})",
                f"{row['relative_gradient_error']:.0e}",
            )
        )
    print("PowerSGD makes up later for what it leaves out: one step is far off, the mean of many less and less.")

    row = next(row for row in results if row["setting"] == detailed)
    times = row["median_step"]["all_reduces"]
    print(f"\n{detailed}, in the order of sending; ms since backward began, in the median step of rank 0")
    print(f"{'bucket':>6}{'MB':>7}{'full':>8}{'averaged':>10}  {'meanwhile, backward computes':30}gradients of")
    for number, (bucket, (full, averaged)) in enumerate(zip(row["buckets"], times, strict=True)):
        # Backward fills bucket j from the moment when bucket j - 1 is full.
        later = [j for j in range(number + 1, len(times)) if times[j - 1][0] < averaged]
        busy = first_and_last(module for j in later for module in modules(row["buckets"][j]["parameters"]))
        members = first_and_last(modules(bucket["parameters"]))
        print(
            f"{number:>6}{bucket['bytes'] / 1e6:>7.2f}{full:>8.1f}{averaged:>10.1f}  "
            f"{busy or 'nothing: it is over':30}{members}"
        )
    before, after = (statistics.median(result["step_ms"]) for result in (results[0], row))
    print(f"\nall-reduces after backward: {before:.1f} ms a step; beside it, in the same buckets: {after:.1f} ms")


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def modules(parameters: list[str]) -> list[str]:
    """`blocks.3.ffn.down.weight` → `blocks.3`; `head.weight` → `head`."""
    return [".".join(name.split(".")[: 2 if name.startswith("blocks.") else 1]) for name in parameters]


def first_and_last(names: Iterable[str]) -> str:
    unique = list(dict.fromkeys(names))
    return " … ".join(dict.fromkeys([unique[0], unique[-1]])) if unique else ""


def draw_timeline(results: list[dict[str, Any]], where: str, path: Path) -> None:
    """Draw the median step of each setting: backward on one row, under it a lane for each bucket."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # without pyplot: no window system is touched

    heights = [2 + len(row["buckets"]) for row in results]
    figure = Figure(figsize=(9, 1 + sum(heights) / 4), dpi=120, layout="constrained")
    panels = figure.subplots(len(results), 1, sharex=True, height_ratios=heights)
    for panel, row in zip(panels, results, strict=True):
        step, lanes = row["median_step"], len(row["buckets"])
        panel.barh(0, step["compute_end"], height=1.4, color="0.45")
        panel.text(step["compute_end"] / 2, 0, "backward", ha="center", va="center", color="white", fontsize=8)
        waits = step["end"] - step["compute_end"]
        panel.barh(0, waits, left=step["compute_end"], height=1.4, color="white", edgecolor="0.45", hatch="////")
        for lane, (full, averaged) in enumerate(step["all_reduces"]):
            megabytes = row["buckets"][lane]["bytes"] / 1e6
            panel.text(averaged, 1.3 + lane, f" {megabytes:.2f} MB", va="center", fontsize=7)
            color = colormaps["viridis"](0.85 * lane / max(1, lanes - 1))
            panel.barh(1.3 + lane, averaged - full, left=full, height=0.8, color=color)
        panel.axvline(step["compute_end"], color="0.45", linewidth=0.8, linestyle=":")
        panel.set_ylim(lanes + 1.2, -0.9)
        panel.set_xlim(0, 1.08 * max(other["median_step"]["end"] for other in results))
        panel.set_yticks([0, 1.3 + (lanes - 1) / 2], ["compute", f"{lanes} bucket{'s' if lanes > 1 else ''}"])
        panel.set_title(
            f"{row['setting']}: {row['share_inside_backward']:.0%} of all-reducing inside backward",
            loc="left",
            fontsize=9,
        )
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("milliseconds since backward began; hatched: nothing left to compute, gradients on their way")
    figure.suptitle(f"DDP: what overlaps with what ({where}, median step of rank 0)", fontsize=11)
    figure.savefig(path)
