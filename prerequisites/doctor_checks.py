"""The checks of one machine by name, a function each."""

from __future__ import annotations  # so that an old Python gets as far as being told that it is too old

import argparse
from functools import partial

from doctor_folders import check_folders
from doctor_gpus import check_torch
from doctor_limits import check_cores, check_limits, check_memory, check_shared_memory
from doctor_network import check_network, check_ports
from doctor_packages import check_imports, check_packages, check_python, check_shadows
from doctor_results import Result, problem
from doctor_slurm import check_slurm, check_tokens


def checks_of_rank(sharing: int | None = None) -> list[tuple]:
    """(name, function) of what may differ from process to process. `sharing`: ranks on the same cores, if known."""
    cores = partial(check_cores, sharing)
    return [("python", check_python), ("cores", cores), ("limits", check_limits)]


def checks_of_host(options: argparse.Namespace) -> list[tuple]:
    """(name, function) of what one process examines for all on its machine."""
    return [
        ("packages", check_packages),
        ("imports", check_imports),
        ("shadows", check_shadows),
        ("torch", check_torch),
        ("network", check_network),
        ("ports", check_ports),
        ("shared memory", check_shared_memory),
        ("memory", check_memory),
        ("folders", partial(check_folders, options.runs, options.data)),
        ("slurm", check_slurm),
        ("tokens", check_tokens),
    ]


def examine(some: list[tuple]) -> list[Result]:
    """Run checks; one that crashes becomes a problem with its name, and the others go on."""
    results = []
    for name, function in some:
        try:
            results += function()
        except ModuleNotFoundError as error:
            results.append(problem(name, f"cannot be checked without the package {error.name}", "make venv"))
        except Exception as error:
            found = f"this check crashed: {type(error).__name__}: {' '.join(str(error).split())}"
            results.append(problem(name, found, "report it, with the output of doctor.py --json"))
    return results
