"""Fine-tune a language model with the Trainer of `transformers`: by itself, or with DeepSpeed behind it.

    torchrun --nproc-per-node=2 deepspeed/finetune.py                    # the baseline: a tiny model, two minutes
    torchrun --nproc-per-node=2 deepspeed/finetune.py --deepspeed_config deepspeed/configs/zero2.json
    deepspeed --num_gpus=8 deepspeed/finetune.py --deepspeed_config deepspeed/configs/zero3.json --model_path MODEL

What differs from `fsdp/finetune.py`: there is no loop. Trainer has one; it is told which micro-batches to take, and who
looks on. DeepSpeed is one argument, and the same script without it is what it has to equal.
"""

from collections.abc import Iterator

import torch
from finetune_callback import RunCallback
from finetune_settings import TrainerConfig, draw_model, last_checkpoint, load_model, tell_accelerate
from settings import engine_config
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record

from common.config import parse
from common.data_sharding import BatchPlan, Loader
from common.optimizer import build_optimizer, learning_rate
from common.ranks import Ranks, fail, join
from common.run import Run
from finetuning.answers import answer_all, evaluate, print_answers
from finetuning.models import load_hf_config, require
from finetuning.scores import score
from finetuning.squad import question_sets
from finetuning.tokens import QuestionDataset, load_tokenizer

transformers = require("transformers")


@record  # torchrun then reports the rank that failed first, and why
def main(config: TrainerConfig) -> None:
    ranks = join(config.device, config.timeout_s, config.network_profile)

    # ---- data: prompt and answer are one sequence, and only the answer's tokens are targets
    length = config.data.sequence_length
    hf_config = load_hf_config(config.model_path, length)
    tokenizer = load_tokenizer(config.model_path, hf_config)
    questions, validation_questions = question_sets(config.data)
    train_set = QuestionDataset(questions, tokenizer, length, training=True)
    validation_set = QuestionDataset(validation_questions, tokenizer, length, training=False)
    plan = BatchPlan(config.batch, len(train_set), config.seed, ranks.rank, ranks.world_size)

    # ---- the lesson: one argument switches DeepSpeed on. It comes before the model is read: from here on
    # `transformers` knows about stage 3, and makes models in parts. (A random one, for trying out, is drawn whole.)
    model = None if config.model_path else draw_model(config, hf_config)
    arguments, strategy = training_arguments(config, plan, ranks)
    model = model or load_model(config, hf_config)

    dp = "dp_replicate" if strategy in ("single", "ddp", "zero0") else "dp_shard"
    run = Run(config, ranks, strategy, units_per_step=config.batch.global_size, unit="samples",
              fingerprint=train_set.fingerprint(), mesh={dp: ranks.world_size},
              framework="deepspeed" if config.deepspeed_config else "transformers")  # fmt: skip
    ranks.print(f"training:   {train_set.describe()}\nvalidation: {validation_set.describe()}")
    checkpoint, first_step = last_checkpoint(run.folder / "checkpoints", strategy, config, ranks)

    arguments.output_dir = str(run.folder / "checkpoints")
    trainer = PlannedTrainer(model, arguments)
    if not trainer.model_accepts_loss_kwargs:
        fail(f"{config.model_path}: {type(model).__name__} has a loss of its own, which cannot be told how many tokens "
             f"the batch has; choose a causal language model that transformers computes the loss of")  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)  # the run's own metric line takes its place
    trainer.add_callback(RunCallback(trainer, run, ranks, strategy))
    trainer.run, trainer.loader, trainer.plan = run, Loader(train_set, plan, ranks.device), plan
    trainer.questions = validation_set, validation_questions, tokenizer
    if checkpoint:  # the state is Trainer's to load
        ranks.print(f"resumed from {checkpoint}: {first_step} steps done")
    run.begin(first_step)

    # ---- training: forward, backward, clip, step, all in one call
    if run.first_step < config.train.steps or run.evaluation_is_due:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        if trainer.state.global_step == config.train.steps:
            print_answers(ranks, trainer.answers, validation_questions, questions)
            if config.export:
                export(trainer, tokenizer, run, ranks)
    run.finish()
    ranks.leave()  # a barrier, then the end of the process group


