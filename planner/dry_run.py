"""Dry run: memory and collectives of a lesson's own script, on ranks and tensors that are not there.

    python planner/dry_run.py fsdp/train.py --world_size 4                                # seconds on a laptop
    python planner/dry_run.py model_parallel/tensor_parallel.py --world_size 4 -- --mesh.dp 2 --sequence_parallel false
    python planner/dry_run.py fsdp/train.py --world_size 64 -- --model.preset llama3_70b --data.sequence_length 4096 \\
        --batch.global_size 64 --train.precision bf16 --train.activation_checkpointing true   # half a minute: 32.31 GiB

The script is loaded as it stands, and its `main` takes two steps: the first makes the optimizer's state, the second is
measured. Fake tensors have shapes and no memory, the fake process group sends nothing; replaced is only what needs
either: joining, the text, values that would be printed or saved. What runs is the script's own model, mesh, wrapping,
loop and optimizer, so that whatever a strategy holds or sends is counted, not modelled. Where a README of the lessons
has a formula, its value stands beside the count.
"""

import argparse
import contextlib
import gc
import importlib.util
import inspect
import json
import sys
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # makes collectives known to fake tensors
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.distributed import device_mesh, pipelining
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._redistribute import _gen_transform_infos
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import config as settings
from common import data, data_sharding, ranks, run
from common.ranks import Ranks, fail
from common.transformer import Transformer

