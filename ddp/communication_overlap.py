"""What overlaps with what: DDP's buckets, and the all-reduces that run while backward is still computing.

    torchrun --nproc-per-node=2 ddp/communication_overlap.py                   # half a minute on a laptop
    torchrun --nproc-per-node=8 ddp/communication_overlap.py --model.preset gpt_124m --bucket_cap_mb 25 \
        --batch.global_size 64 --data.sequence_length 1024                     # eight GPUs

One step, forward and backward, in ten settings that differ in one thing each: all-reduce by hand after backward,
DDP with large and small buckets, gradients as views into the buckets, a static graph, hooks that compress. The
settings take turns, so that a busy machine slows all of them alike. Messages and bytes are counted where they
enter the process group; times come from a hook that notes when a bucket is full and when it is averaged. The
output folder gets results.json, a timeline (timeline.png), and traces for ui.perfetto.dev or chrome://tracing.

On one machine whose cores compute *and* communicate, overlap gains little or nothing: there is no waiting to hide.
It pays where the network keeps the ranks waiting. Linux makes such a network (with iproute2) without a second
machine and without root, in a network namespace that ends with the command:

    unshare --user --map-root-user --net sh -c 'ip link set lo mtu 1500 up
        tc qdisc add dev lo root tbf rate 300mbit burst 64kb limit 16mb
        torchrun --nproc-per-node=2 ddp/communication_overlap.py'
"""

import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from overlap_report import draw_timeline, print_report
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import profile, record_function

from common.config import parse, runs_dir
from common.config_fields import PathText
from common.data_sharding import BatchConfig, BatchPlan, derive_seed
from common.ranks import Ranks, fail, join
from common.transformer import ModelConfig, Transformer

WARM_UP_STEPS = 3  # the first backward knows one bucket only; from the second on they are what was asked for

Hook = Callable[[Any, dist.GradBucket], torch.futures.Future[torch.Tensor]]
Interval = tuple[float, float]  # milliseconds since backward began


@dataclass
class Steps:
    steps: int = 10
    """Timed steps of each setting."""


@dataclass
class Batch:
    global_size: int = 24
    """Samples per step over all ranks."""


@dataclass
class RandomText:
    sequence_length: int = 64
    """Random tokens per sample: their meaning changes neither times nor bytes."""


@dataclass
class OverlapConfig:
    bucket_cap_mb: float = 1.0
    """DDP's limit for a bucket, in MiB; a quarter of it, torch's default and no limit at all are tried too."""
    output: PathText | None = None
    """Folder to write to; by default a new one under runs, or under the variable RUNS_DIR."""
    train: Steps = field(default_factory=Steps)
    batch: Batch = field(default_factory=Batch)
    data: RandomText = field(default_factory=RandomText)
    model: ModelConfig = field(default_factory=ModelConfig)
    seed: int = 1234
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        length, longest = self.data.sequence_length, self.model.max_sequence
        if not 0 < self.bucket_cap_mb <= 1e6 or self.train.steps < 1 or not 1 <= length <= longest:
            raise ValueError(
                f"bucket_cap_mb = {self.bucket_cap_mb} must be above 0, at most 1e6, train.steps = {self.train.steps} "
                f"at least 1, and data.sequence_length = {length} 1 to model.max_sequence = {longest}"
            )


def bf16_hook(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Send the gradients as bf16, over any backend; torch's own bf16_compress_hook is for NCCL only."""
    rounded = bucket.buffer().to(torch.bfloat16).div_(dist.get_world_size())
    future = dist.all_reduce(rounded, async_op=True).get_future()
    return future.then(lambda averaged: bucket.buffer().copy_(averaged.value()[0]))


def all_settings(cap: float) -> list["Setting"]:
    """Each differs in one thing from `buckets of … MiB`, and PowerSGD from `one bucket`."""
    limit, no_limit = {"bucket_cap_mb": cap}, {"bucket_cap_mb": 2**20}
    # PowerSGD (arXiv 1905.13727) sends two thin factors of each gradient matrix. torch's hook blocks within a callback
    # until a factor is averaged. With several buckets under way, both of Gloo's threads are blocked in that way, and
    # none is left to average anything: a hang. With one bucket, only one of them is.
    power_sgd = PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)
    return [
        Setting("by hand, after backward", limit, by_hand=True),
        Setting("one bucket", no_limit),
        Setting("default: 1, then 25 MiB", {}),
        Setting(f"buckets of {cap:g} MiB", limit),
        Setting(f"buckets of {cap / 4:g} MiB", {"bucket_cap_mb": cap / 4}),
        Setting(f"{cap:g} MiB, gradient_as_bucket_view", limit | {"gradient_as_bucket_view": True}),
        Setting(f"{cap:g} MiB, static_graph", limit | {"static_graph": True}),
        Setting(f"{cap:g} MiB, fp16 hook", limit, fp16_compress_hook),
        Setting(f"{cap:g} MiB, bf16 hook", limit, bf16_hook),
        Setting("one bucket, PowerSGD of rank 2", no_limit, powerSGD_hook, power_sgd),
    ]


