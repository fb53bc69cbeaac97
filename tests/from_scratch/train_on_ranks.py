"""What the ranks of a `group` run for the tests of train.py: the script as it stands, watched or disturbed."""

from collections import Counter

import scripts_on_ranks
import torch
import torch.distributed as dist
from rank_worker import starts_its_own_group
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

SCRIPT = "from_scratch/train.py"
# Which of the arguments is what this rank sends.
SENT = {
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::_allgather_base_": ("all-gather", 1),
    "c10d::allgather_": ("all-gather", 1),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::send": ("send", 0),
}
FEW = 8  # losses, norms and wishes to stop travel in messages of at most so many numbers


class _Sent(TorchDispatchMode):
    """Counts messages and numbers in them, by operation and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.messages, self.numbers = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if place := SENT.get(function.name()):
            name, number = place
            tensor = args[number][0] if isinstance(args[number], list | tuple) else args[number]
            if tensor.numel() > FEW:
                key = name, str(tensor.dtype).removeprefix("torch.")
                self.messages[key] += 1
                self.numbers[key] += tensor.numel()
        return function(*args, **(kwargs or {}))


@starts_its_own_group
def sent(arguments: list[str]) -> tuple[dict, dict]:
    """Run train.py; how many messages, and how many numbers in them, left between its second and its third update."""
    counts, seen = _Sent(), []

    def after_update(*_) -> None:
        seen.append((counts.messages.copy(), counts.numbers.copy()))

    hook = register_optimizer_step_post_hook(after_update)
    try:
        with counts:
            scripts_on_ranks.train(SCRIPT, arguments)
    finally:
        hook.remove()
    (messages_before, numbers_before), (messages, numbers) = seen[1:3]
    return dict(messages - messages_before), dict(numbers - numbers_before)


@starts_its_own_group
def drift(arguments: list[str], rank: int, update: int) -> tuple[int, str]:
    """Run train.py while one rank's first parameter moves by itself after an update: exit code and stderr."""
    updates = []

    def move(optimizer: torch.optim.Optimizer, *_) -> None:
        updates.append(optimizer)
        if len(updates) == update and dist.get_rank() == rank:
            optimizer.param_groups[0]["params"][0].data.view(-1)[0] += 1e-9

    hook = register_optimizer_step_post_hook(move)
    try:
        return scripts_on_ranks.ends(SCRIPT, arguments)
    finally:
        hook.remove()
