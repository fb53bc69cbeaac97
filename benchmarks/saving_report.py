"""The ways to save that benchmarks/saving.py compares, what it measures of each, and the table of it."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from report import measured_on, plural, quartiles  # beside this file


@dataclass(frozen=True)
class Way:
    """How one contestant saves."""

    asynchronous: bool = True
    keeps_memory: bool = True
    copied_by_thread: bool = False
    written_by_process: bool = False


WAYS = {
    "synchronous": Way(asynchronous=False, keeps_memory=False),
    "fresh-copy": Way(keeps_memory=False),
    "kept-copy": Way(),
    "thread": Way(copied_by_thread=True),
    "process": Way(copied_by_thread=True, written_by_process=True),
}


@dataclass
class Saved:
    """One save; seconds, of the rank that took longest where a rank waits."""

    collecting: float  # get_state_dict
    calling: float  # dcp.save, or dcp.async_save, whose copy it is that takes the time
    before_step: float  # the first optimizer step waits until the copy is whole
    waiting: float  # the three together
    copied_after: float | None  # from asking; None where it is part of the call
    written_after: float  # from asking
    steps: list[float]  # those that began while the save was under way, without the waiting
    quiet_steps: list[float]  # just before it
    bytes_by_rank: list[int]


def summarize(rounds: list[dict[str, Saved]], first: dict[str, Saved]) -> list[dict[str, Any]]:
    """One row for each way; the share of the synchronous wait is taken within each round.

    Args:
        rounds: for each round what each way took, the same ways in every round.
        first: of a round before them, in which memory was allocated.
    """
    rows = []
    # What training lost in all: the waiting, and what the steps meanwhile took longer than the quiet ones of the round.
    lost: dict[str, list[float]] = {name: [] for name in rounds[0]}
    for each in rounds:
        quiet = statistics.median(seconds for saved in each.values() for seconds in saved.quiet_steps)
        for name, saved in each.items():
            lost[name].append(saved.waiting + sum(saved.steps) - quiet * len(saved.steps))
    for name in rounds[0]:
        saves = [each[name] for each in rounds]
        under_way = [seconds for saved in saves for seconds in saved.steps]
        row: dict[str, Any] = {"way": name, **asdict(WAYS[name])}
        for key in ("waiting", "collecting", "calling", "before_step", "written_after"):
            row[f"{key}_seconds"] = quartiles([getattr(saved, key) for saved in saves])
        row["lost_seconds"] = quartiles(lost[name])
        copied = [saved.copied_after for saved in saves if saved.copied_after is not None]
        if "synchronous" in rounds[0]:
            row["of_synchronous"] = quartiles([each[name].waiting / each["synchronous"].waiting for each in rounds])
        row |= {
            "copied_after_seconds": quartiles(copied) if copied else None,
            "first_waiting_seconds": first[name].waiting,
            "step_meanwhile_seconds": quartiles(under_way) if under_way else None,
            "steps_meanwhile": sum(len(saved.steps) for saved in saves) / len(saves),
            "bytes_by_rank": saves[0].bytes_by_rank,
        }
        rows.append(row)
    return rows


def table(result: dict[str, Any]) -> str:
    """The result in Markdown: how long each way waits, of what the waiting is made, and what to know about it."""

    def ranged(value: dict[str, float] | None, form: str = ".3f", factor: float = 1.0) -> str:
        if value is None:
            return "–"
        middle, low, high = (value[key] * factor for key in ("median", "lower_quartile", "upper_quartile"))
        return f"{middle:{form}} ({low:{form}} – {high:{form}})"

    rows = result["rows"]
    lines = [
        f"Saving {result['parameters']:,} parameters and AdamW's state on {plural(result['world_size'], 'rank')}",
        "",
        "| way | training waits, s | of the synchronous, % | written after, s | a step meanwhile, s "
        "| training loses in all, s | the first save waits, s |",
        "|---|" + "---:|" * 6,
    ]
    for row in rows:
        cells = (
            row["way"],
            ranged(row["waiting_seconds"]),
            ranged(row.get("of_synchronous"), ".1f", 100),
            ranged(row["written_after_seconds"]),
            ranged(row["step_meanwhile_seconds"]),
            ranged(row["lost_seconds"]),
            f"{row['first_waiting_seconds']:.3f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| of the waiting, ms | the state dict | the call | before the optimizer step | copied after |"]
    lines.append("|---|" + "---:|" * 4)
    for row in rows:
        keys = ("collecting_seconds", "calling_seconds", "before_step_seconds", "copied_after_seconds")
        parts = (ranged(row[key], ",.0f", 1e3) for key in keys)
        lines.append(f"| {row['way']} | {' | '.join(parts)} |")
    copies = result["copy_seconds"]
    sizes = "  ".join(f"{size:,}" for size in rows[0]["bytes_by_rank"])
    lines += [
        "",
        f"- median (quartiles) over {plural(result['rounds'], 'round')}, after one to warm up; shares are taken within "
        "a round; the slowest rank counts",
        f"- bytes by rank: {sizes}; of them tensors: {'  '.join(f'{size:,}' for size in result['shard_bytes'])}",
        f"- a plain copy of a rank's tensors: {copies['fresh']:.3f} s into new memory, {copies['kept']:.3f} s into "
        "memory that is there already",
        f"- a step without a save: {ranged(result['quiet_step_seconds'])} s",
        f"- all {result['saves']} saves were read again, and are in all bits the state of the moment of asking",
        f"- {measured_on(result)}",
        *(f"- {note}" for note in result["notes"]),
        f"- `{result['command']}`",
    ]
    return "\n".join(lines)
