# exercise 4: One forward, one backward
"""In which order does a pipeline stage do its work?

    python from_scratch/exercises/tasks/one_f_one_b.py          # both schedules, drawn

A model is cut into stages, one a rank, and a batch into micro-batches. The forward of a micro-batch goes through the
stages from first to last, its backward from last to first. Every rank works through a list of its own, and waits
where the neighbour is not yet done.

*All forwards, all backwards* (GPipe, https://arxiv.org/abs/1811.06965) is the plain list. But what a forward leaves
for its backward must be kept, and at the end of the forwards that is all of it: memory grows with the number of
micro-batches.

*One forward, one backward* (1F1B, https://arxiv.org/abs/2104.04473) begins a backward as early as it can. The last
rank does: forward 0, backward 0, forward 1, backward 1 … The rank before it has to be one forward ahead, because a
micro-batch is away for one more stage there and back; and so on. So a rank begins with some forwards (the warm-up:
how many does the first rank need, at most?), then takes turns, and ends with the backwards that are left. It takes as
long as the other, and holds `ranks - rank` micro-batches at most.

Write both. Graded without any communication, by working through the lists, for 1 to 5 ranks and 1 to 8 micro-batches:
every action once; nobody waits for ever; the time, when each action takes 1; how many micro-batches are in flight.
"""

Action = tuple[str, int]  # ("F" or "B", the number of the micro-batch)


def all_forward_all_backward(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    """What `rank` does, in order: all forwards, then all backwards; micro-batches count from 0."""
    # solution
    return [(kind, number) for kind in "FB" for number in range(micro_batches)]
    # task: raise NotImplementedError("all_forward_all_backward")
    # end


def one_forward_one_backward(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    """What `rank` does, in order: warm-up, then forward and backward in turn, then the backwards that are left."""
    # solution
    warm_up = min(ranks - rank - 1, micro_batches)
    order = [("F", number) for number in range(warm_up)]
    for number in range(micro_batches - warm_up):
        order += [("F", warm_up + number), ("B", number)]
    return order + [("B", number) for number in range(micro_batches - warm_up, micro_batches)]
    # task: raise NotImplementedError("one_forward_one_backward")
    # end


def draw(orders: list[list[Action]]) -> None:
    """Print who does what when: forwards as numbers, backwards in brackets."""
    end: dict[tuple[str, int, int], int] = {}  # (kind, micro-batch, rank): when it is done
    rows: list[list[str]] = [[] for _ in orders]
    for time in range(sum(len(order) for order in orders)):
        for rank, order in enumerate(orders):
            done = sum(cell != "" for cell in rows[rank])
            if done == len(order):
                continue
            kind, number = order[done]
            before = rank - 1 if kind == "F" else rank + 1
            if 0 <= before < len(orders) and end.get((kind, number, before), time + 1) > time:
                rows[rank].append("")
                continue
            end[kind, number, rank] = time + 1
            rows[rank].append(f"{number}" if kind == "F" else f"({number})")
    for rank, row in enumerate(rows):
        print(f"rank {rank}  " + "".join(f"{cell:>4}" for cell in row))


if __name__ == "__main__":
    for schedule in (all_forward_all_backward, one_forward_one_backward):
        print(schedule.__name__)
        draw([schedule(rank, 4, 6) for rank in range(4)])