WAIT = torch.ops._c10d_functional.wait_tensor.default
# What a collective is called in torch, the name it has here, and which argument is its whole, flat end.
COLLECTIVES = {
    "c10d::_allgather_base_": ("all-gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::send": ("send", 0),
    "c10d::recv_": ("receive", 0),
    "_c10d_functional::all_gather_into_tensor": ("all-gather", "result"),
    "_c10d_functional::reduce_scatter_tensor": ("reduce-scatter", 0),
    "_c10d_functional::all_reduce": ("all-reduce", 0),
}
NO_DATA = "::barrier", "::monitored_barrier_", "::wait_tensor", "::wait_tensors"
# Bytes that a rank sends in a ring of n, as a share of the whole end (collectives/README.md).
SENT = {"all-gather": lambda n: (n - 1) / n, "reduce-scatter": lambda n: (n - 1) / n,
        "all-reduce": lambda n: 2 * (n - 1) / n, "send": lambda n: 1, "receive": lambda n: 0}  # fmt: skip
PARAMETERS, GRADIENTS, STATE = "parameters", "gradients", "optimizer state"
WHOLE, WHOLE_GRADIENTS, BUFFERS = "whole parameters", "whole gradients", "buffers of collectives"
ACTIVATIONS, TEMPORARY, OTHER = "activations", "temporary", "other"

Formula = tuple[float, str, str]  # value, the formula, where it stands


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ------------------------------------------------------------------------------------------------- what is counted


class FakeRanks(Ranks):
    """The others say what this one says."""

    def all_gather(self, value: Any) -> list[Any]:
        return [value] * self.world_size

    def broadcast(self, value: Any) -> Any:
        return value


class Storage:
    """The memory behind one or more tensors: what it is for."""

    __slots__ = ("kind", "reference")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.reference: Any = None


class Meter(TorchDispatchMode):
    """Sees every operation: which memory appears and disappears, and which collectives there are.

    What memory is for is told by what it is found in (a parameter, a gradient, the optimizer's state), otherwise by
    when it appeared: in a forward it is an activation, later it is temporary, recomputed activations included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[Storage, int] = {}  # bytes
        self.storages: dict[int, Storage] = {}  # by address
        self.total = 0
        self.place, self.was_backward = "before the first step", False
        self.in_step, self.is_paused = False, False
        self.start_step()

    def start_step(self) -> None:
        gc.collect()  # what earlier steps left in circles is not this step's
        self.collectives: Counter[tuple[str, str, int]] = Counter()  # kind, axis, ranks
        self.collective_bytes: Counter[tuple[str, str, int]] = Counter()
        self.peak, self.peak_place = self.total, self.place
        self.at_peak: dict[Storage, int] = {}
        self.is_at_peak = True
        self.activations = 0
        self.bytes: dict[str, int] = {}

    def finish_step(self) -> None:
        if self.is_at_peak:
            self.at_peak = self.live.copy()
        self.held_at_peak = self.held(self.at_peak)

    # ---- memory

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) or kind.__name__ == "AsyncCollectiveTensor" for kind in types):
            return NotImplemented  # they turn into operations on local tensors, which come here again
        if self.is_paused:
            return function(*args, **(kwargs or {}))
        is_backward = torch._C._current_graph_task_id() != -1
        if is_backward != self.was_backward:
            self.was_backward = is_backward
            self.place = "backward, loss and head" if is_backward else "after the backward: gradient norm"
            if is_backward:
                self.activations = max(self.activations, self.held()[ACTIVATIONS])
        # In reality waiting gives the same tensor, not a copy of it.
        result = args[0] if function is WAIT else function(*args, **(kwargs or {}))
        name = function.name().partition(".")[0]
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor)
        if function.namespace in ("c10d", "_c10d_functional") and not name.endswith(NO_DATA):
            self.count(name, args, result)
        return result

    def see(self, tensor: torch.Tensor) -> Storage:
        """Take note of the memory behind a tensor."""
        memory = tensor.untyped_storage()
        address = memory._cdata
        if (known := self.storages.get(address)) is not None:
            return known
        in_forward = self.place.startswith("forward") and not self.was_backward
        storage = Storage(ACTIVATIONS if in_forward else TEMPORARY if self.in_step else OTHER)
        storage.reference = weakref.ref(memory, lambda _: self.forget(address))
        self.storages[address] = storage
        self.live[storage] = 0
        self.resize(storage, memory.nbytes())
        return storage

    def resize(self, storage: Storage, nbytes: int) -> None:
        """A storage has `nbytes` from now on: FSDP frees and refills parameters without making new ones."""
        change = nbytes - self.live[storage]
        if change < 0 and self.is_at_peak:  # only the last moment before a fall can be a peak
            self.at_peak, self.is_at_peak = self.live.copy(), False
        self.live[storage] = nbytes
        self.total += change
        if self.total > self.peak:
            self.peak, self.peak_place, self.is_at_peak = self.total, self.place, True

    def forget(self, address: int) -> None:
        storage = self.storages.pop(address)
        self.resize(storage, 0)
        del self.live[storage]

    def held(self, when: dict[Storage, int] | None = None) -> Counter[str]:
        """Bytes by kind, now or at another moment."""
        sums: Counter[str] = Counter()
        for storage, nbytes in (self.live if when is None else when).items():
            sums[storage.kind] += nbytes
        return sums

    def mark(self, tensors: Iterable[torch.Tensor], kind: str) -> int:
        """Say what tensors are for; returns the bytes behind them."""
        storages = {self.see(local(tensor)) for tensor in tensors}
        for storage in storages:
            storage.kind = kind
        return sum(self.live[storage] for storage in storages)

    # ---- collectives

    def count(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        kind, end = COLLECTIVES.get(name, (name, 0))
        flat = [t for t in tree_leaves(result if end == "result" else args[end]) if isinstance(t, torch.Tensor)]
        key = kind, *axis_of(args)
        self.collectives[key] += 1
        self.collective_bytes[key] += sum(t.nbytes for t in flat)
        if name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
            for tensor in (t for t in tree_leaves(args[:2]) if isinstance(t, torch.Tensor)):
                if (storage := self.see(tensor)).kind in (ACTIVATIONS, TEMPORARY):
                    storage.kind = BUFFERS

    # ---- when, and what for

    def watch(self, model: torch.nn.Module, parts: list[torch.nn.Module]) -> None:
        """Learn from a built model which memory is parameters, and from hooks where a step is.

        parts: what forwards go through; a pipeline's stages, which the model joins, or the model itself.
        """
        self.mark(model.parameters(), PARAMETERS)
        self.shards = {self.see(local(p)) for p in model.parameters()}
        for part in parts:
            for unit in part.modules():
                if isinstance(unit, FSDPModule):  # FSDP's own hooks gather before these are called
                    unit.register_forward_pre_hook(lambda unit, _: self.unit_is_whole(unit))
            has_embedding, has_head = (getattr(part, name, None) is not None for name in ("embedding", "head"))
            if has_embedding:
                part.register_forward_pre_hook(lambda *_: self.arrive("forward, embedding"))
            blocks = list(getattr(part, "blocks", {}).items())
            for position, (number, block) in enumerate(blocks):
                block.register_forward_pre_hook(self.entering(number, has_embedding and position == 0))
                block.register_forward_hook(self.leaving(number, has_head and position == len(blocks) - 1))

    def arrive(self, place: str) -> None:
        if torch._C._current_graph_task_id() == -1:
            self.place, self.was_backward = place, False
        elif place.startswith("forward, block"):
            self.place = place.replace("forward", "backward") + ", computed again"
        elif place.startswith("backward"):
            self.place = place

    def entering(self, number: str, is_first: bool) -> Any:
        def hook(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            self.arrive(f"forward, block {number}")
            if is_first and inputs[0].requires_grad and not self.was_backward:
                inputs[0].register_hook(lambda _: self.arrive("backward, embedding"))

        return hook

    def leaving(self, number: str, is_last: bool) -> Any:
        def hook(_: torch.nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            if output.requires_grad and not self.was_backward:
                output.register_hook(lambda _: self.arrive(f"backward, block {number}"))
            if is_last:
                self.arrive("forward, head and loss")

        return hook

    def unit_is_whole(self, unit: torch.nn.Module) -> None:
        for parameter in unit.parameters():
            storage = self.see(local(parameter))
            if storage not in self.shards and storage.kind != WHOLE:
                storage.kind = WHOLE
                parameter.register_post_accumulate_grad_hook(self.gradient_is_whole)

    def gradient_is_whole(self, parameter: torch.Tensor) -> None:
        self.mark([parameter.grad], WHOLE_GRADIENTS)

    def before_optimizer(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.place, self.was_backward = "optimizer step", False
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.bytes[PARAMETERS] = self.mark(parameters, PARAMETERS)
        self.bytes[GRADIENTS] = self.mark((p.grad for p in parameters if p.grad is not None), GRADIENTS)

    def after_optimizer(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        entries = (value for entry in optimizer.state.values() for value in entry.values())
        state = [value for value in entries if isinstance(value, torch.Tensor) and value.dim()]  # not the step counters
        self.bytes[STATE] = self.mark(state, STATE)

    @contextlib.contextmanager
    def watching_storages(self) -> Iterator[None]:
        """Optimizers announce themselves; `resize_` of a storage is no operation that a mode sees."""
        handles = [
            register_optimizer_step_pre_hook(self.before_optimizer),
            register_optimizer_step_post_hook(self.after_optimizer),
        ]
        original = torch.UntypedStorage.resize_

        def resize_(memory: torch.UntypedStorage, size: int) -> Any:
            answer = original(memory, size)
            if (storage := self.storages.get(memory._cdata)) is not None:
                self.resize(storage, memory.nbytes())
            return answer

        try:
            with replaced(torch.UntypedStorage, "resize_", resize_):
                yield
        finally:
            for handle in handles:
                handle.remove()


def axis_of(args: tuple[Any, ...]) -> tuple[str, int]:
    """Axis of the mesh ("world": all ranks) and number of ranks of the group among a collective's arguments."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in argument._type().name():
            group = dist.ProcessGroup.unbox(argument)
            break
    else:
        group = _resolve_process_group(next(a for a in reversed(args) if isinstance(a, str)))
    name = group.group_desc.removeprefix("mesh_")
    return "world" if name == "default_pg" else name, group.size()


# ---------------------------------------------------------------------------------------------- what is not there


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute another value for a while."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


class NoText:
    """A data set of samples without content, as many as anybody may want."""

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
        self.model: Any = None

    def run(self, arguments: list[str]) -> dict[str, Any]:
        """Take two steps of the script with these settings; what the second one held and sent.

        SystemExit: (exit code 2) no script of a training, settings that do not fit, or a script that looks at values.
        """
        started = time.perf_counter()
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
            return self.report(arguments, time.perf_counter() - started)

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
        plan, stage, init_mesh = data_sharding.BatchPlan, pipelining.PipelineStage, device_mesh.init_device_mesh
        whole_shapes = ShardingPropagator._propagate_tensor_meta_non_cached

        def join(*_: Any) -> Ranks:
            dist.init_process_group("fake", store=FakeStore(), rank=dry.rank, world_size=dry.world_size)
            return FakeRanks(dry.rank, dry.world_size, dry.rank, dry.world_size, "dry run", torch.device("cpu"))

        def single_process(*_: Any) -> Ranks:
            if dry.world_size > 1:
                fail(f"{dry.script} is a script for one process; expected --world_size 1, not {dry.world_size}; set it")
            return FakeRanks(0, 1, 0, 1, "dry run", torch.device("cpu"))

        class Plan(plan):
            @property
            def accumulation(self) -> int:
                dry.micro_size, dry.accumulation = self.micro_size, super().accumulation
                return dry.limited(dry.accumulation)

        class Record(run.Run):
            """Measures in place of writing; the reduction of the metrics stays."""

            def __init__(self, config: Any, ranks: Ranks, strategy: str, *_: Any, **options: Any) -> None:
                self.config, self.ranks, self._clock = config, ranks, 0.0
                dry.strategy, dry.mesh = strategy, options.get("mesh") or {"data": ranks.world_size}

            def restore(self, model: Any, *_: Any) -> None:
                dry.model = getattr(model, "module", model)
                dry.meter.watch(dry.model, dry.parts or [dry.model])

            def steps(self) -> Iterator[int]:
                yield 0
                dry.meter.in_step = True
                dry.meter.start_step()
                yield 1
                dry.meter.finish_step()

            def say(self, line: str) -> None:
                dry.said.append(line)

            def _read_pending(self) -> None:
                self._pending = None

            def _stop_wanted(self) -> bool:
                return False

            def wants_evaluation(self, step: int) -> bool:
                return False

            def save_if_due(self, *_: Any) -> None:
                pass

            def finish(self) -> None:
                pass

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

        class Stage(stage):
            """Stages usually send each other the shapes of what they exchange; here they are told."""

            def __init__(self, part: torch.nn.Module, number: int, count: int, device: torch.device, **more) -> None:
                config = dry.config
                dry.parts.append(part)
                batch, sequence = config.batch.micro_size or dry.micro_size, config.data.sequence_length
                dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
                low = torch.bfloat16 if config.train.precision == "bf16" and isinstance(part, FSDPModule) else dtype
                cut = config.mesh.tp if getattr(config, "sequence_parallel", False) else 1
                hidden = torch.empty(batch, sequence // cut, config.model.width, dtype=low, requires_grad=True)
                first = torch.empty(batch, sequence, dtype=torch.int64)
                last = torch.empty(1, dtype=dtype, requires_grad=True)
                inputs, outputs = first if number == 0 else hidden, last if number == count - 1 else hidden
                super().__init__(part, number, count, device, input_args=inputs, output_args=outputs, **more)

        return [
            (ranks, "join", join),
            (ranks, "single_process", single_process),
            (data, "text_datasets", lambda config, _: (NoText(config.sequence_length),) * 2),
            (data_sharding, "BatchPlan", Plan),
            (data_sharding, "Loader", NoLoader),
            (run, "Run", Record),
            (Transformer, "compile_blocks", lambda *_, **__: None),
            (torch.nn.Module, "_apply", apply),
            (ShardingPropagator, "_propagate_tensor_meta_non_cached", propagate),
            (device_mesh, "init_device_mesh", real_mesh),
            (device_mesh.DeviceMesh, "__init__", mesh_of_real_ranks),
            (pipelining, "PipelineStage", Stage),
            (torch.nn.parallel, "DistributedDataParallel", no_data_parallel),
        ]

    def report(self, arguments: list[str], seconds: float) -> dict[str, Any]:
        """Everything that was measured, as plain numbers and strings."""
        meter, formulas = self.meter, predict(self)
        micro_batches = self.limited(self.accumulation)
        if micro_batches < self.accumulation:
            self.notes.append(
                f"{micro_batches} of {self.accumulation} micro-batches; the others repeat their collectives"
            )
        collectives = []
        for (kind, axis, size), count in sorted(meter.collectives.items()):
            nbytes = meter.collective_bytes[kind, axis, size]
            sent = round(SENT[kind](size) * nbytes) if kind in SENT else None
            collectives.append(dict(kind=kind, axis=axis, ranks=size, count=count, bytes=nbytes, sent_bytes=sent))
        return {
            "script": str(self.script),
            "arguments": arguments,
            "world_size": self.world_size,
            "rank": self.rank,
            "strategy": self.strategy,
            "mesh": self.mesh,
            "said": self.said[0] if self.said else "",
            "micro_batches": micro_batches,
            "micro_size": self.micro_size,
            "sequence_length": self.config.data.sequence_length,
            "bytes": {**meter.bytes, ACTIVATIONS: meter.activations, "peak": meter.peak},
            "peak": {"when": meter.peak_place, "held": dict(meter.held_at_peak.most_common())},
            "collectives": collectives,
            "formulas": {name: dict(value=v, formula=f, source=s) for name, (v, f, s) in formulas.items()},
            "notes": self.notes,
            "versions": {"torch": torch.__version__},
            "seconds": round(seconds, 1),
        }


@contextlib.contextmanager
def loaded(script: Path) -> Iterator[ModuleType]:
    """The script as a module, its folder on the path as python has it; then both are forgotten."""
    folder = str(script.resolve().parent)
    names = {path.stem for path in Path(folder).glob("*.py")} & set(sys.modules)
    hidden = {name: sys.modules.pop(name) for name in names}  # another lesson may have a file of the same name
    before = set(sys.modules)
    sys.path.insert(0, folder)
    try:
        spec = importlib.util.spec_from_file_location(f"dry_run_of_{script.stem}", script)
        if spec is None or spec.loader is None or not script.is_file():
            fail(f"{script}: no such script; expected a lesson's, such as fsdp/train.py; give its path")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where settings look up their types
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - before:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(folder + "/"):
                del sys.modules[name]
        sys.modules.update(hidden)


def config_class(lesson: ModuleType, script: Path) -> type:
    """The settings that the script's `main` takes."""
    main = getattr(lesson, "main", None)
    kinds = [p.annotation for p in inspect.signature(main).parameters.values()] if callable(main) else []
    takes_settings = len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], settings.Config)
    if not takes_settings or not hasattr(lesson, "Run"):  # which is what tells where a step begins
        fail(f"{script} has no main(config) that trains the transformer; expected a lesson's train.py or its like")
    return kinds[0]


