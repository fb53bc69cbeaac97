"""The result of benchmarks/scaling.py as a Markdown page and as a plot."""

from pathlib import Path
from typing import Any

from report import describe_hardware, measured_on, plural  # beside this file
from scaling_arithmetic import MODES


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown page: what was measured, on what, the table, and what to know about it."""
    unit, many = result["unit"], result["repeats"] > 1
    base = result["rows"][0]["ranks"]

    def ranged(value: dict[str, float], form: str, factor: float = 1.0) -> str:
        middle, low, high = (format(value[key] * factor, form) for key in ("median", "min", "max"))
        return f"{middle} ({low} – {high})" if many and low != high else middle

    title, stays = MODES[result["mode"]]
    grows = result["mode"] == "model"
    large, factor = large_flops(result) if grows else ("", 1.0)
    work = f"parameters | parameters / ranks | {large} a step / ranks" if grows else f"{unit} a step"
    rate = f"{large}/s a rank" if grows else f"{unit}/s"
    columns = f"| ranks | {work} | step, ms | {rate} | speed-up (ideal) | efficiency, % | memory, GiB | last loss |"
    lines = [f"{result['script']}: {title} ({stays})", "", columns, "|" + "---:|" * (columns.count("|") - 1)]
    for row in result["rows"]:
        ranks = row["ranks"]
        done: tuple[str, ...] = (f"{row['units_per_step']:,}",)
        if grows:
            done = f"{row['parameters']:,}", f"{row['parameters'] / ranks:,.0f}"
            done += (f"{row['flops_per_step'] * factor / ranks:,.2f}",)
        cells = (
            str(ranks) + ("*" if row["shared"] else ""),
            *done,
            ranged(row["step_seconds"], ",.1f", 1e3),
            ranged(row["flops_per_second_per_rank"], ",.1f", factor)
            if grows
            else ranged(row["units_per_second"], ",.0f"),
            f"{row['speed_up']['median']:.2f} ({row['ranks'] / base:g})",
            ranged(row["efficiency"], ".0f", 100),
            f"{max(row['peak_memory_bytes']) / 2**30:.2f}",
            f"{row['last_loss']:.4f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    rounds = f"median of {result['repeats']} interleaved rounds (least – greatest)" if many else "one round"
    lines += [
        "",
        f"- {rounds}; {result['steps']} steps a run, the first {result['warmup_steps']} not counted; "
        f"OMP_NUM_THREADS={result['omp_num_threads']} for every rank count; memory: {result['memory']}",
        f"- speed-up = {result['formulas']['speed_up']}; efficiency = {result['formulas']['efficiency']}; "
        "T: median time of a step" + ("; W: FLOPs of a step, from run.json" if grows else ""),
        *([naive_efficiency_note(result["rows"])] if grows else []),
        f"- {measured_on(result)}",
        *(f"- {'* ' if 'measures sharing' in note else ''}{note}" for note in result["notes"]),
        f"- `{result['command']}`",
    ]
    return "\n".join(lines)


def large_flops(result: dict[str, Any]) -> tuple[str, float]:
    """The unit in which FLOPs are easy to read, and the factor to it: by what a rank computes in a second."""
    tera = result["rows"][0]["flops_per_second_per_rank"]["median"] >= 1e12
    return ("TFLOP", 1e-12) if tera else ("GFLOP", 1e-9)


def naive_efficiency_note(rows: list[dict[str, Any]]) -> str:
    """The line on what T(B) / T(N) would make of a model's growth, and by what factor that is wrong."""
    base, first = rows[0]["ranks"], rows[0]["flops_per_step"]
    said = []
    for row in rows[1:]:
        share = row["flops_per_step"] / first * base / row["ranks"]
        naive, right = row["time_ratio"]["median"], row["efficiency"]["median"]
        said.append(
            f"{naive:.1%} on {plural(row['ranks'], 'rank')}, where each has {share:.3f} of the FLOPs: {right:.1%}"
        )
    return (
        f"- not T({base}) / T(N), which leaves out how much the model grew: {'; '.join(said) or 'one rank count only'}"
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """Throughput beside the ideal line, and efficiency, into a PNG; shaded where ranks share devices."""
    from matplotlib.figure import Figure  # without pyplot: no window system is touched

    rows, unit = result["rows"], result["unit"]
    ranks = [row["ranks"] for row in rows]
    figure = Figure(figsize=(10, 4.2), dpi=140, layout="constrained")
    left, right = figure.subplots(1, 2)

    def draw(axes: Any, key: str, factor: float) -> None:
        middle = [row[key]["median"] * factor for row in rows]
        below = [m - row[key]["min"] * factor for m, row in zip(middle, rows, strict=True)]
        above = [row[key]["max"] * factor - m for m, row in zip(middle, rows, strict=True)]
        style = {"fmt": "o-", "color": "#1f6fb4", "capsize": 4, "label": "measured", "zorder": 3}
        axes.errorbar(ranks, middle, yerr=[below, above], **style)

    grows = result["mode"] == "model"
    large, factor = large_flops(result) if grows else (unit, 1.0)
    rate = "flops_per_second" if grows else "units_per_second"
    first = rows[0][rate]["median"] * factor
    ideal = [first * count / ranks[0] for count in ranks]
    draw(left, rate, factor)
    left.plot(ranks, ideal, "--", color="0.45", label="ideal", zorder=2)
    left.set(ylabel=f"{large} per second", title="Arithmetic of all ranks" if grows else "Throughput")
    left.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    draw(right, "efficiency", 100.0)
    if grows:  # beside the right figure the one that forgets the model's growth
        naive = [row["time_ratio"]["median"] * 100 for row in rows]
        crosses = right.plot(ranks, naive, "x", color="#b03a2e", label=f"T({ranks[0]}) / T(N), wrong here", zorder=4)
    right.axhline(100, linestyle="--", color="0.45", label="ideal", zorder=2)
    right.set(ylabel="efficiency, %", title="Efficiency")
    for row in rows:
        value = row["efficiency"]["median"] * 100
        right.annotate(
            f"{value:.0f} %",
            (row["ranks"], row["efficiency"]["min"] * 100),
            (0, -9),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=9,
            bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.85},
        )
    highest = max(row["efficiency"]["max"] for row in rows)
    right.set_ylim(0, 100 * max(1.1, highest + 0.05))

    many = ranks[-1] / ranks[0] > 8
    shared = [row["ranks"] for row in rows if row["shared"]]
    for axes in (left, right):
        if many:
            axes.set_xscale("log", base=2)
        room = 0.06 * (ranks[-1] - ranks[0]) or 0.5
        axes.set_xlim(*((ranks[0] / 1.2, ranks[-1] * 1.2) if many else (ranks[0] - room, ranks[-1] + room)))
        if shared:
            own = max((count for count in ranks if count < shared[0]), default=shared[0])
            start = (own * shared[0]) ** 0.5 if many else (own + shared[0]) / 2
            end = axes.get_xlim()[1]
            axes.axvspan(start, end, color="#d9822b", alpha=0.13, label="ranks share devices", zorder=0)
        axes.set_xticks(ranks, [str(count) for count in ranks])
        axes.minorticks_off()
        axes.set_xlabel("ranks")
        axes.grid(alpha=0.3)
    if many:
        left.set_yscale("log", base=2)
        left.set_yticks(ideal, [f"{value:,.0f}" for value in ideal])
    else:
        left.set_ylim(0, 1.08 * max(*ideal, *(row[rate]["max"] * factor for row in rows)))
    left.legend(loc="upper left")
    if grows:
        right.legend(handles=crosses, loc="lower left")
    constant = "batch of each rank" if result["mode"] == "weak" else "global batch"
    size = rows[0]["units_per_step"] // (ranks[0] if result["mode"] == "weak" else 1)
    each = f", about {rows[0]['parameters'] / ranks[0]:,.0f} parameters per rank" if grows else ""
    title = f"{result['script']}, {MODES[result['mode']][0]}: {constant} {size:,} {unit}{each}"
    figure.suptitle(f"{title}\n{describe_hardware(result['hardware'])}; {result['date'][:10]}", fontsize=11)
    figure.savefig(path)
