"""What the checks share: results in the doctor's form, of all ranks, printed once."""

import socket
import sys
from pathlib import Path
from typing import NoReturn

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the doctor's files

from doctor_folders import check_folder, file_system
from doctor_output import exit_code, line, merged
from doctor_packages import check_imports, check_packages, check_python, installed
from doctor_results import GIB, ROOT, Result, count, ok, output, problem, warning
from doctor_slurm import check_tokens

from common.ranks import Ranks

__all__ = [
    "GIB",
    "ROOT",
    "Result",
    "check_folder",
    "check_imports",
    "check_packages",
    "check_python",
    "check_tokens",
    "count",
    "exit_code",
    "file_system",
    "finish",
    "installed",
    "line",
    "ok",
    "output",
    "problem",
    "warning",
]


def finish(results: list[Result], me: Ranks) -> NoReturn:
    """Print the results of all ranks, equal ones once, and end this rank: 1 on all ranks with a problem on any."""
    reports = me.all_gather((socket.gethostname(), results))
    hosts = [host for host, _ in reports]
    found = [(result, rank) for rank, (_, some) in enumerate(reports) for result in some]
    if me.is_main:
        print("\n".join(merged(found, hosts)), flush=True)
    me.leave()
    raise SystemExit(exit_code([result for result, _ in found]))
