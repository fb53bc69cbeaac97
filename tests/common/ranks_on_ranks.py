"""What the ranks of a `group` run for the tests of common/."""

import contextlib
import io
import os
from pathlib import Path

import torch
import torch.distributed as dist
from rank_worker import starts_its_own_group

from common.ranks import Ranks, fail, join


def here() -> Ranks:
    """The Ranks of the group that the test started."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return Ranks(rank, size, rank, size, "test", torch.device("cpu"))


def ended(function, *args):
    """The exit code and the words with which a call ends."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        try:
            function(*args)
        except SystemExit as error:
            return error.code, stderr.getvalue()
    return 0, stderr.getvalue()


@contextlib.contextmanager
def environment(variables):
    """Set these variables for a while."""
    kept = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def fails_with_error_file(folder, message):
    with environment({"TORCHELASTIC_ERROR_FILE": str(Path(folder, f"error_{dist.get_rank()}.json"))}):
        return ended(fail, message)


def one_has_a_problem(who):
    ranks = here()
    return ended(ranks.fail_together, f"rank {who} has it" if ranks.rank == who else None)


def gathered():
    ranks = here()
    return ranks.all_gather(ranks.rank), ranks.broadcast(f"of rank {ranks.rank}")


def first_answers(wrong):
    """How `first_or_fail` ends, and what it returns."""
    ranks, answers = here(), []

    def work():
        if wrong:
            raise ValueError(f"not possible on rank {ranks.rank}")
        return f"called on rank {ranks.rank}"

    return *ended(lambda: answers.append(ranks.first_or_fail(work))), answers


@starts_its_own_group
def joins(variables, timeout_s):
    """How joining ends in an environment with these variables."""

    def join_and_leave():
        join("cpu", timeout_s).leave()

    with environment(variables):
        return ended(join_and_leave)


@starts_its_own_group
def variables_at_start(profile):
    """What NCCL would find in its environment when the group is made."""
    seen, start = {}, dist.init_process_group

    def starting(*args, **kwargs):
        seen.update({name: os.environ.get(name) for name in ("NCCL_IB_DISABLE", "NCCL_DEBUG")})
        start(*args, **kwargs)

    with environment({}):
        for name in ("NCCL_IB_DISABLE", "NCCL_DEBUG"):
            os.environ.pop(name, None)
        dist.init_process_group = starting
        try:
            join("cpu", 60, profile).leave()
        finally:
            dist.init_process_group = start
    return seen


@starts_its_own_group
def timeout_of_a_group(timeout_s: float) -> float:
    """Seconds that a group waits which is made without a timeout, as a mesh makes its own."""
    ranks = join("cpu", timeout_s)
    group = dist.new_group(list(range(ranks.world_size)))
    seconds = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    ranks.leave()
    return seconds
