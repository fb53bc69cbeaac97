"""How a lesson script scales: the same training on 1, 2, 4 … ranks, as a table, a plot and a JSON file.

    python benchmarks/scaling.py ddp/train.py                                # strong scaling on 1, 2, 4 ranks
    python benchmarks/scaling.py ddp/train.py --mode weak --ranks 1 2 4 8    # the batch grows with the ranks
    python benchmarks/scaling.py ddp/train.py --ranks 1 8 -- --config ddp/configs/gpt_124m.yaml
    python benchmarks/scaling.py fsdp/train.py --mode model --ranks 1 2 \\
        --configs fsdp/configs/weak_scaling_1.yaml fsdp/configs/weak_scaling_2.yaml    # the model grows with the ranks
    python benchmarks/scaling.py ddp/train.py --ranks 8 16 32 --ranks-per-node 8 \\
        --launch "srun --nodes={nodes} --ntasks={ranks} --ntasks-per-node=8 python"    # inside a Slurm job

What stands after `--` goes to SCRIPT, any script that writes our run folder. The runs are interleaved
(1, 2, 4, 1, 2, 4, …), and each round is compared within itself: a machine that slows down harms all alike.

With T(N) the median time of a step on N ranks, and B the fewest ranks measured (1, unless --ranks differs):

                                              speed-up               efficiency
    strong, the global batch stays            T(B) / T(N)            B · T(B) / (N · T(N))
    weak, each rank's batch stays             N · T(B) / (B · T(N))  T(B) / T(N)
    model, the model grows with the ranks     F(N) / F(B)            B · F(N) / (N · F(B))

Strong and weak: efficiency is throughput(N) / (N / B · throughput(B)). In weak scaling the ideal is a time per step
that stays the same; tokens per second grow with N.

Model is weak scaling by model size: one config for each rank count, whose model has N / B times the parameters, and the
same global batch. F(N) = W(N) / T(N) is what all ranks compute in a second, with W(N) the FLOPs of a step as run.json
states them, attention and head included. T(B) / T(N) would not do: it takes for granted that each rank has as much to
compute as before, and credits a model that grew by less than the ranks.
"""

import argparse
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import yaml
from tqdm import tqdm

from common import manifest
from common.ranks import fail

OURS = ("--train.steps", "--run_name", "--runs_dir", "--resume")  # what this driver sets for every run
UNEVEN = 0.05  # --mode model: by how much a rank's share may differ from that of the fewest ranks before it is said
# mode: (as tables and plots call it, what stays)
MODES = {
    "strong": ("strong scaling", "the global batch stays"),
    "weak": ("weak scaling", "the batch of each rank stays"),
    "model": ("weak scaling by model size", "the model grows with the ranks, the global batch stays"),
}


@dataclass(frozen=True)
class Measured:
    """What one run did: its median step after the warm-up, and what else its folder says."""

    ranks: int
    units_per_step: int
    step_seconds: float
    peak_memory_bytes: list[int]  # by rank; of rank 0 alone where run.json does not have them all
    last_loss: float
    record: dict[str, Any]  # run.json
    parameters: int | None = None  # of the whole model, counted in the run's checkpoint; read for --mode model alone

    @property
    def flops_per_step(self) -> float:
        """Forward and backward of the global batch, as run.json counts them."""
        return self.units_per_step * (self.record.get("flops_per_unit") or math.nan)


# ------------------------------------------------------------------------------------------------ arithmetic


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


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest of what the rounds gave."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarise(mode: str, rounds: list[dict[int, Measured]]) -> list[dict[str, Any]]:
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


def uneven(rows: list[dict[str, Any]]) -> list[str]:
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


def sharing(ranks: int, threads: int, cores: int, gpus: int) -> str | None:
    """A plain word where the ranks of one node outnumber its devices; gpus=0: they run on the CPU."""
    if gpus and ranks > gpus:
        return f"{ranks} ranks share {plural(gpus, 'GPU')}: this measures sharing, not scaling"
    if not gpus and ranks * threads > cores:
        who = plural(ranks, "rank") + (f" of {threads} threads" if threads > 1 else "")
        return f"{who} share {plural(cores, 'core')}: this measures sharing, not scaling"
    return None


