"""The check of the exercise one_f_one_b.py; run by tools/exercises.py."""

from types import ModuleType

from grading import expect

WORLD_SIZES = (1,)  # lists: nothing is sent


def work_through(orders: list[list[tuple[str, int]]], where: str) -> int:
    """The time that ranks take for these lists, when every action takes 1 and needs what its neighbour has done."""
    end: dict[tuple[str, int, int], int] = {}  # (kind, micro-batch, rank)
    free, place = [0] * len(orders), [0] * len(orders)
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while place[rank] < len(order):
                kind, number = order[place[rank]]
                if kind == "F":
                    needs = (kind, number, rank - 1) if rank else None
                else:
                    needs = (kind, number, rank + 1) if rank < len(orders) - 1 else ("F", number, rank)
                if needs and needs not in end:
                    break
                free[rank] = max(free[rank], end[needs] if needs else 0) + 1
                end[kind, number, rank] = free[rank]
                place[rank] += 1
                moved = True
    stuck = [f"rank {r} before {''.join(map(str, o[place[r]]))}" for r, o in enumerate(orders) if place[r] < len(o)]
    expect(
        not stuck,
        f"{where}: for ever wait {', '.join(stuck)}",
        "an end",
        "the forward of a micro-batch needs that of the rank before, its backward that of the rank after",
    )
    return max(free)


def in_flight(order: list[tuple[str, int]]) -> int:
    """The most micro-batches that are forward and not yet backward."""
    now, most = 0, 0
    for kind, _ in order:
        now += 1 if kind == "F" else -1
        most = max(most, now)
    return most


def check(module: ModuleType, rank: int, world_size: int) -> None:
    for name in ("all_forward_all_backward", "one_forward_one_backward"):
        for ranks in range(1, 6):
            for count in range(1, 9):
                orders = [list(getattr(module, name)(r, ranks, count)) for r in range(ranks)]
                where = f"{name}, {ranks} ranks, {count} micro-batches"
                for r, order in enumerate(orders):
                    shown = " ".join(f"{kind}{number}" for kind, number in order)
                    once = sorted((kind, number) for kind in "FB" for number in range(count))
                    expect(
                        sorted(order) == once,
                        f"{where}: rank {r} does {shown}",
                        "every forward and every backward once",
                        "with fewer micro-batches than ranks the warm-up is shorter",
                    )
                    for number in range(count):
                        expect(
                            order.index(("F", number)) < order.index(("B", number)),
                            f"{where}: rank {r} does {shown}",
                            "the forward of a micro-batch before its backward",
                            "a backward needs what its forward has kept",
                        )
                time = work_through(orders, where)
                for r, order in enumerate(orders):
                    most = count if name == "all_forward_all_backward" else min(count, ranks - r)
                    expect(
                        in_flight(order) == most,
                        f"{where}: rank {r} holds up to {in_flight(order)} micro-batches",
                        f"{most}",
                        "the last rank needs no warm-up, and each rank before it one forward more"
                        if name == "one_forward_one_backward"
                        else "no backward before the last forward",
                    )
                # A micro-batch passes all ranks there and back; behind it the first rank does the others.
                least = 2 * (count + ranks - 1)
                expect(
                    time <= least,
                    f"{where}: takes {time}",
                    f"{least}, as all forwards first does",
                    "after the warm-up: a forward, then a backward; who is slower lets the next rank wait",
                )
