"""What surrounds a script, changed for one run of it: environment variables, and which packages are installed."""

import contextlib
import os
from collections.abc import Iterator
from importlib import metadata

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PLAIN_PYTHON = dict.fromkeys(LAUNCHER)  # no launcher has set anything


@contextlib.contextmanager
def variables(changes: dict[str, str | None]) -> Iterator[None]:
    """Set environment variables (None removes one); afterwards the whole environment is as it was."""
    before = dict(os.environ)
    for name, value in changes.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def without_package(package: str) -> Iterator[None]:
    """Let `importlib.metadata` find every installed package but this one."""
    version = metadata.version

    def of_the_others(name: str) -> str:
        if name == package:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    metadata.version = of_the_others
    try:
        yield
    finally:
        metadata.version = version
