"""Kill a training again and again, at random moments and in the middle of saves, and see whether anything is lost.

    python benchmarks/kill_and_resume.py fsdp/train.py --kills 100        # some 20 minutes on two cores
    python benchmarks/kill_and_resume.py ddp/train.py --kills 5 -- --batch.micro_size 6

One run, in fp64, under torchrun, with a checkpoint every few steps. Each attempt is ended by SIGKILL for all of its
processes at once, as a power cut would: half of the kills at a random moment after the first new step, the others while
a checkpoint is being written. After each kill all committed checkpoints are read, against their checksums; the next
attempt must go on from the newest. At last the run may end, and is compared with one that nobody disturbed. The program
ends with an error where a checkpoint is torn, a step is lost beyond the last commit, or the two runs differ.
"""

import argparse
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from report import date, git_commit, write_json  # beside this file
from tqdm import tqdm

from common.config_fields import to_path
from common.ranks import fail
from common.runs import manifest, records
from common.runs.checkpoint_reader import Reader

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

from processes import kill_tree  # by the path above

# Some milliseconds a step, so that a good part of the time goes into saving.
SETTINGS = ["--train.precision", "fp64", "--model.width", "32", "--model.ffn_width", "48", "--model.layers", "2",
            "--data.sequence_length", "16", "--data.validation_samples", "24", "--checkpoint.keep", "2"]  # fmt: skip


def start(options: argparse.Namespace, name: str) -> subprocess.Popen:
    """The script under torchrun, its output in a file of the run's name."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
    settings = [*SETTINGS, "--train.steps", str(options.steps), "--checkpoint.every", str(options.every)]
    places = ["--runs_dir", str(options.folder), "--run_name", name]
    with open(options.folder / f"{name}.log", "a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [*launcher, options.script, *settings, *options.settings, *places]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL for a process and all that descend from it."""
    kill_tree(process.pid)
    process.wait()


def being_written(run: Path) -> set[Path]:
    """Folders of shards, of checkpoints that have no manifest."""
    return {p for p in run.glob("checkpoints/step_*/shards-*") if not (p.parent / "manifest.json").exists()}


