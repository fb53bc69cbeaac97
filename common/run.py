"""One run: what a training loop tells, and what it is told. Folder, stop requests and metrics have files of their own.

    for step in run.steps():                  # the steps still to do; ends early when any rank was told to stop
        …
        run.log(step, loss_sum, grad_norm, lr)
        if run.wants_evaluation(step):
            run.log_validation(step, val_loss)
        run.end_step(step, model, optimizer)

A framework that owns the loop calls `next_step` instead of iterating over `steps`.
"""

import math
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from common import flops, metrics, run_folder, same_start
from common.config import RunConfig, to_dict
from common.data_sharding import derive_seed
from common.ranks import Ranks, fail
from common.replica_check import check_replicas
from common.stopping import StopRequest

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
        self.peak_flops = flops.peak_flops(ranks.device, config.train.precision) if flops_per_unit else None

        settings = to_dict(config)
        data = same_start.noted() | {"data for training": str(fingerprint)}
        ranks.compare_start(same_start.of_settings(settings) | data)
        self.folder, self._resume_from, self._attempt = ranks.first_or_fail(
            lambda: run_folder.open_folder(config, settings, fingerprint)
        )
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
            run_folder.write_record(self.folder, self.record)
        self.stop_request = StopRequest(self.folder, watch_files=ranks.is_main)
        self.first_step = 0
        self.steps_done = 0
        self._step: int | None = None  # the one that the loop is in
        self._stopping = False  # all ranks have agreed
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
        first_step = 0
        if self._resume_from is not None:
            from common import checkpoint  # here: it takes a second to import, and a new run does without

            manifest = checkpoint.load(self._resume_from, model, optimizer, self.ranks)
            if scaler and manifest["extra"].get("scaler"):
                scaler.load_state_dict(manifest["extra"]["scaler"])
            first_step = manifest["step"]
            self.ranks.print(f"resumed from {self._resume_from}: {first_step} steps done")
        self.begin(first_step)

    def begin(self, first_step: int) -> None:
        """Open the metrics, cut back to `first_step` steps. `restore` calls it; a framework that loads its own
        checkpoints calls it instead."""
        self.first_step = self.steps_done = first_step
        if self.ranks.is_main:
            self._metrics = metrics.MetricsFile(self.folder, self.config, to_dict(self.config), first_step)
            self._bar.update(first_step)
        self.ranks.print(f"world size {self.ranks.world_size} on {self.record['device']}, run folder {self.folder}")

    def wants_saving(self, step: int) -> bool:
        """True after the last step, every `checkpoint.every` steps, and when the run stops; the same on all ranks."""
        every = self.config.checkpoint.every
        return step + 1 == self.config.train.steps or self._stopping or bool(every and (step + 1) % every == 0)

    def end_step(
        self, step: int, model: "Model", optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        """Check the replicas and save a checkpoint when the settings, the end, or a request to stop say so."""
        done, check = step + 1, self.config.train.check_replicas_every
        last = done == self.config.train.steps or self._stopping
        if check and (done % check == 0 or last):
            held: Any = model.module if hasattr(model, "whole_state") else model  # see checkpoint.WholeState
            check_replicas(held, step, self.replicas)
        if self.wants_saving(step):
            from common import checkpoint

            self._read_pending()
            extra = {"scaler": scaler.state_dict()} if scaler and scaler.is_enabled() else {}
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
            self._read_pending()
            return None
        self._step = self.steps_done
        seed = derive_seed(self.config.seed, "step", self._step, self.ranks.rank)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every kind of device, each time
        if self.ranks.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        return self._step

    def steps(self) -> Iterator[int]:
        """Yield the steps still to do; ends early, at the same step on all ranks, when any rank was told to stop."""
        self._step, self.steps_done = None, self.first_step
        while (step := self.next_step()) is not None:
            yield step

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
        self._read_pending()
        read = self.start_sum(loss_sum, grad_norm, self.stop_request.is_set())
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self._pending = (step, lr, seconds, read)

    def _read_pending(self) -> None:
        if self._pending is None:
            return
        step, lr, seconds, read = self._pending
        self._pending = None
        loss_sum, grad_norm, stop = read()
        self._stopping = self._stopping or stop
        loss = loss_sum / self.units_per_step
        if self._metrics is not None:
            self._write_step(self._metrics, step, loss, grad_norm, lr, seconds)
        if not math.isfinite(loss):
            fail(
                f"the loss is {loss} at step {step}; lower optimizer.lr, or look at the data; checkpoints are untouched"
            )

    def _write_step(
        self, file: metrics.MetricsFile, step: int, loss: float, grad_norm: float, lr: float, seconds: float
    ) -> None:
        rate = self.units_per_step / seconds
        memory = metrics.peak_memory_bytes(self.ranks.device)
        mfu = self._mfu(rate)
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
        file.add(row, to_sinks=shown)
        if shown:
            self.ranks.print(
                f"step {step:>5}  loss {loss:.4f}  grad norm {grad_norm:.3f}  lr {lr:.2e}  {rate:,.0f} {self.unit}/s"
                f"{f'  mfu {mfu:.1%}' if mfu else ''}  peak memory {memory / 2**30:.2f} GiB"
            )

    def _mfu(self, rate: float) -> float | None:
        if not (self.flops_per_unit and self.peak_flops):
            return None
        return flops.mfu(rate, self.flops_per_unit, self.peak_flops, self.ranks.world_size)

    def wants_evaluation(self, step: int) -> bool:
        """True after the last step, and every `train.eval_every` steps; the same on all ranks."""
        every = self.config.train.eval_every
        return step + 1 == self.config.train.steps or bool(every and (step + 1) % every == 0)

    def log_validation(self, step: int, val_loss: float, **more: float) -> None:
        """Record an evaluation after step `step`: `val_loss` and other results, already reduced over the ranks."""
        self._read_pending()
        if self._metrics is not None:
            self._metrics.add({"step": step + 1, "val_loss": val_loss, **more}, to_sinks=True)
        extra = "".join(f"  {name.replace('_', ' ')} {value:.4f}" for name, value in more.items())
        self.ranks.print(f"after {step + 1} steps  validation loss {val_loss:.4f}{extra}")
        self._clock = time.perf_counter()  # evaluating is not part of a step

    # ------------------------------------------------------------------------------------------- the end

    def finish(self) -> None:
        """Write the curve and print the summary. All ranks must call it."""
        peaks = self.ranks.all_gather(metrics.peak_memory_bytes(self.ranks.device))
        self._bar.close()
        self.stop_request.close()
        if self._metrics is None:
            return
        self._metrics.close()
        rows, validation = self._metrics.rows, self._metrics.validation
        rate = metrics.median_rate(rows, self.unit, self.first_step)
        flops_per_rank = rate * self.flops_per_unit / self.ranks.world_size if rate and self.flops_per_unit else None
        self.record |= {
            "status": "finished" if self.is_complete else "stopped",
            "steps_done": self.steps_done,
            "ended": run_folder.now(),
            "peak_memory_bytes": peaks,
        }
        if rate is not None:
            self.record |= {
                f"{self.unit}_per_second": rate,
                "model_flops_per_second_per_rank": flops_per_rank,
                "mfu": self._mfu(rate),
            }
        run_folder.write_record(self.folder, self.record)
        if self.steps_done == self.first_step:
            steps = self.config.train.steps
            print(f"\nnothing to do: {self.steps_done} of {steps} steps were done already; run folder {self.folder}")
            return
        metrics.plot_loss(rows, validation, self.folder / "loss.png")
        print(self._summary(rows, validation, rate or 0.0, max(peaks)), flush=True)

    def _summary(self, rows: list[metrics.Row], validation: dict[int, float], rate: float, peak: int) -> str:
        steps, size, status = self.config.train.steps, self.ranks.world_size, self.record["status"]
        val_loss = f"{validation[max(validation)]:.4f}" if validation else "not evaluated"
        again = f"torchrun --nproc-per-node={size}" if size > 1 else "python"
        again += f" {sys.argv[0]} --config {self.folder}/config.yaml --run_name {self.folder.name}"
        return (
            f"\n{status} after {self.steps_done} of {steps} steps\n"
            f"  loss             {rows[0]['loss']:.4f} at first, {rows[-1]['loss']:.4f} at last\n"
            f"  validation loss  {val_loss}\n"
            f"  speed            {rate:,.0f} {self.unit}/s (median)\n"
            f"  peak memory      {peak / 2**30:.2f} GiB on one rank\n"
            f"  run folder       {self.folder} (metrics.jsonl, loss.png, checkpoints/)\n"
            f"  to go on         {again}{f' --train.steps {2 * steps}' if status == 'finished' else ''}"
        )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"
