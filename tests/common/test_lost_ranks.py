"""A rank that was stopped, hangs or has ended: the others name it in one line, soon after `timeout_s`."""

import re
import signal

import pytest
from equality import SMALL
from launching import ROOT, OnRanks

from common.launching import lost_ranks

ON_RANKS = OnRanks("tests/common/lost_on_ranks.py")


@pytest.mark.parametrize(("size", "who", "subgroup"), [(2, 1, False), (3, 0, True)])
def test_who_is_missing(group, size, who, subgroup):
    """In a group that was made without a timeout, too: torch would wait half an hour."""
    answers = group(size)(ON_RANKS.one_does_not_come, who, subgroup)
    assert answers.pop(who) is None
    lines = {line for _, line, _ in answers}
    assert len(lines) == 1, "the ranks contradict each other"
    pattern = rf"lost rank {who} \(\S+, process \d+\): .* waited for it in all_reduce, step 7, tests/common/lost"
    assert re.match(pattern, lines.pop())
    assert all(recognized and missing == [who] for recognized, _, missing in answers)


def test_ranks_that_wait_for_each_other_in_two_places(group):
    (line,) = set(group(2)(ON_RANKS.two_places))
    assert re.search(r"rank 0 in all_reduce, tests/.*; rank 1 in recv, tests/", line)


@pytest.mark.parametrize(("error", "lost"), [
    (RuntimeError("Application timeout caused pair closure"), True),
    (RuntimeError("[/src/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:5"), True),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    (RuntimeError("DataLoader timed out after 5 seconds"), False), (ValueError("Timed out waiting"), False),
])  # fmt: skip
def test_which_exceptions_are_of_lost_ranks(error, lost):
    assert lost_ranks.is_lost(error) == lost
    wrapped = KeyError("stage 0")
    wrapped.__cause__ = error
    assert lost_ranks.is_lost(wrapped) == lost, "pipelines wrap what a collective raises"


@pytest.mark.slow  # 20 s: a real stop under torchrun, which the cheap tests above do not see
def test_a_stopped_rank_under_torchrun(launch, tmp_path):
    """All ranks end with one and the same line, without a traceback, and torchrun does not wait for the stopped one."""
    script = tmp_path / "stops.py"
    script.write_text(
        "import os, runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'ddp')!r})\n"
        "from common.run import Run\n"
        "log = Run.log\n"
        "def log_or_stop(self, step, *rest):\n"
        "    if step == 3 and self.ranks.rank == 1:\n"
        f"        os.kill(os.getpid(), {signal.SIGSTOP:d})\n"
        "    log(self, step, *rest)\n"
        "Run.log = log_or_stop\n"
        f"runpy.run_path({str(ROOT / 'ddp/train.py')!r}, run_name='__main__')\n"
    )
    ended = launch(script, *SMALL, "--train.steps", "4000", "--timeout_s", "5", check=False)
    lines = re.findall(r"\[rank (\d)\] error: (lost rank 1 \(.* step 4, .*)", ended.stderr)
    assert {rank for rank, _ in lines} == {"0", "1"} and len({line for _, line in lines}) == 1, ended.stderr[-3000:]
    assert "forcefully exiting" not in ended.stderr
    assert not re.search(r"\[rank\d\]: Traceback", ended.stderr)
