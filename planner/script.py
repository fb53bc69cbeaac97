"""A lesson's script as a module, and the settings that it takes."""

import contextlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from common import config as settings
from common.ranks import fail


@contextlib.contextmanager
def loaded(script: Path) -> Iterator[ModuleType]:
    """The script as a module, its folder on the path as python has it; then both are forgotten."""
    folder = str(script.resolve().parent)
    names = {path.stem for path in Path(folder).glob("*.py")} & set(sys.modules)
    hidden = {name: sys.modules.pop(name) for name in names}  # another lesson may have a file of the same name
    before = set(sys.modules)
    sys.path.insert(0, folder)
    try:
        spec = importlib.util.spec_from_file_location(f"dry_run_of_{script.stem}", script)
        if spec is None or spec.loader is None or not script.is_file():
            fail(f"{script}: no such script; expected a lesson's, such as fsdp/train.py; give its path")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where settings look up their types
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - before:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(folder + "/"):
                del sys.modules[name]
        sys.modules.update(hidden)


def config_class(lesson: ModuleType, script: Path) -> type:
    """The settings that the script's `main` takes."""
    main = getattr(lesson, "main", None)
    kinds = [p.annotation for p in inspect.signature(main).parameters.values()] if callable(main) else []
    takes_settings = len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], settings.Config)
    if not takes_settings or not hasattr(lesson, "Run"):  # which is what tells where a step begins
        fail(f"{script} has no main(config) that trains the transformer; expected a lesson's train.py or its like")
    return kinds[0]