def plural(count: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{count} {noun}{'s' * (count != 1)}"


# --------------------------------------------------------------------------------------- running and reading


def launch_command(script: str, ranks: int, template: str | None, ranks_per_node: int, plain: bool) -> list[str]:
    """What starts `script` on so many ranks: `plain` python, torchrun, or the user's own template."""
    if template:
        nodes = math.ceil(ranks / ranks_per_node)
        filled = template.replace("{ranks}", str(ranks)).replace("{nodes}", str(nodes))
        return [*shlex.split(filled), script]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *([] if plain else torchrun), script]


def execute(command: list[str], threads: int, log: Path) -> int:
    """Run a command to its end, its output into `log`; it does not outlive us. Returns the exit code."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            return process.wait()
        finally:
            if process.poll() is None:  # Ctrl-C, or we are told to end
                process.terminate()  # torchrun passes it on to its workers
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()


def cause(output: str) -> str:
    """The line of a failed run's output that says why; our scripts print `[rank N] error: …`."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    ours = [line for line in lines if re.match(r"(\[rank \d+\] )?error: ", line)]
    python = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b: ", line.split("]: ")[-1])]
    return (ours or python or lines[-1:] or ["it printed nothing"])[0]


def read_run(folder: Path, warmup: int) -> Measured:
    """Read one run folder; the first `warmup` steps, which allocate and compile, do not count.

    Raises:
        SystemExit: (exit code 2) the folder is not there, or holds no steps beyond the warm-up.
    """
    try:
        record = json.loads((folder / "run.json").read_text())
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError as error:
        name = Path(str(error.filename)).name
        fail(f"the script ended well but left no {name} in {folder}; expected a run folder of common/run.py")
    rows = [row for row in map(json.loads, lines) if "step_seconds" in row]
    if len(rows) <= warmup:
        fail(f"the run made {len(rows)} steps, {warmup} of them warm-up: nothing is left; raise --steps")
    return Measured(
        ranks=record["world_size"],
        units_per_step=record["units_per_step"],
        step_seconds=statistics.median(row["step_seconds"] for row in rows[warmup:]),
        peak_memory_bytes=record.get("peak_memory_bytes") or [max(row["peak_memory_bytes"] for row in rows)],
        last_loss=rows[-1]["loss"],
        record=record,
    )


def count_parameters(folder: Path) -> int:
    """Parameters of the whole model, from the shapes in the manifest of the run's newest checkpoint.

    Raises:
        SystemExit: (exit code 2) the run left no finished checkpoint, or a broken one.
    """
    found = manifest.latest(folder / "checkpoints")
    if found is None:
        fail(f"--mode model counts the parameters in the run's checkpoint, and {folder} holds none that is finished; "
             "name a script that saves one at its end")  # fmt: skip
    try:
        shapes = manifest.read(found)["parameters"]
    except ValueError as error:
        fail(str(error))
    return sum(math.prod(shape) for shape in shapes.values())


def base_batch(script: str, arguments: list[str]) -> int:
    """batch.global_size of the script with these arguments, as `SCRIPT --print_config` gives it."""
    command = [sys.executable, script, *arguments, "--print_config"]
    finished = subprocess.run(command, capture_output=True, text=True)
    try:
        return int(yaml.safe_load(finished.stdout)["batch"]["global_size"])
    except (yaml.YAMLError, TypeError, KeyError, ValueError):
        said = cause(finished.stderr or finished.stdout)
        fail(f"weak scaling needs batch.global_size, and `{script} --print_config` does not show it: {said}")


