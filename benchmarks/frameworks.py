"""What a framework costs: the step of the same training under each, against the step of ddp/train.py.

    python benchmarks/frameworks.py                                      # two ranks on the CPU; about twelve minutes
    python benchmarks/frameworks.py --ranks 8 --sizes gpt_124m --rounds 5              # eight GPUs

Every entry trains the same model on the same batches (their first losses are compared: a framework that trains
something else is no competitor), as its own `train.py` has it, in turn, round after round. Overhead is the median
step of an entry over that of ddp/train.py in the same round, minus 1; the table gives its median, least and greatest
over the rounds. On a small model a step is mostly what the framework does in Python; on a larger one it vanishes.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from lesson_runs import Measured, cause, execute, launch_command, read_run  # beside this file
from report import (
    cores,
    date,
    gpu_count,
    hardware,
    measured_on,
    other_load_note,
    oversubscription_note,
    plural,
    processor_seconds,
    since,
    spread,
    without_paths,
    write_json,
)
from tqdm import tqdm

from common.config_fields import to_path
from common.ranks import fail
from common.runs import records

# What is compared, the base first: name, and how it is started.
ENTRIES: dict[str, list[str]] = {
    "DDP": ["ddp/train.py"],
    "DeepSpeed, stage 0": ["deepspeed/train.py", "--deepspeed_config=deepspeed/configs/zero0.json"],
    "DeepSpeed, stage 2": ["deepspeed/train.py", "--deepspeed_config=deepspeed/configs/zero2.json"],
    "FSDP": ["fsdp/train.py"],
    "Lightning, DDP": ["lightning/train.py", "--config=lightning/configs/ddp.json"],
    "Lightning, Fabric": ["lightning/fabric_loop.py"],
}

# name: settings, and samples per rank
SIZES: dict[str, tuple[list[str], int]] = {
    # a few ms a step on one core: here the overhead shows
    "mini": (["--model.width=64", "--model.layers=2", "--model.heads=4", "--model.kv_heads=2", "--model.ffn_width=192",
              "--data.sequence_length=64"], 4),
    # the model of all lessons, some 400 ms a step on one core
    "tiny": (["--model.preset=tiny"], 12),
    # for a GPU
    "gpt_124m": (["--model.preset=gpt_124m", "--data.sequence_length=1024", "--train.precision=bf16"], 8),
}  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The result in Markdown: one row for each entry and size, and what to know about them."""

    def ranged(values: dict[str, float], form: str, factor: float = 1.0) -> str:
        middle, low, high = (values[key] * factor for key in ("median", "min", "max"))
        return f"{middle:{form}} ({low:{form}} to {high:{form}})"

    lines = ["| model | framework | step, ms | overhead over DDP, % | peak memory, GiB |", "|---|---|---:|---:|---:|"]
    for row in result["rows"]:
        overhead = ranged(row["overhead"], "+.1f", 100) if row["overhead"] else "–"
        step, memory = ranged(row["step_seconds"], ".1f", 1000), row["peak_memory_bytes"] / 2**30
        lines.append(f"| {row['size']} | {row['entry']} | {step} | {overhead} | {memory:.2f} |")
    lines += [
        "",
        f"- `{result['command']}`: {plural(result['rounds'], 'round')} of {result['steps']} steps each, of which the "
        f"first {result['warmup_steps']} do not count; median (least to greatest) over the rounds",
        *(f"- {note}" for note in result["notes"]),
        f"- {measured_on(result)}",
    ]
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """The step of each framework as a bar, one figure a model, with the least and the greatest round."""
    from matplotlib.figure import Figure  # without pyplot: no window system is touched

    sizes = list(dict.fromkeys(row["size"] for row in result["rows"]))
    figure = Figure(figsize=(10, 3.4), dpi=140, layout="constrained")
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        rows = [row for row in result["rows"] if row["size"] == size][::-1]  # the first one at the top
        middle, low, high = ([row["step_seconds"][key] * 1000 for row in rows] for key in ("median", "min", "max"))
        below = [m - x for m, x in zip(middle, low, strict=True)]
        above = [x - m for m, x in zip(middle, high, strict=True)]
        colors = ["#9aa5b1" if row["entry"] == "DDP" else "#1f6fb4" for row in rows]
        axes.barh([row["entry"] for row in rows], middle, xerr=[below, above], color=colors, capsize=3)
        for place, row in enumerate(rows):
            if row["overhead"]:
                axes.annotate(
                    f" {row['overhead']['median'] * 100:+.0f} %", (high[place], place), va="center", fontsize=9
                )
        axes.set(title=size, xlabel="time of a step, ms", xlim=(0, max(high) * 1.28))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def measure(options: argparse.Namespace, folder: Path) -> dict[tuple[str, str], list[Measured]]:
    """Run all entries in turn, `options.rounds` times; what each run measured, by size and entry."""
    found: dict[tuple[str, str], list[Measured]] = {(s, e): [] for s in options.sizes for e in options.entries}
    first_losses: dict[str, float] = {}
    with tqdm(total=len(found) * options.rounds, unit="run", disable=None) as bar:
        for turn in range(options.rounds):
            for size, entry in found:
                bar.set_postfix_str(f"{size}, {entry}")
                name = f"{turn}-{size}-{list(ENTRIES).index(entry)}"
                settings, samples = SIZES[size]
                command = launch_command(ENTRIES[entry][0], options.ranks, None, options.ranks, plain=False)
                command += [*ENTRIES[entry][1:], *settings, f"--batch.global_size={samples * options.ranks}",
                            f"--train.steps={options.steps}", f"--runs_dir={folder}", f"--run_name={name}",
                            f"--train.log_every={options.steps}", *options.settings]  # fmt: skip
                log = folder / f"{name}.log"
                if code := execute(command, options.threads, log):
                    fail(f"{entry} ended with {code}: {cause(log.read_text())}")
                found[size, entry].append(read_run(folder / name, options.warmup))
                first = records.read_rows(folder / name)[0]["loss"]
                loss = first_losses.setdefault(size, first)
                # bf16 rounds differently under each framework; a wrong batch or scale is off by far more.
                if abs(first - loss) > 1e-2 * loss:
                    fail(f"{entry} starts at a loss of {first}, DDP at {loss}: other batches?")
                bar.update()
    return found


