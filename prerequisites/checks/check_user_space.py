"""May jobs write where they must, and is the environment on each node the one of the login node?

    srun --nodes=4 --ntasks-per-node=1 python prerequisites/checks/check_user_space.py torch=2.15.0    # in a Slurm job

The arguments are the packages of the login node. Tasks do not meet, so that a broken package cannot keep this check
from saying so. Task 0 prints all that it finds, the others what is not as it should be.
"""

import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

from reporting import (
    GIB,
    ROOT,
    Result,
    check_imports,
    check_packages,
    check_python,
    check_tokens,
    exit_code,
    file_system,
    installed,
    line,
    ok,
    output,
    problem,
    warning,
)


def check_writable(name: str, folder: Path) -> list[Result]:
    """Write and sync one mebibyte: a full disk and a used-up quota show only then. Then what is left."""
    try:
        with tempfile.TemporaryFile(prefix=".check-", dir=folder) as file:
            file.write(os.urandom(2**20))
            file.flush()
            os.fsync(file.fileno())
        free, left = shutil.disk_usage(folder).free, os.statvfs(folder).f_favail
    except OSError as error:
        advice = "quota, permissions, or the mount on this node; see df -h and quota -s there"
        return [problem(name, f"{folder} cannot be written to: {error.strerror}", advice)]
    found = f"{folder}, {file_system(folder)}, can be written to; {free / GIB:.0f} GiB"
    found += f" and {left:,} files left" if left else " left"
    if free < GIB:
        return [warning(name, found, "remove what you do not need, or work on scratch")]
    return [ok(name, found)]


def check_quota() -> list[Result]:
    """The last line of `quota`, where there is such a command."""
    if not shutil.which("quota"):
        return [ok("quota", "no command quota here; your site's documentation names its own")]
    code, text = output(["quota", "-s"])
    last = " ".join((text.splitlines() or ["none"])[-1].split())
    if code:
        return [warning("quota", f"quota -s: {last}", "you may be over a limit")]
    return [ok("quota", last)]


def check_modules() -> list[Result]:
    """Which modules are loaded; job_env.sh has ended the job if one of the profile's could not be."""
    loaded = os.environ.get("LOADEDMODULES", "").replace(":", ", ")
    return [ok("modules", f"{loaded or 'none loaded'}, by profile {os.environ.get('CLUSTER') or 'default'}")]


def judge_versions(login: dict[str, str], here: dict[str, str]) -> list[Result]:
    """The login node's packages against those on this node, both name → version."""
    if not login:
        return [ok("versions", "not compared with the login node's: prerequisites/run_checks.py does that")]
    different = [
        f"{name} {here.get(name, 'missing')}, there {version}"
        for name, version in login.items()
        if here.get(name) != version
    ]
    if different:
        advice = "let both use one environment: VENV, or the same module"
        return [problem("versions", f"not those of the login node: {'; '.join(different)}", advice)]
    return [ok("versions", f"{len(login)} packages are those of the login node")]


def main() -> int:
    """The exit code: 0 without problems on this node, 1 with."""
    login = dict(argument.split("=", 1) for argument in sys.argv[1:])
    here = {name: version for name in login if (version := installed(name)) is not None}
    results = [
        *check_python(),
        *check_packages(),
        *judge_versions(login, here),
        *check_imports(),
        *check_writable("home folder", Path.home()),
        *check_writable("project folder", ROOT),
        *check_quota(),
        *check_modules(),
        *check_tokens(),
    ]
    host, first = socket.gethostname(), os.environ.get("SLURM_PROCID", "0") == "0"
    shown = results if first else [result for result in results if result.status != "ok"]
    lines = [f"{line(result)}  [{host}]" for result in shown]
    if not first and not shown:
        lines = [line(ok("user space", f"all {len(results)} facts are as they should be  [{host}]"))]
    print("\n".join(lines), flush=True)
    return exit_code(results)


if __name__ == "__main__":
    sys.exit(main())
