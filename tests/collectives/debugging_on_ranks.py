"""What the ranks of a `group` run for the tests of collectives/debugging: one of its programs, as it stands."""

import contextlib
import io
import os
import re
import time
from unittest import mock

import scripts_on_ranks
import torch.distributed as dist
from ended_together import wait_for_all
from launching import LAUNCHER_VARIABLES
from rank_worker import starts_its_own_group


@starts_its_own_group
def program(command: str) -> tuple[int, str]:
    """Run a command as the page abbreviates it: variables, the program, its options. Exit code, and what it said.

    The program ends a rank by os._exit, after a sleep in which the others can speak: here it returns, and its
    connections stay until all ranks have.
    """
    words = command.split()
    variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    script, *options = words[len(variables) :]
    said, code = io.StringIO(), 0
    with (
        mock.patch.dict(os.environ, variables),
        mock.patch.object(os, "_exit", _raise_exit),
        mock.patch.object(time, "sleep"),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        if script == "joining.py":  # it sets what a launcher would
            for name in (*LAUNCHER_VARIABLES, "TORCHELASTIC_USE_AGENT_STORE"):
                os.environ.pop(name, None)
        dist.set_debug_level_from_env()
        try:
            scripts_on_ranks.train(f"collectives/debugging/{script}", options)
        except SystemExit as ended:
            code = ended.code
    if dist.is_initialized():
        wait_for_all()
        dist.destroy_process_group()
    dist.set_debug_level_from_env()
    return code, said.getvalue()


def _raise_exit(code: int) -> None:
    raise SystemExit(code)
