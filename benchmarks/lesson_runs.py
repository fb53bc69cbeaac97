"""Start a lesson's script and read the run folder that it leaves."""

import math
import os
import re
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.ranks import fail
from common.runs import manifest, records


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
        record, rows = records.read_record(folder), records.read_rows(folder)
    except ValueError as error:
        fail(str(error))
    except FileNotFoundError as error:
        name = Path(str(error.filename)).name
        fail(f"the script ended well but left no {name} in {folder}; expected a run folder of common/run.py")
    rows = [row for row in rows if "step_seconds" in row]
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
