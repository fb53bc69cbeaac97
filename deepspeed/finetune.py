"""Fine-tune a language model with the Trainer of `transformers`: by itself, or with DeepSpeed behind it.

    torchrun --nproc-per-node=2 deepspeed/finetune.py                    # the baseline: a tiny model, two minutes
    torchrun --nproc-per-node=2 deepspeed/finetune.py --deepspeed_config deepspeed/configs/zero2.json
    deepspeed --num_gpus=8 deepspeed/finetune.py --deepspeed_config deepspeed/configs/zero3.json --model_path MODEL

What differs from `fsdp/finetune.py`: there is no loop. Trainer has one; it is told which micro-batches to take, and who
looks on. DeepSpeed is one argument, and the same script without it is what it has to equal.
"""

import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from finetune_settings import FinetuneConfig, commit, draw_model, last_checkpoint, read_model
from settings import engine_config, keep_norm, take_place
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record

from common.config import parse
from common.data_sharding import BatchPlan, Loader, evaluation_batches
from common.loss import count_valid
from common.optimizer import build_optimizer, learning_rate
from common.question_answering import (
    Question,
    QuestionDataset,
    left_padded,
    load_shape,
    load_tokenizer,
    most_frequent_answer,
    prompt_of,
    question_sets,
    require,
    score,
)
from common.ranks import Ranks, fail, join
from common.run import Run

transformers = require("transformers")


@record  # torchrun then reports the rank that failed first, and why
def main(config: FinetuneConfig) -> None:
    ranks = join(config.device, config.timeout_s, config.network_profile)

    # ---- data: prompt and answer are one sequence, and only the answer's tokens are targets
    shape, tokenizer = load_shape(config.model_path, config.data.sequence_length), load_tokenizer(config.model_path)
    questions, validation_questions = question_sets(config.data)
    length = config.data.sequence_length
    train_set = QuestionDataset(questions, tokenizer, length, keep_answer=True)
    validation_set = QuestionDataset(validation_questions, tokenizer, length, keep_answer=False)
    plan = BatchPlan(config.batch, len(train_set), config.seed, ranks.rank, ranks.world_size)

    # ---- the lesson: one argument switches DeepSpeed on. It comes before the model is read: from here on
    # `transformers` knows about stage 3, and makes models in parts. (A random one, for trying out, is drawn whole.)
    model = None if config.model_path else draw_model(config, shape)
    arguments, strategy = training_arguments(config, plan, ranks)
    model = model or read_model(config, shape)
    if len(tokenizer) > model.config.get_text_config().vocab_size:
        fail(
            f"{config.model_path}: the tokenizer has {len(tokenizer)} tokens, more than the model; use the model's own"
        )

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
    trainer.add_callback(Record(trainer, run, ranks, strategy))
    trainer.run, trainer.loader, trainer.plan = run, Loader(train_set, plan, ranks.device), plan
    trainer.questions = validation_set, validation_questions, tokenizer
    if checkpoint:  # the state is Trainer's to load
        ranks.print(f"resumed from {checkpoint}: {first_step} steps done")
    run.begin(first_step)

    # ---- training: forward, backward, clip, step, all in one call
    if run.first_step < config.train.steps:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        if trainer.state.global_step == config.train.steps:
            show(run, trainer.answers, validation_questions, questions)
            if config.export:
                export(trainer, tokenizer, run, ranks)
    run.finish()
    ranks.leave()  # a barrier, then the end of the process group


def training_arguments(
    config: FinetuneConfig, plan: BatchPlan, ranks: Ranks
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
        save_strategy="no",  # `Record` says when
        eval_strategy="no",
        ignore_data_skip=True,  # the batch is a function of the step: nothing to skip
        log_level="error",
    )
    return arguments, strategy


def tell_accelerate(ranks: Ranks, with_deepspeed: bool) -> None:
    """Tell accelerate, which Trainer runs on, this rank's device, and that the ranks work with DeepSpeed.

    It takes the local rank for the number of the GPU, also where a task sees its own GPU alone. And it looks for
    GPUs to know whether there are other processes: with DeepSpeed on the CPU it goes on, in silence, as if there were
    none. Then losses are multiplied, and tokens counted, for one rank.
    """
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(ranks.device)
    if ranks.world_size > 1 or with_deepspeed:
        take_place(ranks)
    if with_deepspeed:
        for name, value in {"RANK": ranks.rank, "WORLD_SIZE": ranks.world_size}.items():
            os.environ.setdefault(name, str(value))  # under plain python there are none
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        require("accelerate").PartialState(backend="nccl" if ranks.device.type == "cuda" else "gloo")


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
        validation_set, asked, tokenizer = self.questions
        loss = validation_loss(self.model, validation_set, self.plan.micro_size, self.run.ranks)
        self.answers = answer_all(self.model, asked, tokenizer, self.run.config, self.plan.micro_size, self.run.ranks)
        exact, f1 = score(self.answers, asked)
        self.run.log_validation(self.state.global_step - 1, loss, exact_match=exact, f1=f1)
        self.control.should_evaluate = False
        return {"eval_loss": loss}


