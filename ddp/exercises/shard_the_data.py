# exercise 1: Shard the data
"""Which samples of the global batch are mine?

    python ddp/exercises/tasks/shard_the_data.py      # prints who takes what

Every step of a training consumes one *global batch*: step 0 takes the samples 0 … G-1 of the (shuffled) data,
step 1 the next G, and so on. W ranks share each batch, and a training on 3 ranks is the training on 1 rank
only if

- each sample of the batch is taken by exactly one rank: none twice, none left out;
- the shares are contiguous and in order: rank 0 has the first, rank 1 the next …;
- a batch that cannot be shared evenly is an error. A rank that quietly takes fewer samples changes the
  gradient, and one that quietly takes more reads some samples twice.

A share that does not fit into memory is cut into micro-batches, whose gradients are added up (gradient
accumulation): the same rules, one level down. The number of accumulation steps is never chosen; it follows
from the sizes.

Nothing here depends on anything but (step, rank): a training that stops after step 99 goes on with step 100,
on any number of ranks. Write the two functions.
"""


def my_share(step: int, global_size: int, rank: int, world_size: int) -> range:
    """The numbers of the samples that `rank` takes in `step`.

    Raises ValueError when `global_size` samples cannot be shared evenly among `world_size` ranks.
    """
    # solution
    if global_size % world_size:
        raise ValueError(f"a global batch of {global_size} cannot be shared evenly among {world_size} ranks")
    share = global_size // world_size
    first = step * global_size + rank * share
    return range(first, first + share)
    # task: # Where does the batch of this step start, and how long is a share?
    # task: raise NotImplementedError("my_share")
    # end


def my_micro_batches(step: int, global_size: int, micro_size: int, rank: int, world_size: int) -> list[range]:
    """The share of `rank` in `step`, cut into consecutive micro-batches of `micro_size` samples.

    Raises ValueError when the share is not a multiple of `micro_size`.
    """
    # solution
    share = my_share(step, global_size, rank, world_size)
    if len(share) % micro_size:
        raise ValueError(f"a share of {len(share)} samples is not a multiple of the micro-batch of {micro_size}")
    return [share[start : start + micro_size] for start in range(0, len(share), micro_size)]
    # task: # A range can be sliced: range(10, 20)[2:4] is range(12, 14).
    # task: raise NotImplementedError("my_micro_batches")
    # end


if __name__ == "__main__":
    for world_size in (1, 2, 3):
        for rank in range(world_size):
            cut = my_micro_batches(step=1, global_size=12, micro_size=2, rank=rank, world_size=world_size)
            print(f"step 1, rank {rank} of {world_size}: {[list(micro_batch) for micro_batch in cut]}")
