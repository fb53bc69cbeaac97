"""Is this machine, this environment, this set of nodes ready for the lessons? One line a check, and what to do.

    python prerequisites/doctor.py                                   # here: a few seconds, `0 problems` at the end
    torchrun --nproc-per-node=2 prerequisites/doctor.py              # two ranks meet and compare themselves
    srun --nodes=4 --ntasks-per-node=1 python prerequisites/doctor.py     # and so do the nodes of a cluster

`ok`: as it should be. `warning`: it works, but slowly, or not everywhere. `problem`: something will fail. Exit code 0
without problems, 1 with, 2 for wrong usage and when the ranks do not find each other; the same on all ranks that met.
The checks of one machine are listed in `doctor_checks.py`; `doctor_together.py` has those of ranks that have met.
"""

from __future__ import annotations  # so that an old Python gets as far as being told that it is too old

import argparse
import os
import socket
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # `common`, even where it is not installed; never first

from doctor_checks import checks_of_host, checks_of_rank, examine
from doctor_output import exit_code, line, print_json, summary
from doctor_packages import check_python, installed
from doctor_results import problem
from doctor_together import together

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
OLD = sys.version_info < (3, 11)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="doctor.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--json", action="store_true", help="one JSON object in place of lines")
    add("--runs", type=Path, default=Path(os.environ.get("RUNS_DIR", "runs")), help="run folder (RUNS_DIR, else runs)")
    add("--data", type=Path, default=Path("data"), help="folder of your data (default: data)")
    add("--timeout", type=float, default=60, help="seconds to wait for a missing rank (default: 60)")
    options = parser.parse_args()
    if options.timeout <= 0:
        parser.error(f"--timeout {options.timeout:g} is no time to wait; give seconds above 0")
    if options.data != Path("data") and not options.data.is_dir():
        parser.error(f"--data {options.data}: there is no such folder")
    return options


def main() -> int:
    """The exit code: 0 without problems, 1 with."""
    options = parse_arguments()
    host, local = socket.gethostname(), os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    launched = any(name in os.environ for name in LAUNCHED) or os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"
    results = []
    if OLD:
        results = check_python()
    elif launched and installed("torch"):
        try:
            from common import ranks
        except Exception as error:  # of any kind: torch is broken, and the checks will say how
            advice = "the line on torch says more; until then ranks cannot join"
            results = [problem("ranks", f"cannot import common.ranks: {type(error).__name__}", advice)]
        else:
            return together(options, ranks)
    if launched and local != "0":
        print(f"problem: local rank {local} cannot join the others; see the first rank of {host}", file=sys.stderr)
        return 1
    if not OLD:
        results += examine(checks_of_rank() + checks_of_host(options))
    if options.json:
        print_json([(result, 0) for result in results], [host], {"world_size": 1, "common": {}, "differences": {}})
    else:
        print("\n".join(map(line, results)))
        print(f"\n{summary(results)}", flush=True)
    return exit_code(results)


if __name__ == "__main__":
    sys.exit(main())