def parse_arguments(words: list[str]) -> argparse.Namespace:
    """Read the command line; mistakes end with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["mini", "tiny"], help="default: mini tiny")
    parser.add_argument("--entries", nargs="+", choices=ENTRIES, default=list(ENTRIES), help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="how often each runs (default 5)")
    parser.add_argument("--steps", type=int, default=60, help="in each run (default 60)")
    parser.add_argument("--warmup", type=int, default=10, help="first steps that do not count (default 10)")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS; default: cores / ranks")
    parser.add_argument("--output", type=to_path, help="also write the result as JSON, and a picture of it beside")
    at = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:at], argparse.Namespace(settings=words[at + 1 :]))
    if min(options.ranks, options.rounds) < 1 or options.steps <= options.warmup:
        found = f"ranks {options.ranks}, rounds {options.rounds}, steps {options.steps} with warm-up {options.warmup}"
        fail(f"{found}; expected 1 or more, and more steps than warm-up")
    options.entries = ["DDP", *(entry for entry in options.entries if entry != "DDP")]
    options.threads = options.threads or max(1, cores() // options.ranks)
    return options


def main() -> None:
    options = parse_arguments(sys.argv[1:])
    before = processor_seconds()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    notes = [other_load_note(*since(before))]
    first = found[options.sizes[0], "DDP"][0].record
    gpus = gpu_count() if "CPU" not in first["device"] else 0
    notes.append(oversubscription_note(options.ranks, options.threads, cores(), gpus))
    rows = []
    for (size, entry), runs in found.items():
        base = found[size, "DDP"]
        pairs = zip(runs, base, strict=True)
        overhead = [run.step_seconds / other.step_seconds - 1 for run, other in pairs]
        rows.append({
            "size": size,
            "entry": entry,
            "step_seconds": spread([run.step_seconds for run in runs]),
            "overhead": spread(overhead) if entry != "DDP" else None,
            "peak_memory_bytes": statistics.median(max(run.peak_memory_bytes) for run in runs),
        })  # fmt: skip
    result = {
        "benchmark": "frameworks",
        "command": without_paths(["python", "benchmarks/frameworks.py", *sys.argv[1:]]),
        "date": date(),
        "git_commit": first["git_commit"],
        "versions": {k: v for runs in found.values() for k, v in runs[0].record["versions"].items()},
        "hardware": hardware(first["device"]),
        "ranks": options.ranks,
        "omp_num_threads": options.threads,
        "rounds": options.rounds,
        "steps": options.steps,
        "warmup_steps": options.warmup,
        "notes": [note for note in notes if note],
        "rows": rows,
    }
    print(f"\n{table(result)}", flush=True)
    if options.output:
        write_json(result, options.output, "--output")
        plot(result, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
