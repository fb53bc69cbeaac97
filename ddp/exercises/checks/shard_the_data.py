"""The check of the exercise shard_the_data.py; run by tools/exercises.py."""

from types import ModuleType

from grading import expect

WORLD_SIZES = (1,)


def check(module: ModuleType, rank: int, world_size: int) -> None:
    for ranks in (1, 2, 3, 4, 6):
        for step in (0, 1, 7):
            shares = [list(module.my_share(step, 24, r, ranks)) for r in range(ranks)]
            taken = [sample for share in shares for sample in share]
            where = f"my_share(step={step}, global_size=24) on {ranks} ranks"
            expect(
                len(set(taken)) == len(taken),
                f"{where} gives {shares}: some samples twice",
                "each sample on exactly one rank",
                "where does the share of rank 1 start?",
            )
            expect(
                sorted(taken) == list(range(24 * step, 24 * step + 24)),
                f"{where} gives {shares}",
                f"together the samples {24 * step} to {24 * step + 23}",
                "a step takes one global batch; that of step N starts where that of step N-1 ended",
            )
            expect(
                taken == sorted(taken),
                f"{where} gives {shares}",
                "contiguous shares, in the order of the ranks",
                "range(rank, size, world_size) is exact too, but in another order",
            )
            for r in range(ranks):
                cut = [list(part) for part in module.my_micro_batches(step, 24, 2, r, ranks)]
                expect(
                    [sample for part in cut for sample in part] == shares[r] and all(len(p) == 2 for p in cut),
                    f"my_micro_batches({step}, 24, micro_size=2) on rank {r} of {ranks} gives {cut}",
                    f"the share {shares[r]} in pieces of 2, in order",
                    "cut the share of this rank, not the global batch",
                )
    for what, call in (
        ("a global batch of 24 on 5 ranks", lambda: module.my_share(0, 24, 0, 5)),
        ("a share of 12 in micro-batches of 5", lambda: module.my_micro_batches(0, 24, 5, 0, 2)),
    ):
        try:
            found = call()
        except ValueError:
            continue
        expect(False, f"{what}: no error, but {found}", "ValueError", "a silent remainder changes the training")
