"""Speed-up and efficiency of rank counts, by mode: the formulas of benchmarks/scaling.py, and its rows."""

from typing import Any

from lesson_runs import Measured  # beside this file
from report import plural, spread

UNEVEN = 0.05  # --mode model: by how much a rank's share may differ from that of the fewest ranks before it is said


# mode: (as tables and plots call it, what stays)
MODES = {
    "strong": ("strong scaling", "the global batch stays"),
    "weak": ("weak scaling", "the batch of each rank stays"),
    "model": ("weak scaling by model size", "the model grows with the ranks, the global batch stays"),
}


def efficiency(mode: str, base_ranks: int, base_seconds: float, ranks: int, seconds: float, work: float = 1.0) -> float:
    """The share of ideal scaling that is reached, 1.0 is ideal; times are seconds per step.

    Strong scaling: the ranks share the work of one step, and ideally take base_ranks / ranks of the time.
    Weak scaling: each rank does the same work whatever their number, and ideally takes the same time.
    Model: a step has `work` times the FLOPs that it has on base_ranks, and ideally each rank keeps its FLOP/s.
    """
    grown = {"strong": 1.0, "weak": ranks / base_ranks, "model": work}[mode]
    return grown * base_seconds * base_ranks / (ranks * seconds)


def speed_up(mode: str, base_ranks: int, base_seconds: float, ranks: int, seconds: float, work: float = 1.0) -> float:
    """Throughput as a multiple of that of `base_ranks`, in FLOP/s where the model grows; ideally ranks / base_ranks."""
    return efficiency(mode, base_ranks, base_seconds, ranks, seconds, work) * ranks / base_ranks


def formulas(mode: str, base: int) -> dict[str, str]:
    """The texts for `speed_up` and `efficiency` as formulas of T(N), the median time of a step on N ranks, and W(N)."""
    if mode == "model":
        grown = f"W(N) · T({base}) / (W({base}) · T(N))"
        shared = f"W(N) · T({base}) / (N · W({base}) · T(N))"
        return {"speed_up": grown, "efficiency": f"{base} · {shared}" if base > 1 else shared}
    ratio, shared, grown = f"T({base}) / T(N)", f"T({base}) / (N · T(N))", f"N · T({base}) / T(N)"
    if base > 1:
        shared, grown = f"{base} · {shared}", f"N · T({base}) / ({base} · T(N))"
    strong = mode == "strong"
    return {"speed_up": ratio if strong else grown, "efficiency": shared if strong else ratio}


def summarize(mode: str, rounds: list[dict[int, Measured]]) -> list[dict[str, Any]]:
    """One row for each rank count; speed-up and efficiency are taken within each round, then their median.

    Args:
        rounds: for each repeat the measured runs by rank count, the same ones in every round.
    """
    base = min(rounds[0])
    rows = []
    for ranks in sorted(rounds[0]):
        runs = [one[ranks] for one in rounds]
        work = runs[0].flops_per_step / rounds[0][base].flops_per_step if mode == "model" else 1.0
        times = [(base, one[base].step_seconds, ranks, one[ranks].step_seconds, work) for one in rounds]
        grown = {}
        if mode == "model":
            flops = runs[0].flops_per_step
            grown = {
                "parameters": runs[0].parameters,
                "flops_per_step": flops,
                "flops_per_second_per_rank": spread([flops / run.step_seconds / ranks for run in runs]),
                "flops_per_second": spread([flops / run.step_seconds for run in runs]),
                "time_ratio": spread([base_seconds / seconds for _, base_seconds, _, seconds, _ in times]),
            }
        rows.append(
            {
                "ranks": ranks,
                "units_per_step": runs[0].units_per_step,
                "step_seconds": spread([run.step_seconds for run in runs]),
                "units_per_second": spread([run.units_per_step / run.step_seconds for run in runs]),
                "speed_up": spread([speed_up(mode, *each) for each in times]),
                "efficiency": spread([efficiency(mode, *each) for each in times]),
                "peak_memory_bytes": [max(p) for p in zip(*(r.peak_memory_bytes for r in runs), strict=True)],
                "last_loss": runs[0].last_loss,
            }
            | grown
        )
    return rows


def uneven_share_warnings(rows: list[dict[str, Any]]) -> list[str]:
    """Warnings where a rank of --mode model has more or less to keep, or to compute, than on the fewest ranks."""
    found = []
    for what, key in (("parameters", "parameters"), ("FLOPs of a step", "flops_per_step")):
        shares = {row["ranks"]: row[key] / row["ranks"] for row in rows}
        base = min(shares)
        off = {ranks: share / shares[base] - 1 for ranks, share in shares.items()}
        if beyond := [f"{off[ranks]:+.1%} on {plural(ranks, 'rank')}" for ranks in off if abs(off[ranks]) > UNEVEN]:
            against = f"{what} per rank, against {plural(base, 'rank')}: {', '.join(beyond)}"
            found.append(f"{against}; expected within {UNEVEN:.0%}: the model did not grow as the ranks did")
    return found