class Record(transformers.TrainerCallback):
    """Drives the run folder, which all scripts share: Trainer tells what it did, this says what to do next."""

    def __init__(self, trainer: PlannedTrainer, run: Run, ranks: Ranks, strategy: str) -> None:
        self.trainer, self.run, self.ranks, self.strategy = trainer, run, ranks, strategy

    def on_train_begin(self, args, state, control, **more) -> None:
        self.run.next_step()
        if self.trainer.deepspeed:
            keep_norm(self.trainer.deepspeed)  # stage 0 forgets the gradient norm

    def on_log(self, args, state, control, logs, **more) -> None:
        """After each step. Trainer has taken the mean over the ranks; `run` adds them up and divides by the samples."""
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
        done = state.global_step
        folder = self.run.folder / "checkpoints" / f"checkpoint-{done}"
        commit(folder, done, self.strategy, self.run.config, self.ranks)


@torch.no_grad()
def validation_loss(model: nn.Module, dataset, batch_size: int, ranks: Ranks) -> float:
    """Mean loss per answer token over the validation set: the sum of all losses divided by the count of all tokens."""
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # loss, tokens
    place = ranks.rank, ranks.world_size
    model.eval()
    # In stage 3 a forward gathers parameters: ranks with fewer samples join in with batches that do not count.
    for tokens, targets in evaluation_batches(dataset, batch_size, ranks.device, *place, equal_batches=True):
        logits = model(tokens, use_cache=False).logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        sums += torch.stack([loss.double(), count_valid(targets)])
    model.train()
    dist.all_reduce(sums)  # ranks may have had different numbers of samples: sums, never a mean of means
    loss, count = sums.tolist()
    return loss / count


@torch.no_grad()
def answer_all(
    model: nn.Module, questions: list[Question], tokenizer, config: FinetuneConfig, batch_size: int, ranks: Ranks
) -> list[str]:
    """The most likely answer to each question, word for word (greedily); every question on exactly one rank.

    In stage 3 each new token is a forward that gathers parameters: a rank whose answers have ended, or that has no
    questions left, must go on calling the model until the last rank is done. `generate` sees to the first by itself.
    """
    greedy = transformers.GenerationConfig(
        max_new_tokens=config.data.answer_length, do_sample=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    mine, most = range(ranks.rank, len(questions), ranks.world_size), -(-len(questions) // ranks.world_size)
    room = config.data.sequence_length - config.data.answer_length
    answers: dict[int, str] = {}
    model.eval()
    for start in range(0, most, batch_size):  # as often on every rank as on rank 0, which has the most questions
        numbers = mine[start : start + batch_size]
        asked = [questions[number] for number in numbers or [0]]  # none left: take part with any, and drop the answer
        prompts = [prompt_of(question, tokenizer, room, keep_answer=False)[0] for question in asked]
        tokens, mask = left_padded(prompts, tokenizer.eos_token_id, ranks.device)
        output = model.generate(tokens, attention_mask=mask, generation_config=greedy)
        texts = tokenizer.batch_decode(output[:, tokens.shape[1] :], skip_special_tokens=True)
        answers |= {number: text.strip() for number, text in zip(numbers, texts, strict=False)}
    model.train()
    everything = {number: text for part in ranks.all_gather(answers) for number, text in part.items()}
    return [everything[number] for number in range(len(questions))]


def show(run: Run, answers: list[str], asked: list[Question], trained_on: list[Question], count: int = 5) -> None:
    """Print some answers, and what a model would score that has learned the most frequent answer and nothing else."""
    for number in range(0, len(asked), -(-len(asked) // count)):
        question, answer = asked[number], answers[number]
        golds = " or ".join(map(repr, dict.fromkeys(question.answers))) or "no answer"
        verdict = "right" if score([answer], [question])[0] else f"expected {golds}"
        run.ranks.print(f"  {question.context[:100].splitlines()[0]}\n    {question.question} {answer!r} ({verdict})")
    usual = most_frequent_answer(trained_on)
    exact, f1 = score([usual] * len(asked), asked)
    frequent = f"always saying {usual!r}, the most frequent answer of training"
    run.ranks.print(f"{frequent}: exact match {exact:.4f}  f1 {f1:.4f}")


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
    main(parse(FinetuneConfig))
