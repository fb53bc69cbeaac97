"""Fine-tuning with the Trainer of `transformers`: the callback that keeps the run folder, as all scripts have it."""

from typing import Any

import torch
from finetune_settings import commit
from settings import record_grad_norm

from common.ranks import Ranks
from common.run import Run
from finetuning.models import require

transformers = require("transformers")


class RunCallback(transformers.TrainerCallback):
    """Tells `common.run.Run` what Trainer did, and tells Trainer what to do next."""

    def __init__(self, trainer: Any, run: Run, ranks: Ranks, strategy: str) -> None:
        self.trainer, self.run, self.ranks, self.strategy = trainer, run, ranks, strategy

    def on_train_begin(self, args, state, control, **more) -> None:
        args.eval_on_start = self.run.evaluation_is_due  # the attempt before this one did not get through it
        self.run.next_step()
        if self.trainer.deepspeed:
            record_grad_norm(self.trainer.deepspeed)  # stage 0 forgets the gradient norm

    def on_log(self, args, state, control, logs, **more) -> None:
        """Record a step. Trainer reports a mean loss over ranks; `run` adds up the ranks and divides by the samples."""
        if "grad_norm" not in logs:
            return  # the summary at the end
        step, done, every = state.global_step - 1, state.global_step, self.run.config.checkpoint.every
        loss = torch.tensor(logs["loss"] * self.run.units_per_step / self.ranks.world_size, dtype=torch.float64)
        self.run.log(step, loss, torch.tensor(logs["grad_norm"]), logs["learning_rate"])
        last = self.run.next_step() is None  # all steps are done, or some rank was told to stop
        control.should_evaluate = self.run.wants_evaluation(step)
        control.should_save = last or bool(every and done % every == 0)
        control.should_training_stop |= last

    def on_save(self, args, state, control, **more) -> None:
        self.run.settle()  # a loss or a norm that is not finite ends here, and is not committed
        done = state.global_step
        folder = self.run.folder / "checkpoints" / f"checkpoint-{done}"
        commit(folder, done, self.strategy, self.run.config, self.ranks)
