"""The check of the exercise merge_attention.py; run by tools/exercises.py."""

from types import ModuleType

import torch
from grading import expect
from shared import close, off, random

WORLD_SIZES = (2, 3, 4)


def check(module: ModuleType, rank: int, world_size: int) -> None:
    query, key, value = random(6, 4, seed=1), random(9, 4, seed=2), random(9, 4, seed=3)
    everything = torch.ones(6, 9, dtype=torch.bool)
    causal = torch.arange(9) <= torch.arange(6).unsqueeze(1)  # queries 0 to 2 see nothing of keys 3 to 8
    blind = causal.clone()
    blind[4] = False  # query 4 sees nothing of either part
    for what, scale, visible in (
        ("two parts", 1.0, everything),
        ("scores of thousands", 1000.0, everything),
        ("a part of which some queries see nothing", 1.0, causal),
        ("two parts of which a query sees nothing", 1.0, blind),
    ):
        parts = []
        for keys in (slice(0, 3), slice(3, 9)):
            parts.append(module.attend(query * scale, key[keys], value[keys], visible[:, keys]))
        expected = module.attend(query * scale, key, value, visible)
        for order, ((out, sums), (other, other_sums)) in (("", parts), (", the other one first", parts[::-1])):
            found = module.merge(out.clone(), sums.clone(), other.clone(), other_sums.clone())
            expect(
                isinstance(found, tuple) and len(found) == 2,
                f"merge returns {type(found).__name__}",
                "(output, log_sum)",
                "the result is to be merged again with the next part",
            )
            for name, part, right in (("output", found[0], expected[0]), ("log_sum", found[1], expected[1])):
                hint = "each output was divided by exp of its own log_sum, and must be by that of both together"
                if torch.isnan(part).any():
                    hint = "nan: -inf - -inf is nan, and so is an infinity divided by another"
                elif scale > 1:
                    hint = "exp of a log_sum of hundreds is infinite: take it of differences alone"
                elif close(part, out + other):
                    hint = "a plain sum: each part's weights already sum to one"
                elif close(part, (out + other) / 2):
                    hint = "a plain mean: the parts' keys have different weights"
                # Minus infinity is right where nothing is visible, and equal to itself; its difference is nan.
                seen = torch.isfinite(right)
                expect(
                    close(part[seen], right[seen]) and torch.equal(torch.isfinite(part), seen),
                    f"{what}{order}: the {name} is off by {off(part[seen], right[seen]):.1e}",
                    "what attention over all keys gives, to 1e-12; -inf as log_sum, and 0, where nothing is seen",
                    hint,
                )

    whole = [random(4 * world_size, 4, seed=seed) for seed in (4, 5, 6)]
    mask = torch.ones(4 * world_size, 4 * world_size, dtype=torch.bool).tril()
    expected = module.attend(*whole, mask)[0].chunk(world_size)[rank]
    found = module.ring_attention(*(part.chunk(world_size)[rank].clone() for part in whole))
    expect(
        close(found, expected),
        f"ring attention on rank {rank} of {world_size} is off by {off(found, expected):.1e}",
        "attention over the whole sequence, to 1e-12",
        "leave ring_attention and attend as they are",
    )
