"""What the ranks of a `group` run for the tests of collectives/debugging: one of its programs, as it stands."""

import contextlib
import io
import os
import re
import time
from unittest import mock

import scripts_on_ranks
import torch.distributed as dist
from launching import LAUNCHER_VARIABLES
from rank_worker import starts_its_own_group

PATIENCE_S = 20.0  # for the other ranks to end


@starts_its_own_group
def program(command: str) -> tuple[int, str]:
    """Run a command as the page abbreviates it: variables, the program, its options. Exit code, and what it said.

    The program ends a rank by os._exit, after a sleep in which the others can speak: here it returns, and its
    connections stay until all ranks have.
    """
    words = command.split()
    variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    script, *options = words[len(variables) :]
    said, code, store = io.StringIO(), 0, None
    join_group = dist.init_process_group

    def keep_store(*args, **kwargs):
        nonlocal store
        join_group(*args, **kwargs)
        store = dist.distributed_c10d._get_default_store()

    with (
        mock.patch.dict(os.environ, variables),
        mock.patch.object(os, "_exit", _raise_exit),
        mock.patch.object(time, "sleep"),
        mock.patch.object(dist, "init_process_group", keep_store),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        if script == "joining.py":  # it sets what a launcher would
            for name in LAUNCHER_VARIABLES:
                os.environ.pop(name, None)
        dist.set_debug_level_from_env()
        try:
            scripts_on_ranks.train(f"collectives/debugging/{script}", options)
        except SystemExit as ended:
            code = ended.code
    if store is not None:
        _wait_for_all(store, int(os.environ["WORLD_SIZE"]))
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.set_debug_level_from_env()
    return code, said.getvalue()


def _raise_exit(code: int) -> None:
    raise SystemExit(code)


def _wait_for_all(store: dist.Store, ranks: int) -> None:
    """Return when all ranks are here; the first one serves the store, and leaves last."""
    deadline = time.monotonic() + PATIENCE_S
    store.add("ended", 1)
    while store.add("ended", 0) < ranks and time.monotonic() < deadline:
        time.sleep(0.01)
    if store.add("seen", 1) < ranks and os.environ["RANK"] == "0":
        while store.add("seen", 0) < ranks and time.monotonic() < deadline:
            time.sleep(0.01)