class Driver:
    """Runs the script on each number of ranks, round by round."""

    def __init__(self, options: argparse.Namespace, script_arguments: list[str]) -> None:
        self.options, self.arguments = options, script_arguments
        self.weak_base = base_batch(options.script, script_arguments) if options.mode == "weak" else 0
        self.plain_python = options.launch is None  # until the script refuses it
        self.notes: list[str] = []

    def note(self, text: str | None) -> None:
        """Say a thing that the reader of the numbers must know, once, and keep it for the results."""
        if text and text not in self.notes:
            self.notes.append(text)
            tqdm.write(f"note: {text}")

    def run(self, ranks: int, repeat: int) -> Measured:
        """Run the script once. Ends the program where it fails, with its own words."""
        options, runs = self.options, self.options.output / "runs"
        name = f"{options.mode}-{ranks}-ranks-round-{repeat + 1}"
        ours = [f"--train.steps={options.steps}", f"--run_name={name}", f"--runs_dir={runs}", "--resume=never"]
        batch = [f"--batch.global_size={ranks * self.weak_base}"] if self.weak_base else []
        config = ["--config", str(options.configs[ranks])] if options.configs else []
        log = options.output / f"{name}.log"
        plain = ranks == 1 and self.plain_python
        per_node = min(ranks, options.ranks_per_node or ranks)
        command = launch_command(options.script, ranks, options.launch, per_node, plain)
        code = execute([*command, *config, *self.arguments, *batch, *ours], options.threads, log)
        refused = code and plain and not (runs / name).exists() and "torchrun" in log.read_text()
        if refused:  # it did not begin, and says how it wants to be started
            self.plain_python = False
            self.note("the script does not start with plain python: torchrun starts 1 rank too")
            return self.run(ranks, repeat)
        if code:
            output = log.read_text()
            where = f"on {plural(ranks, 'rank')}, round {repeat + 1}"
            what = f"{options.script} failed ({where}, exit code {code})"
            end = "\n".join(f"  | {line}" for line in output.rstrip().splitlines()[-15:])
            sys.exit(f"error: {what}: {cause(output)}\nthe end of its output (all of it: {log}):\n{end}")
        log.unlink()
        measured = read_run(runs / name, options.warmup)
        if options.mode == "model":
            measured = replace(measured, parameters=count_parameters(runs / name))
            if not measured.record.get("flops_per_unit"):
                fail(f"--mode model needs flops_per_unit, and the run.json of {options.script} has none; use a script "
                     "that gives it to Run")  # fmt: skip
        shutil.rmtree(runs / name / "checkpoints", ignore_errors=True)  # of no further use, and large
        if measured.ranks != ranks:
            fail(f"asked for {ranks} ranks, but the run says {measured.ranks}; check --launch")
        on_gpu = "CPU" not in measured.record["device"]
        self.note(sharing(per_node, options.threads, cores(), gpu_count() if on_gpu else 0))
        return measured

    def rounds(self) -> list[dict[int, Measured]]:
        """All runs, interleaved. Fails when the rank counts did not do the work that the mode promises."""
        found: list[dict[int, Measured]] = []
        jobs = [(repeat, ranks) for repeat in range(self.options.repeats) for ranks in self.options.ranks]
        bar = tqdm(jobs, unit="run", disable=None)
        for repeat, ranks in bar:
            bar.set_description(f"round {repeat + 1}, {plural(ranks, 'rank')}")
            if repeat == len(found):
                found.append({})
            found[repeat][ranks] = self.run(ranks, repeat)
        weak = self.options.mode == "weak"
        work = {run.units_per_step / (run.ranks if weak else 1) for one in found for run in one.values()}
        if len(work) > 1:
            what = "units per rank and step" if weak else "units per step"
            fail(f"the runs had different {what}, {sorted(work)}: this is no {MODES[self.options.mode][0]}")
        return found


# -------------------------------------------------------------------------------- what the numbers belong to


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_count() -> int:
    """GPUs on this machine."""
    import torch

    return torch.cuda.device_count()


