"""One rank of a group that stays up for many tests: receives calls, sends answers.

Started by `launching.Group`. A call is (port, file, function name, arguments); the function runs on all ranks
inside one Gloo process group and may use any collective. A function marked `@starts_its_own_group` finds no group but
the environment that torchrun would set: so a script's own main() can run here.
"""

import contextlib
import gc
import importlib.util
import io
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path


def starts_its_own_group(function: Callable) -> Callable:
    """Mark a function that joins a process group by itself, as a script does."""
    function.starts_its_own_group = True  # type: ignore[attr-defined]
    return function


def load(path: str):
    """Import a file by its path, once."""
    name = "case_" + path.replace(os.sep, "_").replace(".", "_")
    if name not in sys.modules:
        sys.path.insert(0, str(Path(path).parent))  # so that cases find files of their own folder
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def main(calls: Connection, environment: dict[str, str]) -> None:
    """Answer calls until the other end is closed."""
    gc.freeze()  # what the server has imported is no garbage: neither look at it again, nor copy its pages
    import torch  # here, not at the top: the process that forks ranks by this file need not import it
    import torch.distributed as dist

    os.environ.clear()
    os.environ.update(environment)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  (the fork server has closed its own)
    torch.set_num_threads(1)
    while True:
        try:
            call = calls.recv()
        except EOFError:
            break
        if call is None:  # ranks that were forked later hold the other end open too
            break
        port, path, name, args = call
        os.environ["MASTER_PORT"] = str(port)
        before = dict(os.environ)
        stderr = io.StringIO()
        try:
            function = getattr(load(path), name)
            if getattr(function, "starts_its_own_group", False):
                leave()
            elif not dist.is_initialized():
                dist.init_process_group("gloo")
            with contextlib.redirect_stderr(stderr):
                state, result = "ok", function(*args)
        except BaseException as error:  # a SystemExit too is an answer
            state = "failed"
            result = f"{type(error).__name__}: {error}\n{stderr.getvalue()}{traceback.format_exc()}"
        os.environ.clear()  # a script may have set variables for the libraries; the next one finds none of them
        os.environ.update(before)
        calls.send((state, result, dist.is_initialized()))
    leave()


def leave() -> None:
    """Destroy the group, if there is one, when all ranks are done with it."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
