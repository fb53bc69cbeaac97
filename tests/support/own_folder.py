"""Lessons have files of the same names; a script must find those of its own folder, whatever was imported before."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def own_folder(script: Path) -> Iterator[None]:
    """The script's folder on the path, as python has it, and no module of another folder in its files' place."""
    forget_meshes()
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


def forget_meshes() -> None:
    """What DTensor has worked out for a mesh names its process groups; those of an equal mesh of a later script differ.

    Only here do several scripts run in one process, one process group after the other.
    """
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import _redistribute
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()
        _redistribute._gen_transform_infos.cache_clear()
        _redistribute.clear_redistribute_planner_cache()
