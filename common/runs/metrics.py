"""The metric line: summed over the ranks, read a step late, written to metrics.jsonl and to what else is asked for."""

import contextlib
import errno
import importlib
import json
import os
import resource
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from common.runs.records import Row, read_rows, write_whole

if TYPE_CHECKING:
    from common.config import RunConfig

Sums = tuple[float, float, bool]  # loss summed over the ranks, gradient norm, whether any rank was asked to stop


def start_sum(loss_sum: torch.Tensor, grad_norm: torch.Tensor, stop: bool) -> Callable[[], Sums]:
    """Start to sum the loss over all ranks, and return a function that waits for the result.

    The loss and the request to stop travel together in one small asynchronous all-reduce. The loop calls the function
    a step later, so that it never waits for the device, and all ranks learn of a stop at the same step.

    Args:
        loss_sum: this rank's sum of losses over the step; scalar, on the device.
        grad_norm: global gradient norm before clipping; scalar, on the device or, offloaded, on the CPU.
        stop: whether this rank was asked to stop.
    """
    values = torch.stack([loss_sum.detach().double(), torch.full_like(loss_sum, float(stop), dtype=torch.float64)])
    work = dist.all_reduce(values, async_op=True) if dist.is_initialized() else None
    if not values.is_cuda:

        def read() -> Sums:
            if work is not None:
                work.wait()
            loss, stops = values.tolist()
            return loss, float(grad_norm), stops > 0

        return read

    if work is not None:
        work.wait()  # only orders the streams; the host goes on
    values = torch.cat([values, grad_norm.detach().to(values).reshape(1)])
    on_host = torch.empty(3, dtype=torch.float64, pin_memory=True).copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read_copy() -> Sums:
        copied.synchronize()
        loss, stops, norm = on_host.tolist()
        return loss, norm, stops > 0

    return read_copy


class MetricsFile:
    """metrics.jsonl of a run, and the sinks that get some of its rows. Only rank 0 has one.

    Args:
        folder: of the run.
        sinks: from `open_sinks`.
        first_step: rows of later steps, left by an attempt that went further than its last checkpoint, are removed.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, folder: Path, sinks: list["Sink"], first_step: int) -> None:
        path = folder / "metrics.jsonl"
        rows = read_rows(folder) if path.exists() else []
        # An evaluation counts the steps done before it: the one after the last step has step = first_step.
        kept = [row for row in rows if row["step"] < first_step + ("val_loss" in row)]
        self.rows: list[Row] = [row for row in kept if "loss" in row]
        self.validation: dict[int, float] = {row["step"]: row["val_loss"] for row in kept if "val_loss" in row}
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.path, self._sinks, self._waiting = path, sinks, b""
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  (closed in close)
        self._size = path.stat().st_size

    def add(self, row: Row, to_sinks: bool) -> str | None:
        """Append a row: of a step (it has `loss`) or of an evaluation (`val_loss`).

        Returns:
            Why it could not be written, or None. The next call tries again.
        """
        if "loss" in row:
            self.rows.append(row)
        else:
            self.validation[row["step"]] = row["val_loss"]
        self._waiting += json.dumps(row).encode() + b"\n"
        for sink in self._sinks if to_sinks else ():
            sink.add(row)
        return self._write()

    def _write(self) -> str | None:
        try:
            if self._file.write(self._waiting) == len(self._waiting):
                self._size, self._waiting = self._size + len(self._waiting), b""
                return None
            reason = os.strerror(errno.ENOSPC)  # a part of it had room
        except OSError as error:
            reason = error.strerror or str(error)
        with contextlib.suppress(OSError):
            self._file.truncate(self._size)  # no torn line stays
        return f"{self.path} cannot be written: {reason}"

    def sync(self) -> None:
        """Bring the rows to the disk, before a checkpoint that comes after them."""
        with contextlib.suppress(OSError):  # the checkpoint's own error says it better
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and the sinks."""
        self.sync()
        self._file.close()
        for sink in self._sinks:
            sink.close()


class TensorBoardSink:
    """Rows as curves in TensorBoard: tensorboard --logdir runs."""

    def __init__(self, folder: Path, settings: dict[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def add(self, row: Row) -> None:
        """Add a point to each curve."""
        for name, value in row.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WandbSink:
    """Rows in Weights & Biases; the key comes from the environment or from `wandb login`."""

    def __init__(self, folder: Path, settings: dict[str, Any], first_step: int) -> None:
        import wandb

        self._run = wandb.init(name=folder.name, dir=folder, config=settings, resume="allow", id=folder.name)

    def add(self, row: Row) -> None:
        """Log the row at its step."""
        self._run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def close(self) -> None:
        """End the run there."""
        self._run.finish()


Sink = TensorBoardSink | WandbSink


def _sinks(config: "RunConfig") -> list[tuple[str, str, type[Sink]]]:
    chosen = (
        (config.tensorboard, "tensorboard", "torch.utils.tensorboard", TensorBoardSink),
        (config.wandb, "wandb", "wandb", WandbSink),
    )
    return [(package, module, sink) for wanted, package, module, sink in chosen if wanted]


def import_sinks(config: "RunConfig") -> None:
    """Import what TensorBoard and Weights & Biases need, where the settings ask for them. ValueError: it is missing."""
    for package, module, _ in _sinks(config):
        try:
            if importlib.import_module(module).__file__ is None:  # a folder wandb/ of runs, not the package
                raise ImportError(f"No module named {package!r}")
        except Exception as error:  # whatever a half-installed package raises
            found = f"{package} = true needs the package {package}, which cannot be imported ({error})"
            raise ValueError(f"{found}; pip install {package}, or leave the setting out") from None


def open_sinks(config: "RunConfig", folder: Path, settings: dict[str, Any], first_step: int) -> list[Sink]:
    """Begin to log to TensorBoard and Weights & Biases, where the settings ask for it. ValueError: it is refused."""
    opened: list[Sink] = []
    for package, _, sink in _sinks(config):
        try:
            opened.append(sink(folder, settings, first_step))
        except Exception as error:  # the library's own: no key, no network, a full disk
            raise ValueError(f"{package} = true: {error}; mend it, or leave the setting out") from None
    return opened


def median_rate(rows: list[Row], unit: str, first_step: int) -> float | None:
    """Return the median of units per second over the steps of this attempt; None without a step.

    An earlier attempt may have had other ranks. The first step allocates and compiles: it does not count.
    """
    of_attempt = [row for row in rows if row["step"] >= first_step] or rows
    steady = of_attempt[1:] or of_attempt
    return statistics.median(row[f"{unit}_per_second"] for row in steady) if steady else None


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this rank held: allocated on the GPU, or resident in RAM for a CPU rank."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # the kernel's own record, in bytes or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def plot_loss(rows: list[Row], validation: dict[int, float], path: Path) -> None:
    """Draw training and validation loss over the steps into a PNG."""
    from matplotlib.figure import Figure  # without pyplot: no window system is touched

    figure = Figure(figsize=(7, 4), dpi=120)
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], label="training")
    if validation:
        axes.plot(list(validation), list(validation.values()), "o", label="validation")
    axes.set_title(path.parent.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
