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
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import yaml
from lesson_runs import Measured, cause, count_parameters, execute, launch_command, read_run  # beside this file
from report import (
    cores,
    date,
    gpu_count,
    hardware,
    other_load_note,
    oversubscription_note,
    plural,
    processor_seconds,
    since,
    without_paths,
    write_json,
)
from scaling_arithmetic import MODES, formulas, summarize, uneven_share_warnings
from scaling_report import plot, table
from tqdm import tqdm

from common.config import runs_dir
from common.config_fields import to_path
from common.ranks import fail

OURS = ("--train.steps", "--run_name", "--runs_dir", "--resume")  # what this driver sets for every run


# --------------------------------------------------------------------------------------- running and reading


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
        self.note(oversubscription_note(per_node, options.threads, cores(), gpu_count() if on_gpu else 0))
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


# ---------------------------------------------------------------------------------------------------- output


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
        "--configs",
        type=to_path,
        nargs="+",
        metavar="FILE",
        help="--mode model: one config for each of --ranks, in order",
    )
    add("--repeats", type=int, default=3, help="rounds over all rank counts (default: 3)")
    add("--steps", type=int, default=30, help="training steps of each run (default: 30)")
    add("--warmup", type=int, default=5, help="first steps that do not count (default: 5)")
    add("--threads", type=int, default=1, help="OMP_NUM_THREADS of each rank, at all counts (default: 1)")
    add("--output", type=to_path, help="folder for the results (default: a new one beside the run folders)")
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
        options.output = runs_dir() / name
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
    driver.note(other_load_note(*since(before)))
    first = rounds[0][options.ranks[0]].record
    base = options.ranks[0]
    rows = summarize(options.mode, rounds)
    for warning in uneven_share_warnings(rows) if options.mode == "model" else []:
        driver.note(warning)
    whose = "the fullest rank" if len(rows[-1]["peak_memory_bytes"]) == rows[-1]["ranks"] else "rank 0"
    gpus = gpu_count() if "CPU" not in first["device"] else 0
    for row in rows:
        per_node = min(row["ranks"], options.ranks_per_node or row["ranks"])
        row["shared"] = bool(oversubscription_note(per_node, options.threads, cores(), gpus))
    result = {
        "benchmark": "scaling",
        "mode": options.mode,
        "script": without_paths([options.script]),
        "command": without_paths(["python", "benchmarks/scaling.py", *sys.argv[1:]]),
        "date": date(),
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
    write_json(result, options.output / "scaling.json", "--output")
    (options.output / "scaling.md").write_text(table(result) + "\n")
    plot(result, options.output / "scaling.png")
    print(f"\n{table(result)}\n\nresults: {options.output}/scaling.md, scaling.json, scaling.png", flush=True)


if __name__ == "__main__":
    main()
