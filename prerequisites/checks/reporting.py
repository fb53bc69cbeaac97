"""What the checks share: results in the doctor's form, of all ranks, printed once."""

import socket
import sys
from pathlib import Path
from typing import NoReturn

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the doctor's files

import doctor_checks as checks
from doctor import exit_code, line, merged
from doctor_checks import Result, ok, problem, warning

from common.ranks import Ranks

__all__ = ["Result", "checks", "exit_code", "finish", "line", "ok", "problem", "warning"]


def finish(results: list[Result], me: Ranks) -> NoReturn:
    """Print the results of all ranks, equal ones once, and end this rank: 1 on all ranks with a problem on any."""
    reports = me.all_gather((socket.gethostname(), results))
    hosts = [host for host, _ in reports]
    found = [(result, rank) for rank, (_, some) in enumerate(reports) for result in some]
    if me.is_main:
        print("\n".join(merged(found, hosts)), flush=True)
    me.leave()
    raise SystemExit(exit_code([result for result, _ in found]))
