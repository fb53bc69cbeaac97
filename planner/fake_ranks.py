"""A lesson's script on ranks, and tensors, that are not there: what is replaced, and the two steps that are taken."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.distributed import device_mesh, pipelining
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._redistribute import _gen_transform_infos
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from common import config as settings
from common import data, data_sharding, ranks, run
from common.ranks import Ranks, fail
from common.transformer import Transformer
from planner.meter import Meter, replaced
from planner.script import config_class, loaded
from planner.stand_ins import FakeRanks, MeasuredRun, NoLoader, NoText, Plan, Stage, no_data_parallel


@contextlib.contextmanager
def no_group_left() -> Iterator[None]:
    """Process groups end with the block, and so does what DTensors remember: a mesh of equal shape has other groups."""

    def forget() -> None:
        _clear_sharding_prop_cache()
        _gen_transform_infos.cache_clear()

    forget()
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        forget()


class DryRun:
    """One script on fake ranks, from its arguments to the measured step."""

    def __init__(self, script: Path, world_size: int, rank: int, micro_batches: int | None) -> None:
        self.script, self.world_size, self.rank, self.limit = script, world_size, rank, micro_batches
        self.notes: list[str] = []
        self.said: list[str] = []
        self.parts: list[torch.nn.Module] = []  # a pipeline's stages

    def run(self, arguments: list[str]) -> "DryRun":
        """Take two steps of the script with these settings; the meter has what the second one held and sent.

        SystemExit: (exit code 2) no script of a training, settings that do not fit, or a script that looks at values.
        """
        with contextlib.ExitStack() as stack:
            for owner, name, value in self.replacements():
                stack.enter_context(replaced(owner, name, value))
            lesson = stack.enter_context(loaded(self.script))
            self.config = settings.parse(config_class(lesson, self.script), arguments)
            self.check()
            self.meter = Meter()
            stack.enter_context(no_group_left())
            try:
                with FakeTensorMode(), self.meter.watching_storages(), self.meter:
                    lesson.main(self.config)
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                fail(
                    f"{self.script} looks at a value ({error}); expected operations that need shapes only; "
                    f"try other settings"
                )
        return self

    def check(self) -> None:
        train, model = self.config.train, self.config.model
        if train.precision == "fp16":
            fail(
                "train.precision = fp16: its scaler decides by values; expected bf16, which has the same bytes; set it"
            )
        if model.experts:
            fail(f"model.experts = {model.experts}: tokens choose experts by values; expected 0; set it")
        if train.compile:
            self.notes.append("train.compile = true: measured uncompiled; compiled kernels keep fewer activations")
        if getattr(getattr(self.config, "fsdp", None), "cpu_offload", False):
            self.notes.append("fsdp.cpu_offload = true: shards, gradients and optimizer state are in host memory")

    def limited(self, micro_batches: int) -> int:
        """So many of a step's micro-batches are taken. SystemExit: of a pipeline too few to show its peak."""
        limit, schedule = self.limit or micro_batches, getattr(self.config, "schedule", None)
        if schedule is None or limit >= micro_batches:
            return min(limit, micro_batches)
        found = f"--micro_batches {limit} of {micro_batches} with schedule = {schedule}"
        if schedule == "gpipe":
            fail(f"{found}; expected all of them, because all are in flight; leave it out")
        # As many as can be in flight, and then one more, which meets the gradients that the first has left. A looped
        # schedule takes its micro-batches in rounds: two to fill the pipeline, one to meet gradients of all stages.
        pp = self.config.mesh.pp if hasattr(self.config, "mesh") else self.world_size
        a_round = micro_batches // max(1, micro_batches // pp)
        if schedule != "1f1b" and limit % a_round:
            fail(f"{found} on {pp} stages; expected a multiple of {a_round}, whole rounds; change it, or leave it out")
        if limit < (least := pp + 1 if schedule == "1f1b" else 3 * a_round):
            fail(f"{found} on {pp} stages; expected {least} or more, for the peak; change it, or leave it out")
        return limit

    def replacements(self) -> list[tuple[Any, str, Any]]:
        """What cannot be on fake ranks: (owner, name, what takes its place). The script imports from the owners."""
        dry, original_apply, original_mesh = self, torch.nn.Module._apply, device_mesh.DeviceMesh.__init__
        init_mesh = device_mesh.init_device_mesh
        whole_shapes = ShardingPropagator._propagate_tensor_meta_non_cached

        def join(*_: Any) -> Ranks:
            dist.init_process_group("fake", store=FakeStore(), rank=dry.rank, world_size=dry.world_size)
            return of_this(FakeRanks)(
                dry.rank, dry.world_size, dry.rank, dry.world_size, "dry run", torch.device("cpu")
            )

        def single_process(*_: Any) -> Ranks:
            if dry.world_size > 1:
                fail(f"{dry.script} is a script for one process; expected --world_size 1, not {dry.world_size}; set it")
            return of_this(FakeRanks)(0, 1, 0, 1, "dry run", torch.device("cpu"))

        def real_mesh(*args: Any, **options: Any) -> Any:  # ranks in a mesh are values
            with unset_fake_temporarily():
                return init_mesh(*args, **options)

        def mesh_of_real_ranks(mesh: Any, *args: Any, **options: Any) -> None:
            with unset_fake_temporarily():
                original_mesh(mesh, *args, **options)

        def propagate(*args: Any) -> Any:
            """DTensors try operations on tensors of the whole shape, to learn the result's: no rank has those."""
            dry.meter.is_paused = True
            try:
                return whole_shapes(*args)
            finally:
                dry.meter.is_paused = False

        def apply(module: torch.nn.Module, function: Any, recurse: bool = True) -> torch.nn.Module:
            """`to`, `double`, `to_empty`: torch would swap what is behind a parameter, and cannot for fake ones."""
            if any(isinstance(p, DTensor) for p in module.parameters()):
                return original_apply(module, function, recurse)
            for part in module.modules():
                for name, parameter in part._parameters.items():
                    if parameter is not None:
                        with torch.no_grad():
                            moved = function(parameter)
                        if moved is not parameter:
                            part._parameters[name] = torch.nn.Parameter(moved, parameter.requires_grad)
            return module

        def of_this(kind: type) -> type:
            return type(kind.__name__, (kind,), {"dry": dry})

        return [
            (ranks, "join", join),
            (ranks, "single_process", single_process),
            (data, "text_datasets", lambda config, _: (NoText(config.sequence_length),) * 2),
            (data_sharding, "BatchPlan", of_this(Plan)),
            (data_sharding, "Loader", NoLoader),
            (run, "Run", of_this(MeasuredRun)),
            (Transformer, "compile_blocks", lambda *_, **__: None),
            (torch.nn.Module, "_apply", apply),
            (ShardingPropagator, "_propagate_tensor_meta_non_cached", propagate),
            (device_mesh, "init_device_mesh", real_mesh),
            (device_mesh.DeviceMesh, "__init__", mesh_of_real_ranks),
            (pipelining, "PipelineStage", of_this(Stage)),
            (torch.nn.parallel, "DistributedDataParallel", no_data_parallel),
        ]