# ------------------------------------------------------------------------------------------------------- formulas


def predict(dry: DryRun) -> dict[str, Formula]:
    """What the lessons' READMEs say of this strategy; keys: a quantity, or "collective axis count" and "… bytes"."""
    config, size = dry.config, 8 if dry.config.train.precision == "fp64" else 4
    low = {"bf16": 2, "fp64": 8}.get(config.train.precision, 4)  # in which FSDP gathers, and tensor ranks compute
    micro_batches = dry.limited(dry.accumulation)
    layers = config.model.layers
    everything = list(dry.model.parameters())
    blocks = [p for block in dry.model.blocks.values() for p in block.parameters()]
    formulas: dict[str, Formula] = {}

    def state(parameters: float, formula: str, source: str) -> None:
        formulas[PARAMETERS] = size * parameters, f"{size} {formula}", source
        formulas[GRADIENTS] = size * parameters, f"{size} {formula}", source
        if config.optimizer.name == "adamw":
            formulas[STATE] = 2 * size * parameters, f"{2 * size} {formula}", source

    def collective(kind: str, axis: str, count: float, nbytes: float, formula: str, source: str) -> None:
        axis = "world" if dry.mesh.get(axis) == dry.world_size else axis  # torch has one group for both
        formulas[f"{kind} {axis} count"] = count, formula.partition("; ")[0], source
        formulas[f"{kind} {axis} bytes"] = nbytes, formula.partition("; ")[2], source

    def sharding(whole: float, of_blocks: float, n: int, axis: str, reshard: bool, source: str) -> None:
        """FSDP among n ranks of `whole` parameters, of_blocks of them in blocks."""
        m, passes = micro_batches, 2 if reshard else 1
        words = f"m (1 + {passes} L); {low} m (P + {passes - 1} (P - R))"
        gathered = m * (whole + (passes - 1) * of_blocks)
        collective("all-gather", axis, m * (1 + passes * layers), low * gathered, words, source)
        wide = max(low, 4)  # gradients are summed in fp32 where units compute in bf16
        collective("reduce-scatter", axis, 1 + layers, wide * whole, f"1 + L; {wide} P", source)
        if dry.mesh.get("replicate", 1) > 1:
            words = f"1 + L; {wide} P / n"
            collective("all-reduce", "replicate", 1 + layers, wide * whole / n, words, source)

    def count(parameters: list[torch.Tensor]) -> int:
        return sum(p.numel() for p in parameters)

    if dry.strategy == "fsdp":
        n = dry.mesh["shard"]
        state(count(everything) / n, "P / n", "fsdp/README.md")
        reshard = config.fsdp.reshard_after_forward
        sharding(count(everything), count(blocks), n, "shard", reshard, "fsdp/README.md")
    elif dry.strategy == "tensor":
        dp, tp = dry.mesh["dp"], dry.mesh["tp"]
        source = "model_parallel/README.md"

        def slices(parameters: list[torch.Tensor]) -> float:
            return sum(p.numel() / (tp if p.ndim > 1 else 1) for p in parameters)

        state(slices(everything) / dp, "P' / dp, P' = matrices / tp + norms", source)
        if dp > 1:
            sharding(slices(everything), slices(blocks), dp, "dp", True, "fsdp/README.md, of slices P'")
        hidden = low * dry.micro_size * config.data.sequence_length * config.model.width * micro_batches
        if not config.train.activation_checkpointing and config.sequence_parallel:
            each = micro_batches * (2 + 4 * layers)
            for kind in ("all-gather", "reduce-scatter"):
                words = "m (2 + 4 L); each b s w"
                collective(kind, "tp", each, (2 + 4 * layers) * hidden, words, source)
    elif dry.strategy.startswith("pipeline"):
        mine = count(everything)
        state(mine, "P of its stages", "model_parallel/README.md")
        stages = dry.world_size * config.stages_per_rank
        ends = [n in (0, stages - 1) for n in range(dry.rank, stages, dry.world_size)]
        each = micro_batches * sum(1 if end else 2 for end in ends)
        nbytes = each * max(size, 4) * dry.micro_size * config.data.sequence_length * config.model.width
        for kind in ("send", "receive"):
            words = "m for each neighbour of a stage; 4 b s w each"
            collective(kind, "world", each, nbytes, words, "from_scratch/README.md")
    return formulas


