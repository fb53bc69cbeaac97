# exercise 1: Bytes per rank
"""How many bytes does each stage of ZeRO keep on a rank? A formula, measured afterwards.

    python deepspeed/exercises/tasks/bytes_per_rank.py          # your table for a model of 7 billion parameters

A training keeps four kinds of numbers: the **weights** that the model computes with, their **gradients**, a **master**
copy of the weights in fp32 that the optimizer updates, and AdamW's two **moments**, in fp32. Stage by stage, ZeRO
(arXiv 1910.02054, section 5) cuts more of them up among the ranks:

- stage 0 cuts nothing up;
- stage 1 leaves each rank its part of what belongs to the optimizer: the master copy and the moments;
- stage 2 cuts up the gradients as well;
- stage 3 the weights, too: a layer is whole only while it computes, and that is not counted here.

One thing is DeepSpeed's own. The master copy exists in mixed precision (weights and gradients of 2 bytes each), where
the paper has it. From stage 1 on it exists in fp32 as well, where one could do without: ZeRO updates one flat vector.
Only in stage 0 in fp32 does torch's optimizer update the weights themselves.

Write `bytes_per_rank`. Graded by a measurement: DeepSpeed trains on 2 and on 3 ranks in each stage, in fp32 and in bf16
(stage 0 in fp32 only), and between two micro-batches the tensors that a rank holds are weighed. All sizes divide
evenly, so there is no padding.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bytes:
    """What one rank keeps, in bytes."""

    weights: int
    gradients: int
    master: int
    moments: int

    def total(self) -> int:
        return self.weights + self.gradients + self.master + self.moments


def bytes_per_rank(parameters: int, stage: int, ranks: int, weight_bytes: int = 4) -> Bytes:
    """What a rank keeps of a model with so many parameters; weight_bytes: 4 in fp32, 2 in bf16."""
    # solution
    part = parameters // ranks
    of_optimizer = parameters if stage == 0 else part
    has_copy = stage > 0 or weight_bytes < 4
    return Bytes(
        weights=weight_bytes * (part if stage >= 3 else parameters),
        gradients=weight_bytes * (part if stage >= 2 else parameters),
        master=4 * of_optimizer if has_copy else 0,
        moments=2 * 4 * of_optimizer,
    )
    # task: # Of each kind: is it there at all? The whole or a part? How many bytes has a number?
    # task: raise NotImplementedError("bytes_per_rank")
    # end


if __name__ == "__main__":
    for ranks in (2, 8, 64):
        for stage in (0, 1, 2, 3):
            kept = bytes_per_rank(7_000_000_000, stage, ranks, weight_bytes=2)
            print(f"stage {stage} in bf16 on {ranks:2} ranks: {kept.total() / 1e9:6.1f} GB a rank")
