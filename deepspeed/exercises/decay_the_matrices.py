# exercise 3: Decay the matrices
"""In stage 3 a parameter is an empty vector between its uses. Who sorts parameters by shape must ask otherwise.

    make grade M=deepspeed ARGS="decay_the_matrices"

Weight decay is meant for matrices: embeddings and the weights of linear layers. Norms and biases, which are vectors,
are left alone, by custom (nanoGPT and common/optimizer.py do so). So an optimizer gets two groups, and the usual line
is

    matrices = [p for p in model.parameters() if p.ndim >= 2]

Under `deepspeed.zero.Init`, that is in stage 3, it finds no matrix at all. Each rank keeps its part of a parameter in
`p.ds_tensor`, and of `p` itself an empty vector is left: `p.shape` is (0,), `p.ndim` is 1, `p.numel()` is 0. What it is
when it is whole stands beside it: `p.ds_shape` and `p.ds_numel`. A parameter that was made without ZeRO has neither.
The training runs, and its first losses look as they should: nothing is decayed, and nobody says so. For the same reason
a script that counts parameters says 0.

Write `decay_groups` and `count`. Graded on 2 ranks, for a plain model and for one of stage 3: the groups, and the
weights after a step with a large decay against one process, to 1e-5.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: matrices with `weight_decay`, then vectors with 0.0; frozen parameters in neither."""
    # solution
    trainable = [p for p in model.parameters() if p.requires_grad]
    axes = [len(getattr(p, "ds_shape", p.shape)) for p in trainable]  # of the whole
    matrices = [p for p, n in zip(trainable, axes, strict=True) if n >= 2]
    vectors = [p for p, n in zip(trainable, axes, strict=True) if n < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    # task: # Each group has "params" and "weight_decay". Which attribute tells the shape, and who has none?
    # task: raise NotImplementedError("decay_groups")
    # end


def count(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers the parameters have when they are whole."""
    # solution
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    # task: raise NotImplementedError("count")
    # end
