"""The check of the exercise fill_the_shards.py; run by tools/exercises.py."""

from types import ModuleType

import torch
from grading import expect
from shared import EXACT, Collectives, off, plural
from torch import Tensor
from torch.distributed.tensor import DTensor

WORLD_SIZES = (2, 3, 4)  # 4: of 3 rows the last rank has none


def rows(tensor: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row.flatten().tolist()) for row in tensor}


def check(module: ModuleType, rank: int, world_size: int) -> None:
    numbers = torch.linspace(-2, 2, 6, dtype=torch.float64)
    for seed in (0, 1):
        alone = module.WaveModel()
        with torch.no_grad():
            for name, parameter in alone.named_parameters():
                parameter.copy_(module.initial_value(name, parameter.shape, seed))
        with Collectives() as counter:
            model = module.build(seed)
        where = f"seed {seed}, rank {rank} of {world_size}"
        for name, parameter in model.named_parameters():
            expect(
                not parameter.is_meta,
                f"{name} is still on the meta device",
                "memory on the CPU",
                "model.to_empty(device='cpu') first: copying into a meta tensor does nothing, and says nothing",
            )
            expect(
                isinstance(parameter, DTensor),
                f"{name} is no DTensor any more",
                "the shard that fully_shard made, filled",
                "copy_ into the parameter; do not replace it",
            )
            whole = dict(alone.named_parameters())[name].detach()
            pieces = whole.chunk(world_size)
            right = pieces[rank] if rank < len(pieces) else whole[:0]
            found = parameter.to_local().detach()
            hint = "cut like torch.chunk: rank r has the r-th piece of the rows"
            if not rows(found) <= rows(whole):
                hint = "no rows of the whole: its values depend on its name, its whole shape and the seed alone"
            if found.numel() and off(found, module.initial_value(name, found.shape, seed)) == 0:
                hint = "these are the first numbers of the seed, on every rank: make the whole, then take its rows"
            expect(
                torch.equal(found, right),
                f"{where}: its rows of {name} are off by {off(found, right):.1e}",
                "the same rows of the whole, bit for bit",
                hint,
            )
        expect(
            torch.equal(model.waves.frequencies, alone.waves.frequencies),
            f"{where}: the table waves.frequencies is not what it was made as",
            "that of Waves.table()",
            "to_empty gives buffers new memory as well, and no checkpoint brings this one back",
        )
        expect(
            not counter.log,
            f"{where}: {plural(len(counter.log), 'message')} ({counter.names()})",
            "none: each rank can make every parameter",
            "distribute_tensor sends rank 0's tensor to all, unless src_data_rank=None",
        )
        with torch.no_grad():
            found, right = model(numbers), alone(numbers)
        difference = off(found, right)
        expect(
            difference <= EXACT,
            f"{where}: outputs are off by {difference:.1e}",
            "those of one process",
            "leave the rest of the file as it is",
        )