# ---------------------------------------------------------------------------------------------------------- output


def human(nbytes: float) -> str:
    return f"{nbytes / 2**30:,.2f} GiB" if nbytes >= 2**30 / 10 else f"{nbytes / 2**20:,.2f} MiB"


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    batches = "1 micro-batch" if report["micro_batches"] == 1 else f"{report['micro_batches']} micro-batches"
    micro = f"{batches} of {report['micro_size']} × {report['sequence_length']} tokens"
    lines = [
        f"{report['script']} on {report['world_size']} fake ranks, seen from rank {report['rank']}; a step of {micro}",
        report["said"],
        f"\n{'bytes on this rank':24}{'counted':>20}{'':14}{'formula':>20}",
    ]
    formulas = report["formulas"]
    for name, nbytes in report["bytes"].items():
        line = f"{name:24}{nbytes:>20,}{human(nbytes):>14}"
        if found := formulas.get(name):
            line += f"{found['value']:>20,.0f}   {found['formula']} ({found['source']})"
        lines.append(line)
    held = ", ".join(f"{kind} {human(n)}" for kind, n in report["peak"]["held"].items() if n >= 0.001 * 2**20)
    lines += [
        f"the peak comes in: {report['peak']['when']}",
        f"it consists of: {held}",
        f"\n{'collectives of a step':16}{'axis':>11}{'ranks':>7}{'count':>8}{'formula':>9}{'bytes':>18}{'formula':>18}"
        f"{'sent in a ring':>18}",
    ]
    for row in report["collectives"]:
        count, nbytes = (formulas.get(f"{row['kind']} {row['axis']} {what}") for what in ("count", "bytes"))
        lines.append(
            f"{row['kind']:21}{row['axis']:>11}{row['ranks']:>7}{row['count']:>8,}"
            f"{format(count['value'], ',.0f') if count else '-':>9}{row['bytes']:>18,}"
            f"{format(nbytes['value'], ',.0f') if nbytes else '-':>18}"
            f"{'-' if row['sent_bytes'] is None else format(row['sent_bytes'], ','):>18}"
        )
    lines += [f"note: {note}" for note in report["notes"]]
    return "\n".join([*lines, f"{report['seconds']} s without a single real tensor"])


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(f"command line: {message}; see --help; settings of the script come after --")