def hardware(device: str) -> dict[str, Any]:
    """Processor, cores, memory and GPUs, not the machine's name; `device` as run.json calls it."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    if found := re.search(r"^model name\s*:\s*(.*)$", cpuinfo, re.MULTILINE):
        model = " ".join(found[1].split())
    memory = round(psutil.virtual_memory().total / 2**30, 1)
    about: dict[str, Any] = {"cpu": model, "cores": cores(), "memory_gib": memory}
    return about | ({} if "CPU" in device else {"gpu": device, "gpus": gpu_count()})


def processor_seconds() -> tuple[float, float, float]:
    """Seconds on the clock, busy ones of all this machine's cores, and ours of them, ended children included."""
    machine = psutil.cpu_times()
    busy = (getattr(machine, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
    return time.monotonic(), sum(busy), sum(os.times()[:4])


def neighbours(seconds: float, busy: float, ours: float) -> str | None:
    """A warning where other programs were at work meanwhile: what is busy and not ours (5 % are forgiven)."""
    machine = os.cpu_count() or 1
    if busy - ours < 0.05 * machine * seconds:
        return None
    kept = f"other programs kept {(busy - ours) / seconds:.1f} of its {plural(machine, 'core')} busy meanwhile"
    return f"measured on a shared machine: {kept}"


def in_words(about: dict[str, Any]) -> str:
    """`hardware` as a reader likes it."""
    gpus = f"{about['gpus']} × {about['gpu']}, " if "gpu" in about else ""
    return f"{gpus}{about['cpu']}, {plural(about['cores'], 'core')}, {about['memory_gib']:.0f} GiB"


def without_paths(words: list[str]) -> str:
    """A command line as others can use it: paths relative to here, those outside cut to their last part."""

    def shorten(word: str) -> str:
        name, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
        if not value.startswith("/"):
            return word
        path = Path(value)
        inside = path.is_relative_to(Path.cwd())
        return f"{name}{equals}{path.relative_to(Path.cwd()) if inside else path.name}"

    return shlex.join(map(shorten, words))


# ---------------------------------------------------------------------------------------------------- output


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
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    rounds = f"median of {result['repeats']} interleaved rounds (least – greatest)" if many else "one round"
    lines += [
        "",
        f"- {rounds}; {result['steps']} steps a run, the first {result['warmup_steps']} not counted; "
        f"OMP_NUM_THREADS={result['omp_num_threads']} for every rank count; memory: {result['memory']}",
        f"- speed-up = {result['formulas']['speed_up']}; efficiency = {result['formulas']['efficiency']}; "
        "T: median time of a step" + ("; W: FLOPs of a step, from run.json" if grows else ""),
        *([not_so(result["rows"])] if grows else []),
        f"- {in_words(result['hardware'])}; {versions}; commit {result['git_commit']}; {result['date']}",
        *(f"- {'* ' if 'measures sharing' in note else ''}{note}" for note in result["notes"]),
        f"- `{result['command']}`",
    ]
    return "\n".join(lines)


def large_flops(result: dict[str, Any]) -> tuple[str, float]:
    """The unit in which FLOPs are easy to read, and the factor to it: by what a rank computes in a second."""
    tera = result["rows"][0]["flops_per_second_per_rank"]["median"] >= 1e12
    return ("TFLOP", 1e-12) if tera else ("GFLOP", 1e-9)


def not_so(rows: list[dict[str, Any]]) -> str:
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
    figure.suptitle(f"{title}\n{in_words(result['hardware'])}; {result['date'][:10]}", fontsize=11)
    figure.savefig(path)


def parse_arguments(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and after `--` those of the script."""
    at = words.index("--") if "--" in words else len(words)
    own, script_arguments = words[:at], words[at + 1 :]
    parser = argparse.ArgumentParser(
        prog="python benchmarks/scaling.py",
        usage="%(prog)s SCRIPT [options] [-- script arguments]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("script", metavar="SCRIPT", help="a lesson script that writes our run folder, such as ddp/train.py")
    add("--ranks", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="rank counts (default: 1 2 4)")
    add("--mode", choices=list(MODES), default="strong", help="what grows with the ranks (default: strong, nothing)")
    add(
        "--configs", type=Path, nargs="+", metavar="FILE", help="--mode model: one config for each of --ranks, in order"
    )
    add("--repeats", type=int, default=3, help="rounds over all rank counts (default: 3)")
    add("--steps", type=int, default=30, help="training steps of each run (default: 30)")
    add("--warmup", type=int, default=5, help="first steps that do not count (default: 5)")
    add("--threads", type=int, default=1, help="OMP_NUM_THREADS of each rank, at all counts (default: 1)")
    add("--output", type=Path, help="folder for the results (default: a new one beside the run folders)")
    add("--launch", metavar="TEMPLATE", help="what starts SCRIPT, with {ranks} and {nodes} filled in")
    add("--ranks-per-node", type=int, help="to fill in {nodes} (default: all ranks on one node)")
    options = parser.parse_args(own)
    if not Path(options.script).is_file():
        fail(f"there is no script {options.script} (looked in {Path.cwd()}); name one, such as ddp/train.py")
    if options.launch and not shutil.which(program := shlex.split(options.launch)[0]):
        fail(f"--launch: there is no program {program} here; expected a command such as srun or mpirun")
    for name in ("repeats", "steps", "threads", "ranks_per_node"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(options, name)} cannot work; allowed: 1 or more")
    if min(options.ranks) < 1 or len(set(options.ranks)) < len(options.ranks):
        given = " ".join(map(str, options.ranks))
        fail(f"--ranks {given} cannot work; allowed: different numbers, each 1 or more")
    if not 0 <= options.warmup < options.steps:
        fail(f"--warmup {options.warmup} leaves no step of --steps {options.steps} to measure; raise --steps")
    if options.configs and options.mode != "model":
        fail(f"--configs belongs to --mode model, not {options.mode}; give the one config to SCRIPT: -- --config FILE")
    if options.mode == "model":
        given, counts = plural(len(options.configs or []), "file"), " ".join(map(str, options.ranks))
        if len(options.configs or []) != len(options.ranks):
            fail(f"--mode model got {given} after --configs; expected one for each of --ranks {counts}, in that order")
        for path in options.configs:
            if not path.is_file():
                fail(
                    f"--configs: there is no file {path} (looked in {Path.cwd()}); name one config for each of --ranks"
                )
        if any(word.split("=")[0] == "--config" for word in script_arguments):
            fail("--config is set by this driver for every run of --mode model; name the files after --configs")
        options.configs = dict(zip(options.ranks, options.configs, strict=True))  # ranks are sorted below
    for word in script_arguments:
        if (flag := word.split("=")[0]) in OURS:
            instead = {"--train.steps": "--steps", "--runs_dir": "--output"}.get(flag)
            hint = f"; give {instead}, before the --" if instead else "; leave it out"
            fail(f"{flag} is set by this driver for every run{hint}")
    options.ranks.sort()
    return options, script_arguments


def main() -> None:
    options, script_arguments = parse_arguments(sys.argv[1:])
    if options.output is None:
        name = f"scaling-{Path(options.script).stem}-{options.mode}-{time.strftime('%Y%m%d-%H%M%S')}"
        options.output = Path(os.environ.get("RUNS_DIR", "runs")) / name
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--output {options.output}: {error.strerror}; choose a folder you can write to")
    if (options.output / "runs").exists():
        fail(f"--output {options.output} holds a measurement already; choose another folder")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run in progress is ended too

    driver = Driver(options, script_arguments)
    before = processor_seconds()
    try:
        rounds = driver.rounds()
    except KeyboardInterrupt:
        sys.exit(f"stopped; the runs that ended are in {options.output}/runs")
    driver.note(neighbours(*(now - then for now, then in zip(processor_seconds(), before, strict=True))))
    first = rounds[0][options.ranks[0]].record
    base = options.ranks[0]
    rows = summarise(options.mode, rounds)
    for warning in uneven(rows) if options.mode == "model" else []:
        driver.note(warning)
    whose = "the fullest rank" if len(rows[-1]["peak_memory_bytes"]) == rows[-1]["ranks"] else "rank 0"
    gpus = gpu_count() if "CPU" not in first["device"] else 0
    for row in rows:
        per_node = min(row["ranks"], options.ranks_per_node or row["ranks"])
        row["shared"] = bool(sharing(per_node, options.threads, cores(), gpus))
    result = {
        "benchmark": "scaling",
        "mode": options.mode,
        "script": without_paths([options.script]),
        "command": without_paths(["python", "benchmarks/scaling.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "git_commit": first["git_commit"],
        "versions": first["versions"],
        "hardware": hardware(first["device"]),
        "omp_num_threads": options.threads,
        "steps": options.steps,
        "warmup_steps": options.warmup,
        "repeats": options.repeats,
        "unit": first["unit"],
        "memory": f"peak of {whose}, {'allocated on the GPU' if gpus else 'resident, libraries included'}",
        "formulas": formulas(options.mode, base),
        "notes": driver.notes,
        "rows": rows,
    }
    (options.output / "scaling.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    (options.output / "scaling.md").write_text(table(result) + "\n")
    plot(result, options.output / "scaling.png")
    print(f"\n{table(result)}\n\nresults: {options.output}/scaling.md, scaling.json, scaling.png", flush=True)


if __name__ == "__main__":
    main()
