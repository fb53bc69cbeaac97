"""Ranks of which one does not come, and what the others say of it."""

import torch
import torch.distributed as dist
from ended_together import wait_for_all
from rank_worker import starts_its_own_group

from common.launching import lost_ranks
from common.ranks import join


def end() -> None:
    wait_for_all()
    dist.destroy_process_group()


@starts_its_own_group
def one_does_not_come(who: int, subgroup: bool) -> tuple[bool, str, list[int]] | None:
    """Whether the exception is recognized, the line, and the missing ranks; None from the missing one."""
    ranks = join("cpu", 2.0)
    group = dist.new_group() if subgroup else None  # as a mesh makes them: without a timeout
    lost_ranks.note_step(7)
    lost_ranks.PATIENCE_S, patience = 1.0, lost_ranks.PATIENCE_S
    said = None
    if ranks.rank != who:
        try:
            dist.all_reduce(torch.zeros(1), group=group)
        except RuntimeError as error:
            said = (lost_ranks.is_lost(error), *lost_ranks.explain(error))
    end()
    lost_ranks.PATIENCE_S = patience
    return said


@starts_its_own_group
def two_places() -> str:
    """One rank reduces, the other one waits at a barrier."""
    ranks = join("cpu", 2.0)
    try:
        dist.all_reduce(torch.zeros(4)) if ranks.is_main else dist.recv(torch.zeros(4), 0)
    except RuntimeError as error:
        line, missing = lost_ranks.explain(error)
    end()
    assert missing == []
    return line