def main() -> None:
    usage = "%(prog)s SCRIPT --world_size N [options] [-- settings of the script]"
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("planner/dry_run.py", usage, description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("script", type=Path, help="a lesson's script, such as fsdp/train.py")
    parser.add_argument("--world_size", type=int, required=True, help="how many ranks there are to be")
    parser.add_argument("--rank", type=int, default=0, help="the rank to look at: stages of a pipeline differ")
    parser.add_argument(
        "--micro_batches", type=int, help="at most so many a step: two show all there is to see; of a pipeline more"
    )
    parser.add_argument("--device_memory_gib", type=float, help="say so if the peak is larger than this")
    parser.add_argument("--json", type=Path, help="write the report to this file, too")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, of_script = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    if options.world_size < 1 or not 0 <= options.rank < options.world_size:
        found = f"--rank {options.rank} with --world_size {options.world_size}"
        fail(f"{found}; expected 0 <= rank < world size, which is at least 1; change one")
    if options.micro_batches is not None and options.micro_batches < 1:
        fail(f"--micro_batches {options.micro_batches}; expected 1 or more; leave it out for all")
    report = DryRun(options.script, options.world_size, options.rank, options.micro_batches).run(of_script)
    if options.device_memory_gib and report["bytes"]["peak"] > options.device_memory_gib * 2**30:
        peak, least = (
            human(report["bytes"]["peak"]),
            report["bytes"]["peak"] - report["peak"]["held"].get(ACTIVATIONS, 0),
        )
        report["notes"].append(
            f"the peak, {human(peak)}, exceeds the device's {options.device_memory_gib:g} GiB ({human(least)} of it are not "
            f"activations): try activation checkpointing, a smaller micro-batch, more ranks, or another strategy"
        )
    print(table(report))
    if options.json:
        try:
            options.json.write_text(json.dumps(report, indent=1) + "\n")
        except OSError as error:
            fail(f"--json {options.json}: {error.strerror}; choose a file that you can write")


if __name__ == "__main__":
    main()