@dataclass
class StepTimes:
    """One step, in milliseconds since its backward began."""

    forward_start: float
    compute_end: float  # the last gradient is computed; DDP's backward() returns after the last all-reduce only
    end: float
    all_reduces: list[Interval]  # by bucket, from full to averaged: waiting in line and for other ranks included

    @property
    def step_ms(self) -> float:
        return self.end - self.forward_start

    @property
    def share_inside_backward(self) -> float:
        """Of the time in which some bucket was under way, the part in which backward was computing too."""
        under_way = inside = reached = 0.0
        for start, end in sorted(self.all_reduces):
            start, reached = max(start, reached), max(end, reached)
            under_way += max(0.0, reached - start)
            inside += max(0.0, min(reached, self.compute_end) - start)
        return inside / under_way


@contextmanager
def counted_messages() -> Iterator[list[int]]:
    """Note the bytes of every all-reduce, whoever starts it, in whichever thread."""
    message_bytes: list[int] = []
    all_reduce = dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        message_bytes.append(tensor.nbytes)
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        yield message_bytes
    finally:
        dist.all_reduce = all_reduce


class Setting:
    """One way to average gradients: a copy of the model under DDP, and what is seen of its steps."""

    def __init__(
        self, name: str, options: dict[str, Any], hook: Hook = allreduce_hook, state: Any = None, by_hand: bool = False
    ) -> None:
        self.name, self.options, self.hook, self.state, self.by_hand = name, options, hook, state, by_hand
        self.buckets: list[list[torch.nn.Parameter]] = []  # in the order in which DDP sends them
        self.bucket_bytes: dict[int, int] = {}  # by address
        self.message_bytes: list[int] = []
        self.times: list[StepTimes] = []

    def prepare(self, model: Transformer, text: torch.Tensor, ranks: Ranks) -> None:
        """Wrap a copy of the model, let DDP settle on its buckets, and count the messages of one step."""
        self.text, self.ranks, self.settled = text, ranks, False
        self.ddp_model = DistributedDataParallel(copy.deepcopy(model), device_ids=ranks.device_ids, **self.options)
        self.ddp_model.register_comm_hook(None, self.timed_hook)
        for _ in range(WARM_UP_STEPS):
            self.buckets, self.bucket_bytes = [], {}
            self.step()
        self.settled = True
        with counted_messages() as self.message_bytes:
            self.step()
        self.times.clear()

    def timed_hook(self, _: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """DDP calls this when a bucket is full, and goes on with backward while the future is not there yet."""
        full = self.now()
        if not self.settled:
            self.buckets.append(bucket.parameters())
            self.bucket_bytes[bucket.buffer().untyped_storage().data_ptr()] = bucket.buffer().nbytes

        def averaged(future: torch.futures.Future[torch.Tensor]) -> torch.Tensor:
            self.marks.append((full, self.now()))
            return future.value()

        return self.hook(self.state, bucket).then(averaged)

    def step(self) -> None:
        """Forward and backward; what happened when goes to `times`."""
        tokens, targets = self.text[:, :-1], self.text[:, 1:]
        by_hand = self.by_hand and self.settled
        self.ddp_model.zero_grad()
        self.marks: list[tuple[Any, Any]] = []
        forward_start = self.now()
        with self.ddp_model.no_sync() if by_hand else nullcontext():
            with record_function("forward"):
                loss = self.ddp_model(tokens, targets) / tokens.numel()
            start = self.now()
            with record_function("backward"):
                loss.backward()
        compute_end = self.now()
        if by_hand:
            self.all_reduce_by_hand()
        end = self.now()
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        self.marks.sort(key=lambda mark: milliseconds(start, mark[0]))
        if not by_hand:
            compute_end = self.marks[-1][0]  # the last bucket is full when the last gradient is there
        reduces = [(milliseconds(start, full), milliseconds(start, averaged)) for full, averaged in self.marks]
        since = [milliseconds(start, moment) for moment in (forward_start, compute_end, end)]
        self.times.append(StepTimes(*since, reduces))

    def all_reduce_by_hand(self) -> None:
        """The same buckets, one after the other, when backward is over."""
        for parameters in self.buckets:
            full = self.now()
            flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
            dist.all_reduce(flat)
            flat /= self.ranks.world_size
            for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                parameter.grad.copy_(part.view_as(parameter))
            self.marks.append((full, self.now()))

    def now(self) -> Any:
        """This moment: in the GPU's stream an event, on the CPU the clock in seconds."""
        if self.ranks.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def gradients(self) -> torch.Tensor:
        return torch.cat([parameter.grad.flatten() for parameter in self.ddp_model.parameters()])

    def gradient_memory_bytes(self) -> int:
        """What gradients and buckets take together: a gradient that is a view into its bucket takes nothing more."""
        storages = {} if self.by_hand else dict(self.bucket_bytes)
        for parameter in self.ddp_model.parameters():
            storage = parameter.grad.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def median_step(self) -> StepTimes:
        """The step of median duration (the shorter of two)."""
        return sorted(self.times, key=lambda times: times.step_ms)[(len(self.times) - 1) // 2]

    def result(self, exact: torch.Tensor) -> dict[str, Any]:
        """What results.json says of this setting."""
        names = {parameter: name for name, parameter in self.ddp_model.module.named_parameters()}
        step_ms = [times.step_ms for times in self.times]
        return {
            "setting": self.name,
            "buckets": [
                {
                    "parameters": [names[parameter] for parameter in bucket],
                    "bytes": sum(p.numel() * p.element_size() for p in bucket),
                }
                for bucket in self.buckets
            ],
            "message_bytes": self.message_bytes,
            "gradient_memory_bytes": self.gradient_memory_bytes(),
            "share_inside_backward": statistics.median(times.share_inside_backward for times in self.times),
            "step_ms": step_ms,
            "relative_gradient_error": float((self.gradients() - exact).norm() / exact.norm()),
            "median_step": asdict(self.median_step()),
        }


def milliseconds(start: Any, end: Any) -> float:
    return start.elapsed_time(end) if isinstance(start, torch.cuda.Event) else (end - start) * 1e3


@record
def main(config: OverlapConfig) -> None:
    ranks = join(config.device)
    if ranks.world_size < 2:
        fail("one process has nobody to average with; start several with torchrun --nproc-per-node=2")
    batch = BatchConfig(config.batch.global_size)
    plan = BatchPlan(batch, config.batch.global_size, config.seed, ranks.rank, ranks.world_size)
    folder = ranks.first_or_fail(lambda: open_folder(config.output))
    model = Transformer(config.model, config.seed).to(ranks.device)
    generator = torch.Generator().manual_seed(derive_seed(config.seed, ranks.rank))
    shape = (plan.micro_size, config.data.sequence_length + 1)
    text = torch.randint(config.model.vocabulary, shape, generator=generator).to(ranks.device)

    settings = all_settings(config.bucket_cap_mb)
    for setting in settings:
        setting.prepare(model, text, ranks)
    for _ in range(config.train.steps):
        for setting in settings:  # in turns
            setting.step()
    by_hand, overlapped = settings[0], settings[3]
    exact = by_hand.gradients()
    results = [setting.result(exact) for setting in settings]
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler complains of a GPU that is not there
    for setting, name in ((by_hand, "by_hand"), (overlapped, "overlapped")):
        with profile(record_shapes=True) if ranks.is_main else nullcontext() as profiler:
            setting.step()
        if profiler is not None:
            profiler.export_chrome_trace(str(folder / f"trace_{name}.json"))

    if ranks.is_main:
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        where = f"{ranks.world_size} ranks, {'NCCL' if ranks.device.type == 'cuda' else 'Gloo on the CPU'}"
        draw_timeline(results[:5], where, folder / "timeline.png")
        print_report(results, where, overlapped.name)
        if ranks.device.type == "cpu" and ranks.local_world_size == ranks.world_size:
            print("Ranks that share the cores of one machine gain little: there is no network to wait for.")
            print("The first lines of this script say how to give them a slow one.")
        print(f"{folder}: results.json, timeline.png, trace_by_hand.json, trace_overlapped.json")
    for setting in settings:  # DDP holds on to the process group, whose threads must end before Python does
        del setting.ddp_model
    ranks.leave()


def open_folder(output: str | None) -> Path:
    """Make the output folder; called on rank 0. Raises OSError where it cannot be made or written."""
    name = f"ddp-communication_overlap-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(output or runs_dir() / name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").touch()
    except OSError as error:
        raise OSError(f"output folder {folder}: {error.strerror}; choose one you can write to with --output") from None
    return folder


if __name__ == "__main__":
    main(parse(OverlapConfig))
