"""What takes the place of ranks, text, the record and pipeline stages in a dry run.

The classes have an attribute `dry`, the `planner.fake_ranks.DryRun` that they serve, which `DryRun.replacements` sets.
"""

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch.distributed import pipelining
from torch.distributed.fsdp import FSDPModule

from common import data_sharding, run
from common.ranks import Ranks, fail
from common.runs import metrics, run_folder


class FakeRanks(Ranks):
    """The others say what this one says."""

    dry: Any

    def print(self, line: str) -> None:
        self.dry.said.append(line)

    def all_gather(self, value: Any) -> list[Any]:
        return [value] * self.world_size

    def broadcast(self, value: Any) -> Any:
        return value


class NoText:
    """A data set of samples without content, more than any run takes."""

    def __init__(self, sequence_length: int) -> None:
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return 2**40

    def fingerprint(self) -> str:
        return "none"


class NoLoader:
    """Micro-batches of the plan's shape; tokens and targets (micro_size, sequence_length) int64."""

    def __init__(self, dataset: NoText, plan: data_sharding.BatchPlan, device: torch.device, workers: int = 0) -> None:
        self.shape, self.plan, self.device = (plan.micro_size, dataset.sequence_length), plan, device

    def micro_batches(self, step: int) -> Iterator[tuple[list[torch.Tensor], bool]]:
        for number in range(1, self.plan.accumulation + 1):
            tokens = [torch.empty(self.shape, dtype=torch.int64, device=self.device) for _ in range(2)]
            yield tokens, number == self.plan.accumulation


def no_data_parallel(*_: Any, **__: Any) -> NoReturn:
    fail(
        "DistributedDataParallel fills its buckets from C++, which needs real memory; expected FSDP, tensor or "
        "pipeline parallelism; use another script"
    )


class Plan(data_sharding.BatchPlan):
    """Of a step's micro-batches those that were asked for."""

    dry: Any

    @property
    def accumulation(self) -> int:
        self.dry.micro_size, self.dry.accumulation = self.micro_size, super().accumulation
        return self.dry.limited(self.dry.accumulation)


class MeasuredRun(run.Run):
    """Measures in place of writing; the reduction of the metrics stays."""

    dry: Any

    def __init__(self, config: Any, ranks: Ranks, strategy: str, **options: Any) -> None:
        self.config, self.ranks = config, ranks
        self.dry.strategy, self.dry.mesh = strategy, run_folder.full_mesh(options.get("mesh"), ranks.world_size)

    def restore(self, model: Any, *_: Any) -> None:
        model = getattr(model, "module", model)  # a pipeline's is inside its StageState
        self.dry.meter.watch(model, self.dry.parts or [model])

    def steps(self, validate: Any = None) -> Iterator[int]:
        yield 0
        self.dry.meter.in_step = True
        self.dry.meter.start_step()
        yield 1
        self.dry.meter.finish_step()

    def log(self, step: int, loss_sum: Any, grad_norm: Any, lr: float) -> None:
        metrics.start_sum(loss_sum, grad_norm, stop=False)  # it is sent; nothing can be read

    def wants_evaluation(self, step: int) -> bool:
        return False

    def end_step(self, *_: Any) -> None:
        pass

    def finish(self) -> None:
        pass


class Stage(pipelining.PipelineStage):
    """Stages usually send each other the shapes of what they exchange; here they are told."""

    dry: Any

    def __init__(self, part: torch.nn.Module, number: int, count: int, device: torch.device, **more) -> None:
        config = self.dry.config
        self.dry.parts.append(part)
        batch, sequence = config.batch.micro_size or self.dry.micro_size, config.data.sequence_length
        dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
        low = torch.bfloat16 if config.train.precision == "bf16" and isinstance(part, FSDPModule) else dtype
        cut = config.mesh.tp if getattr(config, "sequence_parallel", False) else 1
        hidden = torch.empty(batch, sequence // cut, config.model.width, dtype=low, requires_grad=True)
        first = torch.empty(batch, sequence, dtype=torch.int64)
        last = torch.empty(1, dtype=dtype, requires_grad=True)
        inputs, outputs = first if number == 0 else hidden, last if number == count - 1 else hidden
        super().__init__(part, number, count, device, input_args=inputs, output_args=outputs, **more)
