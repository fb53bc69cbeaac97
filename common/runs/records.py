"""The files of a run folder, written so that a crash leaves the old or the new one, and read with a line for a damaged
one. Knows nothing of torch."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

from common.strict_files import read_json, read_yaml

Row = dict[str, Any]


def sync_folder(folder: Path) -> None:
    """Bring the names of a folder's files to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that, whenever the process or the machine dies, the old or the new one is there."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # before the name: some file systems keep the order of neither
    temporary.replace(path)
    sync_folder(path.parent)


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write config.yaml."""
    write_whole(folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False))


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write run.json."""
    write_whole(folder / "run.json", json.dumps(record, indent=1) + "\n")


def _read_mapping(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    try:
        tree = read_yaml(path) if path.suffix == ".yaml" else read_json(path)
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        advice = f"remove it (rm {shlex.quote(str(path))}), and start the run again: it writes a new one"
        kind = path.suffix[1:].upper()
        raise ValueError(f"{path} ({size} bytes) holds no {kind}, as after a crash of the machine; {advice}")
    return tree


def read_settings(folder: Path) -> dict[str, Any]:
    """Read config.yaml. ValueError: it is damaged. OSError: it cannot be read."""
    return _read_mapping(folder / "config.yaml")


def read_record(folder: Path) -> dict[str, Any]:
    """Read run.json. ValueError: it is damaged. OSError: it cannot be read."""
    return _read_mapping(folder / "run.json")


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
        value = row["loss"] if "loss" in row else row["val_loss"]
        return row if isinstance(row["step"], int) and isinstance(value, int | float) else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def read_rows(folder: Path) -> list[Row]:
    """Read metrics.jsonl: rows of steps (`loss`) and of evaluations (`val_loss`). OSError: it cannot be read.

    Lines that a crash has torn, or filled with zero bytes, are left out, and a warning on stderr counts them.
    """
    path = folder / "metrics.jsonl"
    found = [_row(line) for line in path.read_bytes().splitlines()]
    if damaged := found.count(None):
        print(f"warning: {path}: {damaged} damaged lines of {len(found)} are left out", file=sys.stderr, flush=True)
    return [row for row in found if row is not None]
