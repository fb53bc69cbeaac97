"""The lines, the summary, the exit code and the JSON of all ranks' results."""

from __future__ import annotations  # so that an old Python gets as far as being told that it is too old

import argparse
import json
import textwrap

from doctor_results import Result, ok, problem, warning

MUST_AGREE = ("torch", "CUDA of torch", "NCCL")  # another wire format, or another collective algorithm: hangs
MAY_DIFFER = ("CUDA_VISIBLE_DEVICES",)  # Slurm may show every task a GPU of its own


def finish(options: argparse.Namespace, me, hosts: list[str], reports: list) -> int:
    """Print the reports of all ranks on rank 0. Returns the exit code."""
    shared, different = compare([facts_of_rank for _, facts_of_rank, _ in reports])
    found = [(result, rank) for rank, (results, *_) in enumerate(reports) for result in results if result.found]
    found += [(judge_difference(name, values), 0) for name, values in different.items()]
    if me.is_main and options.json:
        print_json(found, hosts, {"world_size": me.world_size, "common": shared, "differences": different})
    elif me.is_main:
        many = len(set(hosts))
        print(f"{me.world_size} ranks on {many} host{'s' * (many != 1)}, started by {me.launcher}\n")
        print("\n".join(merged([pair for pair in found if pair[0].name != "difference"], hosts)))
        print("\nThe same on all ranks:")
        alike = "; ".join(f"{name} {value}" for name, value in shared.items())
        print(textwrap.fill(alike, 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))
        print("\nDifferences between ranks:" + ("" if different else " none"))
        print("".join(f"{line(result)}\n" for result, _ in found if result.name == "difference"))
        print(summary(list(dict.fromkeys(result for result, _ in found))), flush=True)  # as many as lines
    return exit_code([result for result, _ in found])


def compare(of_ranks: list[dict[str, str]]) -> tuple[dict[str, str], dict[str, dict[str, list[int]]]]:
    """(facts that all ranks share, for every other one: value → the ranks that have it)."""
    shared, different = {}, {}
    for name in sorted({name for one in of_ranks for name in one}):
        values: dict[str, list[int]] = {}
        for rank, one in enumerate(of_ranks):
            values.setdefault(one.get(name, "not set"), []).append(rank)
        if len(values) == 1:
            shared[name] = next(iter(values))
        else:
            different[name] = values
    return shared, different


def judge_difference(name: str, values: dict[str, list[int]]) -> Result:
    """A difference between ranks as a result."""
    found = f"{name}: " + ", ".join(
        f"{value or '(empty)'} ({number('rank', ranks)})" for value, ranks in values.items()
    )
    if name in MAY_DIFFER:
        return ok("difference", found)
    advice = "let all ranks use the same environment and the same settings"
    return (problem if name in MUST_AGREE else warning)("difference", found, advice)


def number(what: str, these: list) -> str:
    """`rank 2`, `ranks 0, 1`."""
    return f"{what}{'s' * (len(these) != 1)} {', '.join(map(str, these))}"


def merged(found: list[tuple[Result, int]], hosts: list[str]) -> list[str]:
    """A line for each result, which says whose it is where not all have it. Many equal verdicts are cut short."""
    lines = []
    reported: dict[str, set[int]] = {}
    groups: dict[tuple[str, str], dict[Result, list[int]]] = {}
    for result, rank in found:
        reported.setdefault(result.name, set()).add(rank)
        groups.setdefault((result.name, result.status), {}).setdefault(result, []).append(rank)
    for (name, status), variants in groups.items():
        shown = list(variants.items())
        if status == "ok" and len(shown) > 4:
            shown = shown[:1]
        for result, ranks in shown:
            whole = set(ranks) == reported[name]
            names = sorted({hosts[rank] for rank in ranks})
            per_host = len(reported[name]) == len(set(hosts)) > 1
            lines.append(
                line(result) + ("" if whole else f"  [{', '.join(names) if per_host else number('rank', ranks)}]")
            )
        if len(shown) < len(variants):
            lines.append(line(ok(name, f"… and {len(variants) - 1} more, all ok")))
    return lines


def line(result: Result) -> str:
    advice = f"; {result.advice}" if result.advice else ""
    return f"{result.status:8} {result.name:14} {result.found}{advice}".rstrip()


def summary(results: list[Result]) -> str:
    """The last line: how many of each."""
    count = {status: sum(result.status == status for result in results) for status in ("ok", "warning", "problem")}
    return f"doctor: {count['ok']} ok, {count['warning']} warning(s), {count['problem']} problem(s)"


def exit_code(results: list[Result]) -> int:
    return int(any(result.status == "problem" for result in results))


def print_json(found: list[tuple[Result, int]], hosts: list[str], more: dict) -> None:
    rows = [{**vars(result), "host": hosts[rank], "rank": rank} for result, rank in found]
    print(json.dumps({"checks": rows, "exit_code": exit_code([r for r, _ in found]), **more}, indent=1), flush=True)
