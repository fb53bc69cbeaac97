"""Lessons have files of the same names; a script must find those of its own folder, whatever was imported before."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def own_folder(script: Path) -> Iterator[None]:
    """The script's folder on the path, as python has it, and no module of another folder in its files' place."""
    folder = str(script.parent)

    def is_of_it(name: str) -> bool:
        return (getattr(sys.modules[name], "__file__", None) or "").startswith(f"{folder}/")

    names = {path.stem for path in script.parent.glob("*.py")} & set(sys.modules)
    hidden = {name: sys.modules.pop(name) for name in names if not is_of_it(name)}
    before = set(sys.modules)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - before:
            if is_of_it(name):
                del sys.modules[name]
        sys.modules.update(hidden)
