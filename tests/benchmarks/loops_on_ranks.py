"""What the ranks of a `group` run for tests/benchmarks/test_loop_overhead.py: loops that are made to differ."""

import contextlib
import io
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from rank_worker import starts_its_own_group

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import loop_overhead


@starts_its_own_group
def compare(who: str) -> tuple[int, str]:
    """Exit code and stderr of the benchmark when rank 1 alone changes one bit of a model in the loop `who`."""
    loop = getattr(loop_overhead.Contest, who)

    def changing(self):
        for step, _ in enumerate(loop(self), 1):
            if step == 8 and self.ranks.rank == 1:
                weight = getattr(self, {"ours": "our_model", "bare": "bare_model"}[who]).norm.weight
                with torch.no_grad():
                    weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
            yield

    stderr, code = io.StringIO(), 0
    setattr(loop_overhead.Contest, who, changing)
    sys.argv = ["loop_overhead.py", "--sizes", "mini", "--pairs", "3", "--steps", "2"]
    try:
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
            loop_overhead.main()
    except SystemExit as ended:
        code = ended.code
    finally:
        setattr(loop_overhead.Contest, who, loop)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code, stderr.getvalue()
