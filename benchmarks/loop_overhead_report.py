"""The result of benchmarks/loop_overhead.py as tables."""

from typing import Any

from report import measured_on  # beside this file


def table(result: dict[str, Any]) -> str:
    """The result in Markdown: the comparison, then where the difference goes."""

    def percent(value: dict[str, float] | None) -> str:
        if value is None:
            return "–"
        return f"{value['median']:+.1%} ({value['lower_quartile']:+.1%} – {value['upper_quartile']:+.1%})"

    rows, world_size = result["rows"], result["world_size"]
    processes = f"{world_size} process{'es' * (world_size > 1)}"
    lines = [
        f"{result['strategy']}, {processes}: our step against a bare loop",
        "",
        "| model | parameters | tokens a rank and step | bare, ms | ours, ms "
        "| overhead, wall time | CPU time | fastest turns |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = (
            row["size"],
            f"{row['parameters']:,}",
            f"{row['tokens_per_rank_and_step']:,}",
            f"{row['bare_step_seconds']['median'] * 1e3:.2f}",
            f"{row['ours_step_seconds']['median'] * 1e3:.2f}",
            percent(row["overhead"]),
            percent(row["overhead_cpu_time"]),
            f"{row['overhead']['fastest']:+.1%}",
        )
        lines.append(f"| {' | '.join(cells)} |")

    sizes = " | ".join(row["size"] for row in rows)
    lines += ["", f"| part of our step, µs | {sizes} |", f"|---|{'---:|' * len(rows)}"]
    for part in rows[0]["parts_seconds_per_step"]:
        times = [(row["parts_seconds_per_step"][part], row["bare_step_seconds"]["median"]) for row in rows]
        shares = " | ".join(f"{seconds * 1e6:,.0f} ({seconds / bare:.1%})" for seconds, bare in times)
        lines.append(f"| {part} | {shares} |")

    turns = ", ".join(f"{row['size']} {row['pairs']} × {row['steps_per_turn']}" for row in rows)
    threads = f"{result['threads']} thread{'s' * (result['threads'] != 1)} a process"
    lines += [
        "",
        "- overhead = ours / bare - 1 within each pair of turns: median (quartiles) over all pairs",
        "- parts: median in the running loop, in % of the bare step; every tenth step also prints a line",
        f"- pairs × steps a turn: {turns}; {threads}; both loops ended with the same parameters",
        f"- {measured_on(result)}",
        *(f"- {note}" for note in result["notes"]),
        f"- `{result['command']}`",
    ]
    return "\n".join(lines)