def training_arguments(
    config: TrainerConfig, plan: BatchPlan, ranks: Ranks
) -> tuple["transformers.TrainingArguments", str]:
    """What Trainer is told, and the name of the strategy.

    Raises:
        SystemExit: (exit code 2) DeepSpeed's file is missing, no JSON, or contradicts the other settings; no fp16 on
            the CPU.
    """
    settings, strategy = None, "ddp" if ranks.world_size > 1 else "single"
    if config.train.precision == "fp16" and ranks.device.type == "cpu":
        fail("train.precision = fp16 on the CPU: Trainer has none there; use bf16 or fp32")
    if config.deepspeed_config:
        # What is "auto" in the file Trainer would fill in by itself, from the same numbers.
        settings = engine_config(config, plan, ranks)
        zero = settings["zero_optimization"]
        strategy = f"zero{zero['stage']}"
        # Saving in stage 3 gathers the parts on rank 0. "16bit" is the name; fp32 weights stay fp32.
        if not zero.setdefault("stage3_gather_16bit_weights_on_model_save", True):
            fail(
                f"{config.deepspeed_config}: zero_optimization.stage3_gather_16bit_weights_on_model_save is false, and "
                f"Trainer saves whole weights; leave it out"
            )
    tell_accelerate(ranks, settings is not None)
    arguments = transformers.TrainingArguments(
        output_dir=config.runs_dir,  # until the run folder is known
        deepspeed=settings,
        max_steps=config.train.steps,
        per_device_train_batch_size=plan.micro_size,
        gradient_accumulation_steps=plan.accumulation,
        # The loss is divided by the targets that count in the whole global batch: Trainer adds them up over all
        # micro-batches, and with this over all ranks. Without it each rank divides by its own, a mean of means.
        average_tokens_across_devices=True,
        max_grad_norm=config.optimizer.clip,
        learning_rate=config.optimizer.lr,
        bf16=config.train.precision == "bf16",
        fp16=config.train.precision == "fp16",
        activation_checkpointing=config.train.activation_checkpointing,
        ddp_find_unused_parameters=False,  # all are used; looking for some costs time in every backward
        ddp_timeout=int(config.timeout_s),
        seed=config.seed,
        use_cpu=ranks.device.type == "cpu",
        accelerator_config={"use_configured_state": settings is not None},  # see `tell_accelerate`
        logging_steps=1,  # one small gather and one wait for the device in each step: Trainer's own way to know
        logging_nan_inf_filter=False,  # else a loss that is no number is logged as the mean of those before it
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",  # `RunCallback` says when
        eval_strategy="no",
        ignore_data_skip=True,  # the batch is a function of the step: nothing to skip
        log_level="error",
    )
    return arguments, strategy


class PlannedTrainer(transformers.Trainer):
    """Trainer with the batches, the optimizer, the learning rate and the evaluation of the other lessons."""

    def get_train_dataloader(self) -> Iterator[dict[str, Tensor]]:
        """This rank's micro-batches, from the first step on: neither Trainer nor accelerate cuts them up again."""
        for step in range(self.run.first_step, self.args.max_steps):
            for (tokens, targets), _ in self.loader.micro_batches(step):
                # Targets stand one place further on already. Models of `transformers` shift labels themselves, unless
                # they find `shift_labels`; Trainer counts those, too, and would leave the first of `labels` out.
                yield {"input_ids": tokens, "labels": targets, "shift_labels": targets}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Plain torch, as everywhere; matrices alone have weight decay."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.model.parameters(), self.run.config.optimizer, self.args.device)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> torch.optim.lr_scheduler.LRScheduler:
        """The learning rate of `common.optimizer`, a function of the step alone."""
        if self.lr_scheduler is None:
            options = self.run.config.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: learning_rate(step, num_training_steps, options) / options.lr
            )
        return self.lr_scheduler

    def evaluate(self, *arguments, **options) -> dict[str, float]:
        """Loss, exact match and F1, each sample and question on exactly one rank: Trainer's own would pad them."""
        if self.control.should_save:  # Trainer would evaluate first, and what fails there would lose the training
            self._save_checkpoint(self.model_wrapped, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        validation_set, asked, tokenizer = self.questions
        size, ranks = self.plan.micro_size, self.run.ranks
        loss = evaluate(self.model, validation_set, size, ranks)
        self.answers = answer_all(self.model, asked, tokenizer, self.run.config.data, size, ranks)
        exact, f1 = score(self.answers, asked)
        self.run.log_validation(self.state.global_step - 1, loss, exact_match=exact, f1=f1)
        self.control.should_evaluate = False
        return {"eval_loss": loss}


def export(trainer: PlannedTrainer, tokenizer, run: Run, ranks: Ranks) -> None:
    """Gather the weights on rank 0, and write them as `from_pretrained` reads them: safetensors."""
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # collective in stage 3
    folder, problem = run.folder / "exported", None
    if ranks.is_main:
        try:
            trainer.model.config.use_cache = True  # Trainer switched it off, and generating without it is slow
            # Tied embedding and head are one parameter, but copied for saving they are two, of which one has to go.
            names = {name for name, _ in (*trainer.model.named_parameters(), *trainer.model.named_buffers())}
            weights = {name: tensor for name, tensor in weights.items() if name in names}
            trainer.model.save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)
        except OSError as error:
            problem = f"{folder}: {error.strerror}; the checkpoint is untouched"
    if problem := ranks.broadcast(problem):
        fail(problem)
    ranks.print(f"exported to {folder}")


if __name__ == "__main__":
    main(parse(TrainerConfig))
