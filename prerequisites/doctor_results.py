"""What a check gives, and what all checks use: commands, files and numbers that this project has not written."""

from __future__ import annotations  # so that an old Python gets as far as being told that it is too old

import contextlib
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30


@dataclass(frozen=True)
class Result:
    """One finding. `status`: ok, warning (works, but …) or problem (will fail); `advice`: what to do unless ok."""

    name: str
    status: str
    found: str
    advice: str = ""


def ok(name: str, found: str) -> Result:
    return Result(name, "ok", found)


def warning(name: str, found: str, advice: str) -> Result:
    return Result(name, "warning", found, advice)


def problem(name: str, found: str, advice: str) -> Result:
    return Result(name, "problem", found, advice)


def output(command: list[str], timeout_s: float = 10) -> tuple[int, str]:
    """(exit code, what the command printed); 127 where there is no such command, 124 when it took too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout_s, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return 124, f"no answer within {timeout_s:g} s"
    except OSError as error:
        return 127, str(error)
    return done.returncode, (done.stdout if done.returncode == 0 else done.stdout + done.stderr).strip()


def read(path: Path) -> str:
    """The text of a file that this project has not written, whatever its encoding; "" where it cannot be read."""
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace")
    return ""


def count(value: str | None, otherwise: int = 0) -> int:
    """The number in a launcher's or Slurm's variable: `2`, `2(x3),1` and `gpu:a100:2(S:0)` → 2."""
    found = re.match(r"(?:[^(,]*:)?([0-9]{1,9})(?=$|[(,])", (value or "").strip())
    return int(found[1]) if found else otherwise


def size(value: float) -> str:
    """Bytes as a reader likes them."""
    return (
        "unlimited" if value == float("inf") else f"{value / GIB:.1f} GiB" if value >= GIB else f"{value / 2**20:g} MiB"
    )