def committed(run: Path) -> list[int]:
    """The steps of all checkpoints with a manifest, in order."""
    return sorted(int(path.parent.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*/manifest.json"))


def steps_done(run: Path) -> int:
    """Steps in metrics.jsonl: written one step late."""
    file = run / "metrics.jsonl"
    return sum('"loss"' in line for line in file.read_text().splitlines()) if file.exists() else 0


def check(run: Path) -> int:
    """Read every committed checkpoint against its checksums; the newest step, or 0. Exits if one is torn."""
    for checkpoint in (path.parent for path in run.glob("checkpoints/step_*/manifest.json")):
        content = manifest.read(checkpoint)
        for name, entry in content["files"].items():
            if manifest.checksum(checkpoint / content["shards"] / name) != entry:
                fail(f"{checkpoint} has a manifest, and {name} is torn: what was committed was not whole")
    return max(committed(run), default=0)


def read(run: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by name, in one process."""
    folder = run / "checkpoints" / f"step_{step}"
    content = manifest.read(folder)
    reader = Reader(folder / content["shards"], content["files"])
    entries = reader.read_metadata().state_dict_metadata
    tensors = {n: torch.empty(e.size, dtype=e.properties.dtype) for n, e in entries.items() if hasattr(e, "properties")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no process group here is no surprise
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def losses(run: Path) -> dict[int, float]:
    """Losses by step; more than one line for a step is an error of the record."""
    found = [(row["step"], row["loss"]) for row in records.read_rows(run) if "loss" in row]
    if [step for step, _ in found] != list(range(len(found))):
        fail(f"{run}/metrics.jsonl has steps {[step for step, _ in found][:20]} …; expected each once, in order")
    return dict(found)


def wait(process: subprocess.Popen, options: argparse.Namespace, name: str, ready) -> bool:
    """Until `ready()`; False if the run ended by itself first. Exits where it failed, or nothing happens any more."""
    deadline = time.monotonic() + options.patience
    while not ready():
        if process.poll() is not None:
            if process.returncode:
                fail(f"an attempt ended with {process.returncode}; see {options.folder / name}.log")
            return False
        if time.monotonic() > deadline:
            kill(process)
            fail(f"no new step within {options.patience:.0f} s; see {options.folder / name}.log, or raise --patience")
        time.sleep(0.001)
    return True


def disturb(options: argparse.Namespace, dice: random.Random) -> list[dict]:
    """Attempts and kills, until enough; then the last attempt, which may end. One entry a kill."""
    run, kills = options.folder / "killed", []
    newest = 0
    with tqdm(total=options.kills, unit="kill", disable=None) as bar:
        while len(kills) < options.kills:
            torn, then = being_written(run), (attempt_of(run), newest)
            process = start(options, run.name)
            if wait(process, options, run.name, lambda then=then: goes_on(run, *then)):
                if len(kills) % 2:
                    wait(process, options, run.name, lambda torn=torn: being_written(run) - torn)
                else:
                    time.sleep(dice.uniform(0, options.within))
            if process.poll() is not None:
                if process.returncode == 0:
                    fail(f"all {options.steps} steps were done after {len(kills)} kills; raise --steps")
                fail(f"an attempt ended with {process.returncode}; see {options.folder / run.name}.log")
            kill(process)
            before, newest = newest, check(run)
            if newest < before:
                fail(f"checkpoint {before} was committed and is gone; the newest is {newest}")
            mid_save, lost = bool(being_written(run) - torn), steps_done(run) - newest
            kills.append({"mid_save": mid_save, "committed": newest, "lost": lost})
            bar.update()
    process = start(options, run.name)
    if process.wait():
        fail(f"the last attempt ended with {process.returncode}; see {options.folder / run.name}.log")
    return kills


def attempt_of(run: Path) -> str:
    """The name of the attempt that may commit; empty before the first."""
    file = run / "checkpoints" / "attempt"
    return file.read_text() if file.exists() else ""


def goes_on(run: Path, attempt_before: str, newest: int) -> bool:
    """A new attempt has begun, and done a step beyond the checkpoint."""
    return attempt_of(run) != attempt_before and steps_done(run) > newest


def table(result: dict) -> str:
    """The result in Markdown: how often it was killed, what had to be done again, how far the two runs are apart."""
    kills, apart = result["kills"], result["largest_difference"]
    lost = [kill["lost"] for kill in kills]
    cells = (
        f"`{result['script']}`", result["ranks"], result["steps"], len(kills), sum(kill["mid_save"] for kill in kills),
        f"{max(lost)} ({sum(lost) / len(lost):.1f}), of {result['every']}",
        f"{apart['loss']:.3g}", f"{apart['tensor']:.3g}",
    )  # fmt: skip
    return "\n".join([
        "| script | ranks | steps | kills | of them in a save | steps done again, at most (average), of those between "
        "two checkpoints | largest difference of a loss | of a weight or average |",
        "|---|" + "---:|" * 7,
        f"| {' | '.join(map(str, cells))} |",
        "",
        f"- {result['machine']}; torch {result['torch']}; {result['seconds']:.0f} s; commit {result['git_commit']}; "
        f"{result['date']}",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="a lesson's training script, such as fsdp/train.py")
    parser.add_argument("--kills", type=int, default=5, help="how often (default 5)")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--steps", type=int, help="of the run; default: enough for the kills")
    parser.add_argument("--every", type=int, default=2, help="steps between two checkpoints (default 2)")
    parser.add_argument("--within", type=float, default=1.0, help="random kills come within so many seconds (1.0)")
    parser.add_argument("--patience", type=float, default=120, help="seconds to wait for a new step (default 120)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default 0)")
    parser.add_argument("--output", type=to_path, help="also write the result as JSON")
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:at], argparse.Namespace(settings=words[at + 1 :]))
    if not Path(options.script).is_file():
        fail(f"there is no script {options.script}; expected one such as fsdp/train.py")
    if min(options.kills, options.ranks, options.every) < 1:
        fail(f"kills {options.kills}, ranks {options.ranks}, every {options.every}; expected 1 or more of each")
    options.steps = options.steps or 30 * options.kills + 30
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        process = start(options, "undisturbed")
        if process.wait():
            said = [line for line in (options.folder / "undisturbed.log").read_text().splitlines() if "error: " in line]
            fail(f"{options.script} ended with {process.returncode} by itself: {said[0] if said else 'no error line'}")
        kills = disturb(options, random.Random(options.seed))
        runs = options.folder / "undisturbed", options.folder / "killed"
        a, b = (read(run, options.steps) for run in runs)
        if a.keys() != b.keys():
            fail(f"the two runs' checkpoints have other names: {sorted(a.keys() ^ b.keys())[:5]}")
        weights = max((a[name].double() - b[name].double()).abs().max().item() for name in a)
        first, second = (losses(run) for run in runs)
        if first.keys() != second.keys():
            fail(f"{len(first)} steps undisturbed, {len(second)} with kills; expected the same")
        apart = max(abs(first[step] - second[step]) for step in first)
    result = {
        "benchmark": "kill_and_resume", "script": options.script, "ranks": options.ranks, "steps": options.steps,
        "every": options.every, "seed": options.seed, "kills": kills,
        "largest_difference": {"loss": apart, "tensor": weights}, "seconds": time.monotonic() - began,
        "torch": torch.__version__, "git_commit": git_commit(),
        "date": date(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }  # fmt: skip
    print(table(result))
    if options.output:
        write_json(result, options.output, "--output")
    lost = max(kill["lost"] for kill in kills)
    if max(apart, weights) > 1e-12:  # fp64; DDP at three ranks and more rebuilds its buckets, and last bits move
        fail("the run that was killed is not the undisturbed one")
    if lost > options.every:
        fail(f"{lost} steps lost; expected at most the {options.every} between two checkpoints")
    print(f"\n{len(kills)} kills of {options.ranks} ranks of {options.script}: nothing torn, nothing lost")


if __name__ == "__main__":
    main()
