"""The check of the exercise plan_of_a_block.py; run by tools/exercises.py."""

from types import ModuleType

import torch
from grading import expect
from shared import close, off, random, wrong
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module


def check(module: ModuleType, rank: int, world_size: int) -> None:
    def build() -> nn.Module:
        torch.manual_seed(1)
        return module.Block(24).double()

    alone, block = build(), build()
    inputs = [random(2, 5, 24, seed=2).requires_grad_() for _ in range(2)]
    probe = random(2, 5, 24, seed=3)
    expected = alone(inputs[0])
    (expected * probe).sum().backward()

    plan = module.make_plan()
    mesh = init_device_mesh("cpu", (world_size,))
    unknown = sorted(set(plan) - {name for name, _ in block.named_modules()})
    expect(
        not unknown, f"the plan has {', '.join(unknown)}", "names such as ffn.up", "print(block) shows its submodules"
    )
    parallelize_module(block, mesh, plan)
    for name, parameter in block.named_parameters():
        whole = dict(alone.named_parameters())[name]
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        share = whole.numel() if "norm" in name else whole.numel() // world_size
        expect(
            local.numel() == share,
            f"rank {rank} keeps {local.numel()} numbers of {name}",
            f"{share} of {whole.numel()}",
            "every linear layer is in the plan, and no norm: each rank needs its whole weight",
        )
    forward, backward = CommDebugMode(), CommDebugMode()
    try:
        with forward:
            output = block(inputs[1])
    except RuntimeError as error:
        expect(
            False,
            f"the forward fails: {str(error).splitlines()[0][:150]}",
            "query, key and value of the same heads on a rank; whole outputs",
            "a layer cut by outputs must be followed by one cut by inputs, and only that one ends the pair",
        )
    expect(
        not isinstance(output, DTensor) and output.shape == expected.shape,
        f"the output on rank {rank} is a {type(output).__name__} of shape {tuple(output.shape)}",
        f"a plain tensor of shape {tuple(expected.shape)}",
        "the defaults of both styles give plain tensors, and RowwiseParallel whole ones",
    )
    expect(
        close(output, expected),
        f"the output on rank {rank} is off by {off(output, expected):.1e}",
        "that of one process",
        "gate and up feed down, and query, key and value feed output: which are cut by outputs, which by inputs?",
    )
    with backward:
        (output * probe).sum().backward()
    expect(
        close(inputs[1].grad, inputs[0].grad),
        f"the gradient of the input on rank {rank} {wrong(inputs[1].grad, inputs[0].grad)}",
        "that of one process, to 1e-12",
        "are the layouts what the tensors are? Whole on all ranks is Replicate()",
    )
    for (name, parameter), right in zip(block.named_parameters(), alone.parameters(), strict=True):
        found = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        expect(
            close(found, right.grad),
            f"the gradient of {name} on rank {rank} {wrong(found, right.grad)}",
            "that of one process, to 1e-12",
            "are the layouts what the tensors are? Whole on all ranks is Replicate()",
        )
    for direction, mode, hint in (
        (
            "forward",
            forward,
            "one for each pair: Colwise for its first layers, Rowwise for its last, all with defaults",
        ),
        (
            "backward",
            backward,
            "tell the module that contains query, key and value (or gate and up) what comes in, once",
        ),
    ):
        counts = {str(op).split(".")[-1]: count for op, count in mode.get_comm_counts().items()}
        expect(
            counts == {"all_reduce": 2},
            f"{direction} there are {', '.join(f'{n} {name}' for name, n in counts.items()) or 'no messages'}",
            "2 all_reduce: one for attention, one for the feed-forward layers",
            hint,
        )
