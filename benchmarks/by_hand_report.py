"""The result of benchmarks/by_hand.py as a table and as a plot."""

from pathlib import Path
from typing import Any

from report import describe_hardware, measured_on, plural  # beside this file


def spread(value: dict[str, float], form: str, factor: float = 1.0) -> str:
    """Median (quartiles)."""
    middle, low, high = (format(value[key] * factor, form) for key in ("median", "lower_quartile", "upper_quartile"))
    return f"{middle} ({low} – {high})"


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    lines = [
        f"by hand against the libraries: {result['world_size']} ranks on {plural(result['hosts'], 'host')}, Gloo, "
        f"network: {result['network']}",
        "",
        "| comparison | case | contestant | collectives a step | CPU, ms | step, ms "
        "| time / the first one's | hidden, % |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for one in result["comparisons"]:
        for number, row in enumerate(one["rows"]):
            cells = (
                one["comparison"],
                one["case"],
                row["contestant"],
                "–" if row["collectives_per_step"] is None else f"{row['collectives_per_step']:g}",
                f"{row['step_cpu_seconds']['median'] * 1e3:,.2f}",
                spread(row["step_seconds"], ",.2f", 1e3),
                spread(row["ratio"], ".2f") if number else "1",
                spread(row["hidden"], ".0f", 100) if "hidden" in row else "",
            )
            lines.append(f"| {' | '.join(cells)} |")
    steps = dict.fromkeys(
        f"{one['comparison']} {one['case'].split(':')[0]} {one['turns']} × {one['steps_per_turn']}"
        for one in result["comparisons"]
    )
    lines += [
        "",
        "- median (quartiles) over all turns; ratios and shares are taken within each turn; CPU: processor time of a "
        "rank, Gloo's threads included",
        f"- turns × steps a turn: {', '.join(steps)}; {plural(result['threads'], 'thread')} a rank; "
        "all contestants of a comparison ended with the same parameters",
        f"- {measured_on(result)}",
        *(f"- {note}" for note in result["notes"]),
        f"- `{result['command']}`",
    ]
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Ratios, the ring by message size, and the hidden share, of several networks, into a PNG."""
    from matplotlib.figure import Figure  # without pyplot: no window system is touched

    figure = Figure(figsize=(13, 5.2), dpi=130, layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.45, 1, 1])
    colors = [f"C{number}" for number in range(len(results))]

    def bars(value: dict[str, float], factor: float = 1.0) -> tuple[float, list[list[float]]]:
        low, at, high = (value[key] * factor for key in ("lower_quartile", "median", "upper_quartile"))
        return at, [[at - low], [high - at]]

    names: list[str] = []
    for place, (result, color) in enumerate(zip(results, colors, strict=True)):
        shift = 0.22 * (place - (len(results) - 1) / 2)
        left.plot([], [], "o", color=color, label=result["network"])
        ring = [one for one in result["comparisons"] if one["comparison"] == "ring"]
        for one in result["comparisons"]:
            for row in one["rows"][1:]:
                if one["comparison"] in ("ddp", "naive", "fsdp"):
                    label = f"{row['contestant']} / {one['rows'][0]['contestant']}\n{one['case'].split(':')[0]}"
                    if label not in names:
                        names.append(label)
                    at, error = bars(row["ratio"])
                    left.errorbar(at, names.index(label) + shift, xerr=error, fmt="o", color=color, capsize=3)
        if ring:
            sizes = [one["bytes"] for one in ring]
            ratios = [bars(one["rows"][1]["ratio"]) for one in ring]
            errors = [[error[side][0] for _, error in ratios] for side in (0, 1)]
            middle.errorbar(sizes, [at for at, _ in ratios], yerr=errors, fmt="o-", color=color, capsize=3)
        shares = [(row, one) for one in result["comparisons"] for row in one["rows"] if "hidden" in row]
        for number, (row, _) in enumerate(shares):
            at, error = bars(row["hidden"], 100)
            style = {"color": color, "capsize": 4, "width": 0.2, "alpha": 0.75}
            right.bar(number + shift, at, yerr=error, **style)
        if shares:
            right.set_xticks(range(len(shares)), [row["contestant"] for row, _ in shares])
    left.axvline(1, color="0.4", linestyle="--")
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.invert_yaxis()
    left.set(xscale="log", xlabel="time / the other's (below 1: faster)", title="A step")
    left.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    left.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if value in (0.3, 0.5, 0.7, 2, 3, 5) else "")
    left.legend(fontsize=8, title="network", title_fontsize=8)
    middle.axhline(1, color="0.4", linestyle="--")
    middle.set(xscale="log", xlabel="bytes", ylabel="time / dist.all_reduce's", title="The ring by hand")
    middle.set_ylim(0)
    right.set(ylabel="%", title="Communication hidden")
    right.axhline(100, color="0.4", linestyle="--")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    first = results[0]
    where = f"{first['world_size']} ranks on {plural(first['hosts'], 'host')}, Gloo; median and quartiles over turns"
    figure.suptitle(f"{where}\n{describe_hardware(first['hardware'])}; {first['date'][:10]}", fontsize=10)
    figure.savefig(path, format="png")
