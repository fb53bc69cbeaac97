# exercise 3: Predict the traffic
"""How much does a step send? A formula, measured afterwards.

    python fsdp/exercises/tasks/predict_the_traffic.py          # your prediction for the shape of Llama 3.1 8B

A model is sharded as usual: a unit for each block, and the root with the rest. Ranks form `copies` of the model, each
of `ranks / copies` ranks that share it (copies = 1: no hybrid). A step takes `micro_batches` forwards and backwards;
gradients leave the ranks in the last of them only (`set_requires_gradient_sync`). What travels:

- before a unit computes, an **all-gather** among the ranks of a copy makes it whole. With `reshard` (FULL_SHARD) a
  block is freed after its forward, and gathered once more for its backward; without (SHARD_GRAD_OP) it stays for it.
  The root stays whole from its forward to its backward in either case. After a backward everything is freed;
- a **reduce-scatter** among the ranks of a copy sums a unit's gradients, and leaves each rank its shard;
- with more than one copy, an **all-reduce** of that shard among the ranks which hold the same one, one of each copy.

In a ring of k ranks, each sends (k - 1) / k of the whole in an all-gather, and as much in a reduce-scatter; an
all-reduce is both, one after the other. Parameters travel in `gather_bytes` each (2 in bf16), gradients in
`reduce_bytes` each (4, if they are summed in fp32, in both collectives).

Write `predict`. Graded by a measurement: FSDP trains on 2 and on 4 ranks, with and without resharding, copies,
micro-batches and bf16, and every message is counted and weighed. All sizes divide evenly, so there is no padding.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """What a rank takes part in, and sends, in one step."""

    all_gathers: int
    reduce_scatters: int
    all_reduces: int
    bytes_sent: int


def predict(
    root: int,
    blocks: list[int],
    ranks: int,
    copies: int = 1,
    reshard: bool = True,
    micro_batches: int = 1,
    gather_bytes: int = 4,
    reduce_bytes: int = 4,
) -> Traffic:
    """The traffic of one step and rank. root, blocks: parameters of the root unit, and of the unit of each block."""
    # solution
    shards, passes = ranks // copies, 2 if reshard else 1
    everything = root + sum(blocks)
    gathered = micro_batches * (root + passes * sum(blocks)) * gather_bytes
    reduced = everything * reduce_bytes
    within = (shards - 1) * (gathered + reduced) // shards
    between = 2 * (copies - 1) * (reduced // shards) // copies  # of a shard
    return Traffic(
        all_gathers=micro_batches * (1 + passes * len(blocks)),
        reduce_scatters=1 + len(blocks),
        all_reduces=1 + len(blocks) if copies > 1 else 0,
        bytes_sent=within + between,
    )
    # task: # How often is each unit gathered? Among how many ranks does it travel, and how large is what travels?
    # task: raise NotImplementedError("predict")
    # end


if __name__ == "__main__":
    # Embedding, norm and head of Llama 3.1 8B are in the root.
    root, blocks = 2 * 128_256 * 4096 + 4096, [218_112_000] * 32
    for what, options in {
        "FULL_SHARD": {},
        "SHARD_GRAD_OP": {"reshard": False},
        "HYBRID_SHARD, 4 copies": {"copies": 4},
        "FULL_SHARD, 8 micro-batches": {"micro_batches": 8},
    }.items():
        traffic = predict(root, blocks, ranks=32, gather_bytes=2, **options)
        print(f"{what:28}{traffic.all_gathers:4} all-gathers {traffic.bytes_sent / 1e9:8.1f} GB sent by each rank")
