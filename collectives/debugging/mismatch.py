"""One rank calls another collective than the others, or with another shape, type or operation.

    torchrun --nproc-per-node=2 collectives/debugging/mismatch.py --what shape
    TORCH_DISTRIBUTED_DEBUG=DETAIL torchrun --nproc-per-node=2 collectives/debugging/mismatch.py --what shape

The last rank is the odd one. Compare what is said with and without DETAIL: some mismatches raise no error at all.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from reporting import attempt, impatient_group, say
from torch.distributed.elastic.multiprocessing.errors import record

from common.config import parse
from common.ranks import fail, join


@dataclass
class MismatchConfig:
    what: Literal["collective", "shape", "dtype", "operation"] = "shape"
    """What the last rank does otherwise."""


@record
def main(config: MismatchConfig) -> None:
    ranks = join("cpu", timeout_s=60)
    if ranks.world_size < 2:
        fail("one process cannot disagree with itself; start several with torchrun --nproc-per-node=2")
    group = impatient_group(3)
    odd = ranks.rank == ranks.world_size - 1
    tensor = torch.ones(8 if odd and config.what == "shape" else 4)
    if odd and config.what == "dtype":
        tensor = tensor.int()
    if odd and config.what == "operation":
        attempt(ranks.rank, lambda: dist.all_reduce(tensor, dist.ReduceOp.MAX, group))
    elif odd and config.what == "collective":
        attempt(ranks.rank, lambda: dist.broadcast(tensor, src=0, group=group))
    else:
        attempt(ranks.rank, lambda: dist.all_reduce(tensor, group=group))
    say(ranks.rank, f"no error, and the sum of {ranks.world_size} ones is {tensor.tolist()}")
    attempt(ranks.rank, ranks.leave)


if __name__ == "__main__":
    main(parse(MismatchConfig))
