"""One rank of a group that stays up for a whole test session: reads calls from stdin, answers on stdout.

Started by the `group` fixture in conftest.py. A call is (port, file, function name, arguments); the function runs on
all ranks inside one Gloo process group and may use any collective. A function with the attribute `joins_itself`
finds no group but the environment that torchrun would set: so a script's own main() can run here.
"""

import contextlib
import importlib.util
import io
import os
import pickle
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists, which it would keep alive: see common/ranks.py


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


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a case prints must not get among the answers
    torch.set_num_threads(1)
    while True:
        try:
            port, path, name, args = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        os.environ["MASTER_PORT"] = str(port)
        stderr = io.StringIO()
        try:
            function = getattr(load(path), name)
            if getattr(function, "joins_itself", False):
                leave()
            elif not dist.is_initialized():
                dist.init_process_group("gloo")
            with contextlib.redirect_stderr(stderr):
                answer = ("ok", function(*args))
        except BaseException as error:  # a SystemExit too is an answer
            answer = ("failed", f"{type(error).__name__}: {error}\n{stderr.getvalue()}{traceback.format_exc()}")
        pickle.dump(answer, answers)
        answers.flush()
    leave()


def leave() -> None:
    """Destroy the group, if there is one, when all ranks are done with it."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
