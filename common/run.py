"""One run: what a training loop tells, and what it is told. Folder, stop requests and metrics have files of their own.

    for step in run.steps(validate):          # the steps still to do; ends early when any rank was told to stop
        …
        run.log(step, loss_sum, grad_norm, lr)
        run.end_step(step, model, optimizer)  # saves; after that `steps` evaluates: whatever fails there loses nothing

A framework that owns the loop calls `next_step` instead of iterating over `steps`, and `log_validation`.
"""

import math
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from common import flops
from common.config import RunConfig, to_dict
from common.data_sharding import derive_seed
from common.launching import lost_ranks, same_start
from common.ranks import Ranks, fail
from common.replica_check import check_replicas
from common.runs import ending, metrics, run_folder
from common.runs.stopping import StopRequest

if TYPE_CHECKING:
    from common.checkpoint import Model


class Run:
    """Keeps the record of one training, the same from every script. All ranks make one; rank 0 prints and writes.

    Args:
        config: the resolved settings.
        ranks: from `join` or `single_process`.
        strategy: how the training is distributed, in one word ("single", "ddp", "fsdp", "tensor" …).
        units_per_step: tokens (or images) in the global batch; the logged loss is the sum over ranks divided by this.
        unit: what is counted: "tokens" or "images".
        flops_per_unit: forward and backward of one token or image, for MFU; see `common.flops`.
        mesh: sizes of the axes `run_folder.AXES`; by default all ranks are data-parallel replicas.
        fingerprint: of the data, from the data set.
        replicas: the ranks that must hold the same plain tensors, for the replica check; by default all. (A DTensor
            knows its own.)
        framework: the package that does the distributed part; its version goes into run.json.
        start_sum: sums the metrics over the ranks; a framework without torch's process group brings its own.

    Raises:
        SystemExit: (exit code 2, on all ranks) the ranks were started differently; the folder cannot be written, or
            holds a run with other settings.
    """

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        strategy: str,
        *,
        units_per_step: int,
        unit: str = "tokens",
        flops_per_unit: float | None = None,
        mesh: dict[str, int] | None = None,
        fingerprint: str | None = None,
        replicas: dist.ProcessGroup | None = None,
        framework: str = "torch",
        start_sum: Callable[[Any, Any, bool], Callable[[], metrics.Sums]] = metrics.start_sum,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.units_per_step = units_per_step
        self.unit = unit
        self.flops_per_unit = flops_per_unit
        self.replicas = replicas
        self.start_sum = start_sum
        flops.allow_tf32(config.train.tf32)
        self.peak_flops = flops.peak_flops(ranks.device, config.train.precision) if flops_per_unit else None

        self.settings = to_dict(config)
        data = same_start.noted() | {"data for training": str(fingerprint)}
        ranks.compare_start(same_start.of_settings(self.settings) | data)
        ranks.first_or_fail(lambda: metrics.import_sinks(config))
        self.folder, self._start, self._back, changes = ranks.first_or_fail(
            lambda: run_folder.open_folder(config, self.settings, fingerprint)
        )
        if changes:
            ranks.print(changes)
        self.record = {
            "framework": framework,
            "strategy": strategy,
            "launcher": ranks.launcher,
            "world_size": ranks.world_size,
            "mesh": run_folder.full_mesh(mesh, ranks.world_size),
            "hosts": sorted(set(ranks.all_gather(socket.gethostname()))),
            "device": _device_name(ranks.device),
            "unit": unit,
            "units_per_step": units_per_step,
            "flops_per_unit": flops_per_unit,
            "peak_flops": self.peak_flops,
            "data_fingerprint": fingerprint,
        }
        if ranks.is_main:
            self.record |= run_folder.environment_record(framework)
        self.stop_request = StopRequest(self.folder, ranks.is_main, alone=ranks.launcher == "python")
        self.first_step = 0
        self.steps_done = 0
        self.evaluation_is_due = False  # the checkpoint was saved, and the evaluation after it did not come to its end
        self._step: int | None = None  # the one that the loop is in
        self._stopping = False  # all ranks have agreed
        self._attempt: str | None = None  # of rank 0, from `begin` on
        self._problem: str | None = None  # of rank 0: what it could not write
        self._evaluated = False
        self._pending: tuple[int, float, float, Callable[[], metrics.Sums]] | None = None
        self._metrics: metrics.MetricsFile | None = None  # of rank 0, from `begin` on
        self._bar = tqdm(
            total=config.train.steps, unit="step", disable=None if ranks.is_main else True, dynamic_ncols=True
        )
        self._clock = time.perf_counter()

    # ---------------------------------------------------------------------------------- begin, resume, save

    def restore(
        self, model: "Model", optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        """Load the checkpoint that this run continues from, if there is one, and begin. Call it before the loop."""

        def load(start: Path | None) -> int:
            if start is None:
                return 0
            from common import checkpoint  # here: it takes a second to import, and a new run does without

            groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            manifest = checkpoint.load(start, model, optimizer, self.ranks)
            for group, ours in zip(optimizer.param_groups, groups, strict=True):
                group |= ours  # a checkpoint brings its settings (betas, weight decay) along: those of now count
            if scaler and manifest["extra"].get("scaler"):
                scaler.load_state_dict(manifest["extra"]["scaler"])
            return manifest["step"]

        self.begin(load(self._start), load)

    def begin(self, first_step: int, load: Callable[[Path | None], int] | None = None) -> None:
        """Take the run folder over, and open the metrics, cut back to `first_step` steps. Nothing of the folder was
        changed before: up to here, another start of this run goes on undisturbed.

        `restore` calls it; a framework that loads its own checkpoints calls it instead. `load` loads a checkpoint once
        more, where an attempt that was still alive has committed another one meanwhile.
        """
        config, start = self.config, self._start
        sinks: list[metrics.Sink] = []

        def take_over() -> tuple[Path | None, list[Path]]:
            sinks.extend(metrics.open_sinks(config, self.folder, self.settings, first_step))
            self._attempt, newest, aside = run_folder.take_over(
                self.folder, start, self._back, self.settings, self.record
            )
            return newest, aside

        self._start, aside = self.ranks.first_or_fail(take_over)
        if load and self._start != start:
            first_step = load(self._start)
        self.first_step = self.steps_done = first_step
        last = first_step - 1

        def open_metrics() -> bool:
            self._metrics = metrics.MetricsFile(self.folder, sinks, first_step)
            return last >= 0 and self.wants_evaluation(last) and first_step not in self._metrics.validation

        self.evaluation_is_due = self.ranks.first_or_fail(open_metrics)
        self._bar.update(first_step)
        if self._start:
            self.ranks.print(f"resumed from {self._start}: {first_step} steps done")
        for path in aside:
            self.ranks.print(f"a newer checkpoint is set aside as {path}: remove it when you do not need it")
        self.ranks.print(f"world size {self.ranks.world_size} on {self.record['device']}, run folder {self.folder}")

    def wants_saving(self, step: int) -> bool:
        """True after the last step, every `checkpoint.every` steps, and when the run stops; the same on all ranks."""
        every = self.config.checkpoint.every
        return step + 1 == self.config.train.steps or self._stopping or bool(every and (step + 1) % every == 0)

    def end_step(
        self, step: int, model: "Model", optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        """Check the replicas and save a checkpoint when the settings, the end, or a request to stop say so.

        Raises:
            SystemExit: (exit code 2, on all ranks) the replicas differ; a loss, a gradient norm, a weight or a moment
                is nan or inf; the checkpoint cannot be written. Earlier checkpoints are untouched.
        """
        done, check = step + 1, self.config.train.check_replicas_every
        last = done == self.config.train.steps or self._stopping
        if check and (done % check == 0 or last):
            held: Any = model.module if hasattr(model, "whole_state") else model  # see checkpoint.WholeState
            check_replicas(held, step, self.replicas)
        if self.wants_saving(step):
            from common import checkpoint

            self.settle()
            if self._metrics is not None:
                self._metrics.sync()  # a crash then leaves all rows up to the checkpoint
            extra = {"settings": run_folder.lasting(self.settings), "data_fingerprint": self.record["data_fingerprint"]}
            if scaler and scaler.is_enabled():
                extra["scaler"] = scaler.state_dict()
            keep = self.config.checkpoint.keep
            checkpoint.save(self.folder / "checkpoints", done, model, optimizer, self.ranks, extra, keep, self._attempt)
            self._clock = time.perf_counter()  # saving is not part of a step

    # ------------------------------------------------------------------------------------------ the loop

    def next_step(self) -> int | None:
        """Return the step to do now; None when all are done, or when any rank was told to stop.

        All ranks get the same answer. Random numbers (dropout) depend on (seed, step, rank): nothing to save.
        """
        if self._step is None:
            self._clock = time.perf_counter()  # loading is not part of a step
        else:
            self.steps_done = self._step + 1
            self._bar.update()
        if self._stopping or self.is_complete:
            self.settle()
            return None
        self._step = self.steps_done
        lost_ranks.note_step(self._step)
        seed = derive_seed(self.config.seed, "step", self._step, self.ranks.rank)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every kind of device, each time
        if self.ranks.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        return self._step

    def steps(self, validate: Callable[[], float | dict[str, float]] | None = None) -> Iterator[int]:
        """Yield the steps still to do; ends early, at the same step on all ranks, when any rank was told to stop.

        Args:
            validate: evaluates: the validation loss, or `val_loss` and other results by name, reduced over the ranks.
                It is called after a step that was evaluated by `train.eval_every`, and after the last one; and first of
                all where an attempt before this one saved, and did not get through its evaluation.
        """
        self._step, self.steps_done = None, self.first_step
        done, wanted = self.first_step, self.evaluation_is_due
        while True:
            if wanted and validate:
                results = validate()
                self.log_validation(done - 1, **(results if isinstance(results, dict) else {"val_loss": results}))
            if (step := self.next_step()) is None:
                return
            yield step
            done = step + 1
            cut_short = (
                self._stopping and done < self.config.train.steps
            )  # there may be seconds left; resumed, it is due
            wanted = self.wants_evaluation(step) and not cut_short

    @property
    def is_complete(self) -> bool:
        """All steps are done, in this attempt or before it."""
        return self.steps_done >= self.config.train.steps

    def log(self, step: int, loss_sum: Any, grad_norm: Any, lr: float) -> None:
        """Record one step. Starts a small asynchronous sum over all ranks, and reads that of the step before.

        Args:
            loss_sum: this rank's sum of losses over the step, before the update; scalar, on the device.
            grad_norm: global gradient norm before clipping; scalar.
        """
        self.settle()
        read = self.start_sum(loss_sum, grad_norm, self.stop_request.is_set())
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self._pending = (step, lr, seconds, read)

    def settle(self) -> None:
        """Read the metrics of the last step logged. Whoever commits a checkpoint of its own calls it before.

        Raises:
            SystemExit: (exit code 2, on all ranks) the loss or the gradient norm is nan or inf.
        """
        if self._pending is None:
            return
        step, lr, seconds, read = self._pending
        self._pending = None
        loss_sum, grad_norm, stop = read()
        self._stopping = self._stopping or stop
        loss = loss_sum / self.units_per_step
        if self._metrics is not None:
            self._write_step(self._metrics, step, loss, grad_norm, lr, seconds)
        what, value = ("loss", loss) if not math.isfinite(loss) else ("gradient norm", grad_norm)
        # fp16's scaler leaves such a step out; anywhere else its update has spoiled the weights by now.
        if not math.isfinite(loss) or (not math.isfinite(grad_norm) and self.config.train.precision != "fp16"):
            advice = "lower optimizer.lr, or look at the data; checkpoints are untouched"
            fail(f"the {what} is {value} at step {step}; {advice}")

    def _write_step(
        self, file: metrics.MetricsFile, step: int, loss: float, grad_norm: float, lr: float, seconds: float
    ) -> None:
        rate = self.units_per_step / seconds
        memory = metrics.peak_memory_bytes(self.ranks.device)
        mfu = self.mfu(rate)
        row = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,  # fp16's scaler skips such a step
            "lr": lr,
            self.unit: (step + 1) * self.units_per_step,
            "step_seconds": seconds,
            f"{self.unit}_per_second": rate,
            "mfu": mfu,
            "peak_memory_bytes": memory,
        }
        shown = step % self.config.train.log_every == 0 or step + 1 == self.config.train.steps
        self._note(file.add(row, to_sinks=shown))
        if shown:
            self.ranks.print(
                f"step {step:>5}  loss {loss:.4f}  grad norm {grad_norm:.3f}  lr {lr:.2e}  {rate:,.0f} {self.unit}/s"
                f"{f'  mfu {mfu:.1%}' if mfu else ''}  peak memory {memory / 2**30:.2f} GiB"
            )

    def _note(self, problem: str | None) -> None:
        """Rank 0 cannot write a row: all stop, so that a checkpoint is saved if it can be, and `finish` says why."""
        if problem and not self._problem:
            print(f"warning: {problem}; this run saves a checkpoint if it can, and ends", file=sys.stderr, flush=True)
        self._problem = problem
        if problem:
            self.stop_request.request()

    def mfu(self, rate: float) -> float | None:
        """Model FLOPs utilization at `rate` units per second; None where the FLOPs or the peak are not known."""
        if not (self.flops_per_unit and self.peak_flops):
            return None
        return flops.mfu(rate, self.flops_per_unit, self.peak_flops, self.ranks.world_size)

    def wants_evaluation(self, step: int) -> bool:
        """True after the last step, and every `train.eval_every` steps; the same on all ranks."""
        every = self.config.train.eval_every
        return step + 1 == self.config.train.steps or bool(every and (step + 1) % every == 0)

    def log_validation(self, step: int, val_loss: float, **more: float) -> None:
        """Record an evaluation after step `step`: `val_loss` and other results, already reduced over the ranks.

        Raises:
            SystemExit: (exit code 2, on all ranks) the validation loss is nan or inf.
        """
        self.settle()
        self.evaluation_is_due, self._evaluated = False, True
        if not math.isfinite(val_loss):  # not recorded: started again, the run evaluates again
            fail(
                f"the validation loss is {val_loss} after {step + 1} steps; look at the validation data, or lower "
                f"optimizer.lr; checkpoints are untouched"
            )
        if self._metrics is not None:
            self._note(self._metrics.add({"step": step + 1, "val_loss": val_loss, **more}, to_sinks=True))
        extra = "".join(f"  {name.replace('_', ' ')} {value:.4f}" for name, value in more.items())
        self.ranks.print(f"after {step + 1} steps  validation loss {val_loss:.4f}{extra}")
        self._clock = time.perf_counter()  # evaluating is not part of a step

    # ------------------------------------------------------------------------------------------- the end

    def finish(self) -> None:
        """Write the curve and print the summary. All ranks must call it.

        Raises:
            SystemExit: (exit code 2, on all ranks) a row, run.json or the curve cannot be written.
        """
        peaks = self.ranks.all_gather(metrics.peak_memory_bytes(self.ranks.device))
        self._bar.close()
        self.stop_request.close()
        if self._metrics is not None:
            self._metrics.close()
        self.ranks.first_or_fail(lambda: ending.write_end(self, self._metrics, peaks, self._problem, self._evaluated))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"
