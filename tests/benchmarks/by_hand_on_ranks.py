"""What the ranks of a `group` run for tests/benchmarks/test_by_hand.py: contests in which someone cheats."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import by_hand

from common.ranks import Ranks

MADE = 2 * by_hand.WARM_UP_STEPS + 2 * 2  # steps of a contest of two turns of two steps


def contest(comparison: str, case: str, who: int = 0, cheat: str = "") -> str | None:
    """The verdict over a short contest in which contestant number `who` may cheat."""
    rank, size = dist.get_rank(), dist.get_world_size()
    ranks = Ranks(rank, size, rank, size, "torchrun", torch.device("cpu"))
    contestants = by_hand.COMPARISONS[comparison][0](case, rank)
    start = [{name: tensor.clone() for name, tensor in each.ended().items()} for each in contestants]
    chosen, steps_made = contestants[who], []
    step, ended = chosen.step, chosen.ended
    all_reduce = dist.all_reduce

    def one_less() -> None:
        steps_made.append(1)
        if len(steps_made) < MADE:
            step()

    def silently(call=step) -> None:
        """A step in which all-reduces do nothing: in Python, where those by hand begin."""
        dist.all_reduce = lambda tensor, group=None, async_op=False: Arrived() if async_op else None
        try:
            call()
        finally:
            dist.all_reduce = all_reduce

    def one_bit() -> dict[str, torch.Tensor]:
        tensors = {name: tensor.clone() for name, tensor in ended().items()}
        first = next(iter(tensors.values())).view(-1)
        first[0] = torch.nextafter(first[0], torch.tensor(torch.inf))
        return tensors

    def talks() -> None:
        step()
        all_reduce(torch.zeros(1))

    if cheat == "one step less":
        chosen.step = one_less
    elif cheat == "silent":
        chosen.step = silently
    elif cheat == "all silent":
        for each in contestants:
            each.step = lambda call=each.step: silently(call)
    elif cheat == "one bit":
        chosen.ended = one_bit
    elif cheat == "talks":
        chosen.step = talks
    elif cheat == "idle":
        for each in contestants:
            each.step = lambda: None
    with tqdm(total=1, disable=True) as bar:
        seen = by_hand.take_turns(contestants, 2, 2, ranks, bar)
    assert seen.steps == 2 and all(len(times) == 2 for times in (*seen.seconds, *seen.cpu_seconds))
    return by_hand.verdict(contestants, start, seen, ranks)


class Arrived:
    """A message that was never sent."""

    def wait(self) -> None:
        pass


def collectives(comparison: str, case: str) -> list[float]:
    """Collectives of a step, by contestant."""
    rank, size = dist.get_rank(), dist.get_world_size()
    ranks = Ranks(rank, size, rank, size, "torchrun", torch.device("cpu"))
    with tqdm(total=1, disable=True) as bar:
        return by_hand.take_turns(by_hand.COMPARISONS[comparison][0](case, rank), 1, 2, ranks, bar).collectives


def order_of_turns(contestants: int, turns: int) -> list[int]:
    """Who took each turn, by number."""
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), 0, 1, "torchrun", torch.device("cpu"))
    seen: list[int] = []
    all_of_them = [
        by_hand.Contestant(str(n), lambda: None, dict, lambda n=n: seen.append(n)) for n in range(contestants)
    ]
    with tqdm(total=1, disable=True) as bar:
        by_hand.take_turns(all_of_them, turns, 1, ranks, bar)
    return seen
