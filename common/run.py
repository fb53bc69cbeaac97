"""One run, one folder: the metric line, the progress bar, when to stop, when to save, and the summary.

runs/<name>/config.yaml      the resolved settings
            run.json         framework, versions, hosts, mesh, git commit, data fingerprint
            metrics.jsonl    one object a step; evaluations have val_loss
            checkpoints/     step_N/, see common/checkpoint.py
            loss.png         the curve
"""

import json
import math
import os
import platform
import resource
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import yaml
from tqdm import tqdm

from common import checkpoint, flops
from common.config import RunConfig, to_dict
from common.data_sharding import derive_seed
from common.ranks import Ranks, fail
from common.replica_check import check_replicas

MUST_MATCH = ("seed", "data", "model", "batch.global_size")  # a resumed run must go on with the same data and model
MAY_DIFFER = ("path", "workers", "validation_samples")  # of the section data: the fingerprint tells its content


def _lookup(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part, {})
    return {name: value for name, value in tree.items() if name not in MAY_DIFFER} if key == "data" else tree


def _write_whole(path: Path, text: str) -> None:
    """Write a file so that, whenever the process dies, the old or the new one is there."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _git_commit() -> str | None:
    here = Path(__file__).resolve().parent
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # there is no git
        return None


class Run:
    """Keeps the record of one training, the same from every script. All ranks make one; rank 0 prints and writes.

    Args:
        config: the resolved settings.
        ranks: from `join` or `single_process`.
        strategy: how the training is distributed, as run.json calls it ("single", "ddp", …).
        units_per_step: tokens (or images) in the global batch; the logged loss is the sum over ranks divided by this.
        unit: what is counted: "tokens" or "images".
        flops_per_unit: forward and backward of one token or image, for MFU; see `common.flops`.
        mesh: names and sizes of the mesh's axes; by default all ranks are data-parallel.
        replicas: the ranks that must hold the same plain tensors, to be checked now and then; by default all. (A
            DTensor knows its own.)
        fingerprint: of the data, from the data set.
        framework: the package that does the distributed part, by its name; its version goes into run.json.

    Raises:
        SystemExit: (exit code 2, on all ranks) the folder cannot be written, or holds a run with other settings.
    """

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        strategy: str,
        units_per_step: int,
        unit: str = "tokens",
        flops_per_unit: float | None = None,
        mesh: dict[str, int] | None = None,
        fingerprint: str | None = None,
        replicas: dist.ProcessGroup | None = None,
        framework: str = "torch",
    ) -> None:
        self.config, self.ranks, self.units_per_step, self.unit = config, ranks, units_per_step, unit
        self.flops_per_unit, self.replicas = flops_per_unit, replicas
        self.peak_flops = flops.peak_flops(ranks.device, config.train.precision) if flops_per_unit else None
        self.first_step, self._done, self._stopping = 0, 0, False
        self._stop_requested, self._stop_seen_at = threading.Event(), 0.0
        self._pending: tuple[Any, ...] | None = None
        self.rows: list[dict[str, Any]] = []
        self.validation: dict[int, float] = {}

        self.folder: Path
        self._resume_from: Path | None
        self._attempt: str
        self.folder, self._resume_from, self._attempt = ranks.first_or_fail(lambda: self._open_folder(fingerprint))
        by_job = os.environ.get("STOP_FILE")  # how slurm/job_env.sh passes on that Slurm takes the nodes away
        self._stop_files = [self.folder / "stop", *([Path(by_job)] if by_job else [])]
        hosts = sorted(set(ranks.all_gather(socket.gethostname())))
        if ranks.is_main:
            self._write_run_record(framework, strategy, mesh or {"data": ranks.world_size}, fingerprint, hosts)
        stop_signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self._handlers = {number: signal.signal(number, self._on_signal) for number in stop_signals}
        self._bar = tqdm(
            total=config.train.steps, unit="step", disable=None if ranks.is_main else True, dynamic_ncols=True
        )
        self._clock = time.perf_counter()

    # ---------------------------------------------------------------------------------------- the folder

    def _open_folder(self, fingerprint: str | None) -> tuple[Path, Path | None, str]:
        """On rank 0: choose and make the folder, and find the checkpoint to start from.

        Returns folder, checkpoint and the attempt's name. Raises ValueError, in one line.
        """
        script, resume, name = Path(sys.argv[0]), self.config.resume, self.config.run_name
        kind = f"{script.resolve().parent.name}-{script.stem}" if script.suffix == ".py" else "notebook"
        job = os.environ.get("SLURM_JOB_ID")  # a requeued job keeps its id, and finds its run again
        restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
        if restarts != "0" and not job and not name:
            found = f"torchrun --max-restarts={restarts} without --run_name"
            raise ValueError(f"{found}: a restart would begin a new run, not go on; give the run a name")
        unique = f"job{job}" if job else f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        folder = Path(self.config.runs_dir) / (name or f"{kind}-{unique}")
        checkpoints = folder / "checkpoints"
        try:
            exists = (folder / "config.yaml").is_file()
            if exists and resume == "never":
                raise ValueError(f"run {folder} exists already, and resume = never; choose another run_name")
            again = (os.environ.get(f"{who}_RESTART_COUNT", "0") != "0" for who in ("SLURM", "TORCHELASTIC"))
            if exists and not name and not any(again):
                advice = f"name the second with --run_name, or go on with --run_name {folder.name}"
                raise ValueError(f"this Slurm job has a run {folder} already; {advice}")
            elsewhere = resume not in ("auto", "never")
            if elsewhere and Path(resume).resolve().is_relative_to(folder.resolve()):
                advice = "leave resume out to go on with it, or choose another run_name to begin a new run from there"
                raise ValueError(f"resume = {resume} lies in the folder of this very run; {advice}")
            start = checkpoint.latest(checkpoints)
            if start:
                self._compare_with(folder, fingerprint)
            elif elsewhere:
                start = checkpoint.latest(Path(resume, "checkpoints")) or Path(resume)
                try:
                    checkpoint.read_manifest(start)
                except ValueError as error:
                    raise ValueError(f"resume = {resume}: {error}") from None
            checkpoints.mkdir(parents=True, exist_ok=True)
            (folder / "stop").unlink(missing_ok=True)
            attempt = checkpoint.claim(checkpoints)
            # Until the claim another attempt could still commit, and remove.
            start = checkpoint.latest(checkpoints) or start
            _write_whole(folder / "config.yaml", yaml.safe_dump(to_dict(self.config), sort_keys=False))
        except yaml.YAMLError as error:
            raise ValueError(f"{folder}/config.yaml is not valid YAML: {error}") from None
        except OSError as error:
            advice = "choose a folder you can write to with --runs_dir"
            raise ValueError(f"run folder {folder}: {error.strerror}; {advice}") from None
        return folder, start, attempt

    def _compare_with(self, folder: Path, fingerprint: str | None) -> None:
        """ValueError: the run in `folder` has seen other data, or is of another model."""
        before, now = yaml.safe_load((folder / "config.yaml").read_text()), to_dict(self.config)
        changed = [key for key in MUST_MATCH if _lookup(before, key) != _lookup(now, key)]
        if changed:
            advice = f"go on with the same ones (--config {folder}/config.yaml), or choose another run_name"
            raise ValueError(f"run {folder} was made with other settings of {', '.join(changed)}; {advice}")
        record = folder / "run.json"  # fsdp/checkpoint.py writes none
        seen = json.loads(record.read_text())["data_fingerprint"] if record.is_file() else fingerprint
        if fingerprint != seen:
            found = f"run {folder} was made with other data (fingerprint {seen}, now {fingerprint})"
            raise ValueError(f"{found}; go on with the same files, or choose another run_name")

    def _write_run_record(
        self, framework: str, strategy: str, mesh: dict[str, int], fingerprint: str | None, hosts: list[str]
    ) -> None:
        ranks = self.ranks
        accelerator = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else None
        self.record = {
            "framework": framework,
            "strategy": strategy,
            "launcher": ranks.launcher,
            "world_size": ranks.world_size,
            "mesh": mesh,
            "hosts": hosts,
            "device": accelerator or f"{platform.machine()} CPU, {os.cpu_count()} cores",
            "unit": self.unit,
            "units_per_step": self.units_per_step,
            "flops_per_unit": self.flops_per_unit,
            "peak_flops": self.peak_flops,
            "data_fingerprint": fingerprint,
            "git_commit": _git_commit(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": metadata.version("numpy"),
            }
            | ({} if framework == "torch" else {framework: metadata.version(framework)}),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        _write_whole(self.folder / "run.json", json.dumps(self.record, indent=1) + "\n")

    # ---------------------------------------------------------------------------------- resume and save

    def restore(
        self, model: checkpoint.Model, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        """Load the checkpoint that this run goes on from, if there is one. Call it once, before `steps`."""
        metrics = self.folder / "metrics.jsonl"
        if self._resume_from is not None:
            manifest = checkpoint.load(self._resume_from, model, optimizer, self.ranks)
            if scaler and manifest["extra"].get("scaler"):
                scaler.load_state_dict(manifest["extra"]["scaler"])
            self.first_step = self._done = manifest["step"]
        if not self.ranks.is_main:
            return
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        # An evaluation has the number of steps done before it: that after the last step, first_step.
        kept = [row for row in rows if row["step"] < self.first_step + ("val_loss" in row)]
        self.rows = [row for row in kept if "loss" in row]
        self.validation = {row["step"]: row["val_loss"] for row in kept if "val_loss" in row}
        _write_whole(metrics, "".join(json.dumps(row) + "\n" for row in kept))
        self._metrics = open(metrics, "a", buffering=1)  # noqa: SIM115  (closed in finish; a line at a time is on disk)
        self._board = self._open_tensorboard()
        if self._resume_from is not None:
            self.say(f"resumed from {self._resume_from}: {self.first_step} steps done")
        self.say(f"world size {self.ranks.world_size} on {self.record['device']}, run folder {self.folder}")

    def _open_tensorboard(self) -> Any:
        if self.config.wandb:
            try:
                import wandb
            except ImportError:
                fail("--wandb true needs the package wandb: pip install wandb")
            wandb.init(
                name=self.folder.name, dir=self.folder, config=to_dict(self.config), resume="allow", id=self.folder.name
            )
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.first_step)

    def save_if_due(
        self,
        step: int,
        model: checkpoint.Model,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Check the replicas and save a checkpoint when the settings, the end, or a request to stop say so."""
        done, every = step + 1, self.config.checkpoint.every
        last = done == self.config.train.steps or self._stopping
        check = self.config.train.check_replicas_every
        if check and (done % check == 0 or last):
            held = model.module if isinstance(model, checkpoint.WholeState) else model
            check_replicas(held, step, self.replicas)
        if last or (every and done % every == 0):
            self._read_pending()
            extra = {"scaler": scaler.state_dict()} if scaler and scaler.is_enabled() else {}
            folder, keep = self.folder / "checkpoints", self.config.checkpoint.keep
            checkpoint.save(folder, done, model, optimizer, self.ranks, extra, keep, self._attempt)
            self._clock = time.perf_counter()  # saving is not part of a step

    # ------------------------------------------------------------------------------------------ the loop

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop_requested.set()

    def _stop_wanted(self) -> bool:
        now = time.monotonic()
        if self.ranks.is_main and now - self._stop_seen_at > 1 and any(file.exists() for file in self._stop_files):
            self._stop_requested.set()
        self._stop_seen_at = now if now - self._stop_seen_at > 1 else self._stop_seen_at
        return self._stop_requested.is_set()

    def steps(self) -> Iterator[int]:
        """Yield the steps still to do; ends early, at the same step on all ranks, when any rank was told to stop.

        SIGINT (Ctrl-C), SIGTERM and SIGUSR1 (Slurm's warning before the time limit) ask for it, and so does a file
        named `stop` in the run folder, or the one that STOP_FILE names. Dropout and the like see a seed that depends
        on (seed, step, rank): nothing to save.
        """
        if self.ranks.is_main:
            self._bar.update(self.first_step)
        self._clock = time.perf_counter()  # loading is not part of a step
        for step in range(self.first_step, self.config.train.steps):
            seed = derive_seed(self.config.seed, "step", step, self.ranks.rank)
            torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every kind of device, each time
            if self.ranks.device.type == "cuda":
                torch.cuda.manual_seed(seed)
            yield step
            self._done = step + 1
            self._bar.update()
            if self._stopping:
                break
        self._read_pending()

    @property
    def is_complete(self) -> bool:
        """All steps are done, in this attempt or before it."""
        return self._done >= self.config.train.steps

    def log(self, step: int, loss_sum: torch.Tensor, grad_norm: torch.Tensor, lr: float) -> None:
        """Record one step. Starts a small asynchronous sum over all ranks, and reads that of the step before.

        The loss and the wish to stop travel together, one step late, so that the loop never waits for the device and
        all ranks learn of a stop at the same step.

        Args:
            loss_sum: this rank's sum of losses over the step, before the update; scalar, on the device.
            grad_norm: global gradient norm before clipping; scalar.
        """
        self._read_pending()
        stop = torch.full_like(loss_sum, float(self._stop_wanted()), dtype=torch.float64)
        values = torch.stack([loss_sum.detach().double(), stop])
        work = dist.all_reduce(values, async_op=True) if dist.is_initialized() else None
        event = None
        if values.is_cuda:
            if work is not None:
                work.wait()  # only orders the streams; the host goes on
            values = torch.cat([values, grad_norm.detach().to(values).reshape(1)])  # off-loaded, it is on the CPU
            values = torch.empty(3, dtype=torch.float64, pin_memory=True).copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self._pending = (step, work, values, grad_norm, lr, seconds, event)

    def _read_pending(self) -> None:
        if self._pending is None:
            return
        step, work, values, grad_norm, lr, seconds, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
            loss_sum, stop, grad_norm = values.tolist()
        else:
            if work is not None:
                work.wait()
            loss_sum, stop = values.tolist()
        self._stopping = self._stopping or stop > 0
        loss = loss_sum / self.units_per_step
        if self.ranks.is_main:
            self._write_step(step, loss, float(grad_norm), lr, seconds)
        if not math.isfinite(loss):
            fail(
                f"the loss is {loss} at step {step}; lower optimizer.lr, or look at the data; checkpoints are untouched"
            )

    def _write_step(self, step: int, loss: float, grad_norm: float, lr: float, seconds: float) -> None:
        rate = self.units_per_step / seconds
        memory = peak_memory_bytes(self.ranks.device)
        utilisation = None
        if self.flops_per_unit and self.peak_flops:
            utilisation = flops.mfu(rate, self.flops_per_unit, self.peak_flops, self.ranks.world_size)
        row = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,  # fp16's scaler skips such a step
            "lr": lr,
            self.unit: (step + 1) * self.units_per_step,
            "step_seconds": seconds,
            f"{self.unit}_per_second": rate,
            "mfu": utilisation,
            "peak_memory_bytes": memory,
        }
        self.rows.append(row)
        self._metrics.write(json.dumps(row) + "\n")
        if step % self.config.train.log_every == 0 or step + 1 == self.config.train.steps:
            self._send(row)
            mfu = f"  mfu {utilisation:.1%}" if utilisation else ""
            self.say(
                f"step {step:>5}  loss {loss:.4f}  grad norm {grad_norm:.3f}  lr {lr:.2e}  {rate:,.0f} {self.unit}/s"
                f"{mfu}  peak memory {memory / 2**30:.2f} GiB"
            )

    def wants_evaluation(self, step: int) -> bool:
        """True after the last step, and every `train.eval_every` steps; the same on all ranks."""
        every = self.config.train.eval_every
        return step + 1 == self.config.train.steps or bool(every and (step + 1) % every == 0)

    def log_validation(self, step: int, val_loss: float, **more: float) -> None:
        """Record an evaluation after step `step`: `val_loss` and other results, already reduced over the ranks."""
        self._read_pending()
        self.validation[step + 1] = val_loss
        if self.ranks.is_main:
            row = {"step": step + 1, "val_loss": val_loss, **more}
            self._metrics.write(json.dumps(row) + "\n")
            self._send(row)
            extra = "".join(f"  {name.replace('_', ' ')} {value:.4f}" for name, value in more.items())
            self.say(f"after {step + 1} steps  validation loss {val_loss:.4f}{extra}")
        self._clock = time.perf_counter()

    def _send(self, row: dict[str, Any]) -> None:
        """Give a row to TensorBoard and Weights & Biases: each costs as much as the rest of the record together."""
        if self._board is not None:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, row["step"])
        if self.config.wandb:
            import wandb

            wandb.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def say(self, line: str) -> None:
        """Print a line on rank 0, above the progress bar."""
        if self.ranks.is_main:
            tqdm.write(line)

    # ------------------------------------------------------------------------------------------- the end

    def finish(self) -> None:
        """Write the curve and print the summary. All ranks must call it."""
        peaks = self.ranks.all_gather(peak_memory_bytes(self.ranks.device))
        self._bar.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if not self.ranks.is_main:
            return
        self._metrics.close()
        if self._board is not None:
            self._board.close()
        steps = self.config.train.steps
        status = "finished" if self.is_complete else "stopped"
        ended = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.record |= {"status": status, "steps_done": self._done, "ended": ended, "peak_memory_bytes": peaks}
        self.record |= self._utilisation()
        _write_whole(self.folder / "run.json", json.dumps(self.record, indent=1) + "\n")
        if self._done == self.first_step:
            print(f"\nnothing to do: {self._done} of {steps} steps were done already; run folder {self.folder}")
            return
        plot_loss(self.rows, self.validation, self.folder / "loss.png")
        rate = self.record[f"{self.unit}_per_second"]
        val = f"{self.validation[max(self.validation)]:.4f}" if self.validation else "not evaluated"
        again = f"torchrun --nproc-per-node={self.ranks.world_size}" if self.ranks.world_size > 1 else "python"
        more = f"{again} {sys.argv[0]} --config {self.folder}/config.yaml --run_name {self.folder.name}"
        print(
            f"\n{status} after {self._done} of {steps} steps\n"
            f"  loss             {self.rows[0]['loss']:.4f} at first, {self.rows[-1]['loss']:.4f} at last\n"
            f"  validation loss  {val}\n"
            f"  speed            {rate:,.0f} {self.unit}/s (median)\n"
            f"  peak memory      {max(peaks) / 2**30:.2f} GiB on one rank\n"
            f"  run folder       {self.folder} (metrics.jsonl, loss.png, checkpoints/)\n"
            f"  to go on         {more}{f' --train.steps {2 * steps}' if status == 'finished' else ''}",
            flush=True,
        )

    def _utilisation(self) -> dict[str, Any]:
        """Medians over the steps: speed, and the model's FLOP/s on each rank, of which MFU is the part of the peak."""
        # Of this attempt, which may have other ranks than those before; its first step allocates and compiles.
        mine = [row for row in self.rows if row["step"] >= self.first_step] or self.rows
        steady = mine[1:] or mine
        if not steady:
            return {}
        rate = statistics.median(row[f"{self.unit}_per_second"] for row in steady)
        each = rate * self.flops_per_unit / self.ranks.world_size if self.flops_per_unit else None
        mfu = None
        if self.flops_per_unit:
            mfu = flops.mfu(rate, self.flops_per_unit, self.peak_flops, self.ranks.world_size)
        return {f"{self.unit}_per_second": rate, "model_flops_per_second_per_rank": each, "mfu": mfu}


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this rank held: allocated on the GPU, or resident in RAM for a CPU rank."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # the kernel's own record, in bytes or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def plot_loss(rows: list[dict[str, Any]], validation: dict[int, float], path: Path) -> None:
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
