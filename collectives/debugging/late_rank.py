"""One rank comes to an all-reduce after the others' timeout: they give up, and it finds nobody there.

    torchrun --nproc-per-node=2 collectives/debugging/late_rank.py                    # fails after two seconds
    torchrun --nproc-per-node=2 collectives/debugging/late_rank.py --timeout_s 30     # the same, with patience

The rank whose message speaks of a timeout was there. The one that was late speaks of a lost connection.
"""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from reporting import attempt, impatient_group, say
from torch.distributed.elastic.multiprocessing.errors import record

from common.config import parse
from common.ranks import fail, join


@dataclass
class LateConfig:
    timeout_s: float = 2.0
    """How long a rank waits for the others in a collective; scripts of this project say --timeout_s too."""
    late_s: float = 2.5
    """How much later than the others the last rank comes."""


@record
def main(config: LateConfig) -> None:
    if not (0 < config.timeout_s <= 1e6 and 0 <= config.late_s <= 10):
        fail(f"timeout_s = {config.timeout_s} and late_s = {config.late_s}; allowed: above 0 to 1e6, and 0 to 10")
    ranks = join("cpu", timeout_s=60)
    if ranks.world_size < 2:
        fail("one process is never late; start several with torchrun --nproc-per-node=2")
    group = impatient_group(config.timeout_s)
    if ranks.rank == ranks.world_size - 1:
        time.sleep(config.late_s)
    ones = torch.ones(1000)
    attempt(ranks.rank, lambda: dist.all_reduce(ones, group=group))
    say(ranks.rank, f"all have come: {ones[0].item():.0f} ranks")
    attempt(ranks.rank, ranks.leave)


if __name__ == "__main__":
    main(parse(LateConfig))
