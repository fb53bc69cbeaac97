"""The run folder of all lessons, as a Lightning callback: metrics, checkpoints, resume, and stopping in time.

Lightning calls the hooks; the callback asks `common.run.Run` what to do, and tells Lightning.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from launch import Launch
from lightning.pytorch import Callback, LightningModule, Trainer

from common.config import Config
from common.optimizer import learning_rate, set_learning_rate
from common.ranks import Ranks, fail
from common.run import Run

# The names that run.json has for the strategies of all lessons, where Lightning's setting has another.
STRATEGY = {"single_device": "single", "tensor_parallel": "tensor"}


class RunFolder(Callback):
    """Keeps the run's record, and decides which step comes next: `step` is None when the training ends.

    The module is asked for `model`, `loss_sum` and `grad_norm` of the step, and for `validation`: the results by name.

    Args:
        config: the settings.
        launch: who started how many processes.
        strategy: the name of Lightning's strategy.
        explain: makes the line about FLOPs from the device.
        about: what `common.run.Run` is told of the training: units, FLOPs, fingerprint, mesh.
    """

    def __init__(
        self, config: Config, launch: Launch, strategy: str, explain: Callable[[torch.device], str], **about: Any
    ) -> None:
        self.config, self.launch, self.strategy, self.explain, self.about = config, launch, strategy, explain, about
        self.step: int | None = None
        self.lr = 0.0

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Let the ranks compare their starts: Lightning has just joined them, and wraps no model before."""
        self.ranks = Ranks(
            rank=trainer.global_rank, world_size=trainer.world_size, local_rank=trainer.local_rank,
            local_world_size=self.launch.devices, launcher=self.launch.launcher, device=trainer.strategy.root_device,
        )  # fmt: skip
        self.ranks.meet()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Open the folder and go on from its checkpoint, if it has one.

        Here, and no earlier: Lightning has just installed its signal handlers, which would end a stopped training
        without a checkpoint; those of Run take their place.
        """
        config = self.config
        if self.strategy == "deepspeed":  # of which nothing can go on: an existing run is refused, not overwritten
            config = replace(config, resume="never")
        strategy = STRATEGY.get(self.strategy, self.strategy)
        self.run = Run(config, self.ranks, strategy, framework="lightning", **self.about)
        self.ranks.print(self.explain(self.ranks.device))
        self.run.restore(module.model, trainer.optimizers[0], self.scaler(trainer))
        self.fast_forward(trainer)
        self.step = self.run.first_step - 1
        if self.run.evaluation_is_due:  # the attempt before this one did not get through it
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True
        else:
            self.step = self.run.next_step()

    def fast_forward(self, trainer: Trainer) -> None:
        """Let Lightning's counters and the learning rate stand where the checkpoint ended.

        Lightning's own checkpoints hold these counters; ours hold the step, of which they are functions.
        """
        done, micro_batches = self.run.first_step, self.run.first_step * trainer.accumulate_grad_batches
        epoch_loop = trainer.fit_loop.epoch_loop
        optimizer_steps = epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        optimizer_steps.ready = optimizer_steps.completed = done  # this is trainer.global_step
        batches = epoch_loop.batch_progress.total
        batches.ready = batches.started = batches.processed = batches.completed = micro_batches
        if not trainer.lr_scheduler_configs:
            return
        trainer.lr_scheduler_configs[0].scheduler.last_epoch = done
        rate = learning_rate(done, self.config.train.steps, self.config.optimizer)
        set_learning_rate(trainer.optimizers[0], rate)

    @staticmethod
    def scaler(trainer: Trainer) -> torch.amp.GradScaler | None:
        """The gradient scaler of Lightning's precision plugin, which only fp16 has."""
        return getattr(trainer.precision_plugin, "scaler", None)

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        """Note the rate of this step: when a batch ends, Lightning has set that of the next one already."""
        self.lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the last micro-batch of a step: its line, its checkpoint, and whether Lightning shall evaluate now."""
        # Lightning evaluates after so many batches, or at the end of an epoch; our settings say after so many steps,
        # and after the last one. 1: now; inf: not now.
        trainer.val_check_batch = float("inf")
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if self.strategy == "deepspeed":  # it clips by itself, and keeps gradients out of sight
            module.grad_norm = torch.as_tensor(trainer.strategy.model.get_global_grad_norm())
        self.run.log(self.step, module.loss_sum, module.grad_norm, self.lr)
        self.end_of_step(trainer, module)  # before it evaluates: whatever fails there does not lose the training
        if self.run.wants_evaluation(self.step):
            trainer.val_check_batch = 1
        else:
            self.step = self.run.next_step()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Record the evaluation that belongs to this step."""
        self.run.log_validation(self.step, **module.validation)
        self.step = self.run.next_step()  # none, at the same step on all ranks, after a stop

    def end_of_step(self, trainer: Trainer, module: LightningModule) -> None:
        """Save if it is time to."""
        if self.strategy != "deepspeed":
            self.run.end_step(self.step, module.model, trainer.optimizers[0], self.scaler(trainer))
        elif self.step + 1 == self.config.train.steps:  # ZeRO's partitions fit DeepSpeed's own format alone
            self.run.settle()  # a loss or a norm that is not finite ends here, unsaved
            trainer.save_checkpoint(self.run.folder / "checkpoints" / "deepspeed")

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Write curve and summary."""
        self.run.finish()
        if self.strategy == "deepspeed" and not self.run.is_complete:  # else Slurm would requeue it in vain
            fail("stopped, and strategy = deepspeed saves at the end alone: there is nothing to go on from")
