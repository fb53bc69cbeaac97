"""Fine-tune a language model of `transformers` to answer questions: FSDP, all weights or LoRA.

    torchrun --nproc-per-node=2 fsdp/finetune.py                          # a laptop: a tiny model, a minute
    torchrun --nproc-per-node=2 fsdp/finetune.py --lora.rank 8            # adapters alone are trained
    torchrun --nproc-per-node=8 fsdp/finetune.py --config fsdp/configs/finetune_lora.yaml --train.steps 200 \\
        --model_path /path/to/model

What differs from `fsdp/train.py`: rank 0 reads the weights and gives each rank its shards; only the answers' tokens
count, so that each rank has another number of them; and the model is judged by answers that it generates.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from finetune_settings import (
    FinetuneConfig,
    Trained,
    base_number,
    blocks_of,
    build_model,
    describe_trained,
    export,
    score_by_answer,
)
from settings import describe, mesh_and_settings, set_prefetch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_

from common.config import parse
from common.data_sharding import BatchPlan, Loader, evaluation_batches
from common.loss import count_valid
from common.optimizer import build_optimizer, learning_rate, set_learning_rate
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
    loader = Loader(train_set, plan, ranks.device)

    # ---- model: on the meta device its parameters have shapes and no memory
    with torch.device("meta"):
        model = build_model(config, shape, read=False)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        fail(
            f"{config.model_path}: the tokenizer has {len(tokenizer)} tokens, more than the model; use the model's own"
        )
    if config.train.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})

    # ---- the lesson: blocks are units as ever, adapters in those of their layers; frozen parameters are sharded and
    # gathered too, but have no gradient to reduce. Tied embedding and head are both left to the model's own unit.
    mesh, settings = mesh_and_settings(config, ranks)
    blocks = blocks_of(model)
    for block in blocks:
        fully_shard(block, **settings)
    fully_shard(model, **settings)
    set_prefetch(blocks, config.fsdp.prefetch)
    model.to_empty(device="cpu" if config.fsdp.cpu_offload else ranks.device)
    base = initialise(model, config, shape, ranks)

    # ---- optimizer; the scaler keeps small fp16 gradients from vanishing, and does nothing otherwise
    optimizer = build_optimizer(model.parameters(), config.optimizer, ranks.device)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.train.precision == "fp16")

    run = Run(config, ranks, "fsdp", units_per_step=config.batch.global_size, unit="samples",
              mesh=dict(zip(("dp_replicate", "dp_shard"), mesh.shape, strict=True)),
              fingerprint=train_set.fingerprint())  # fmt: skip
    ranks.print(f"training:   {train_set.describe()}\nvalidation: {validation_set.describe()}")
    ranks.print(f"{describe(model, settings['mp_policy'])}\n{describe_trained(model)}")
    trained = Trained(model, base)  # frozen weights are not saved, but read again
    run.restore(trained, optimizer, scaler)
    trained.check_base()

    # ---- training
    for step in run.steps():  # goes on where the last checkpoint ended
        lr = learning_rate(step, config.train.steps, config.optimizer)
        set_learning_rate(optimizer, lr)
        loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
        micro_batches = list(loader.micro_batches(step))
        # Answers differ in length: the tokens of the *global* batch are known only when all ranks have added theirs.
        # The mean of the ranks' means would give tokens of a rank with short answers more weight than others'.
        valid = count_tokens(micro_batches)
        for (tokens, targets), is_last in micro_batches:
            # Until the last micro-batch gradients add up locally, whole: that saves messages and costs memory.
            model.set_requires_gradient_sync(is_last)
            micro_loss_sum = token_loss(model, tokens, targets)  # a sum over tokens, not a mean
            # FSDP averages over the ranks where the global batch wants the sum, hence the world size.
            scaler.scale(micro_loss_sum * ranks.world_size / valid).backward()
            loss_sum += micro_loss_sum.detach()
        scaler.unscale_(optimizer)
        grad_norm = clip_grad_norm_(model.parameters(), config.optimizer.clip).full_tensor()  # of all shards
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        run.log(step, loss_sum / valid * config.batch.global_size, grad_norm, lr)  # `run` divides by the samples

        if run.wants_evaluation(step):
            loss = evaluate(model, validation_set, plan.micro_size, ranks)
            answers = answer_all(model, validation_questions, tokenizer, config, plan.micro_size, ranks)
            exact, f1 = score(answers, validation_questions)
            run.log_validation(step, loss, exact_match=exact, f1=f1)
        run.end_step(step, trained, optimizer, scaler)
        if step + 1 == config.train.steps:
            show(run, answers, validation_questions, questions)
    if config.export and run.is_complete:  # also when it ended before it could be written
        write(model, tokenizer, config, shape, run, ranks)
    run.finish()
    ranks.leave()  # a barrier, then the end of the process group


def initialise(model: nn.Module, config: FinetuneConfig, shape, ranks: Ranks) -> int:
    """Rank 0 reads (or draws) the weights and sends them, one after the other; each rank keeps its shards.

    Rank 0's host memory holds the whole model for that long, 4 bytes a parameter; the others hold their shards and one
    whole parameter. Returns the number of the frozen weights, for the checkpoints.
    """
    whole, problem = None, None
    if ranks.is_main:
        try:
            whole = build_model(config, shape, read=True)
        except Exception as error:  # whatever a damaged file makes the library raise
            problem = f"model_path = {config.model_path}: the weights cannot be used ({error}); fetch the files again"
    ranks.fail_together(problem)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole.state_dict() if whole else {}, options=options)
    # No state dict holds the tables of rotary angles and the like, and `to_empty` has left them with any values.
    for name, buffer in model.named_buffers():
        value = whole.get_buffer(name).to(ranks.device) if whole else torch.empty_like(buffer, device=ranks.device)
        dist.broadcast(value, src=0)
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, value)
    return ranks.broadcast(base_number(whole, config) if whole else None)


def count_tokens(micro_batches: list) -> Tensor:
    """Targets that count in all micro-batches of all ranks: a scalar int64; the one small all-reduce before a step."""
    valid = torch.stack([count_valid(targets) for (_, targets), _ in micro_batches]).sum()
    dist.all_reduce(valid)
    return valid


def token_loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropy over the targets that count; tokens, targets: (batch, sequence) int64; fp32 or fp64."""
    logits = model(tokens, use_cache=False).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


@torch.no_grad()
def evaluate(model: nn.Module, dataset, batch_size: int, ranks: Ranks) -> float:
    """Mean loss per answer token over the validation set: the sum of all losses divided by the count of all tokens."""
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # loss, tokens
    place = ranks.rank, ranks.world_size
    model.eval()
    # A forward gathers parameters: ranks with fewer samples join in with batches that do not count.
    for tokens, targets in evaluation_batches(dataset, batch_size, ranks.device, *place, equal_batches=True):
        sums += torch.stack([token_loss(model, tokens, targets).double(), count_valid(targets)])
    model.train()
    dist.all_reduce(sums)  # ranks may have had different numbers of samples: sums, never a mean of means
    loss, count = sums.tolist()
    return loss / count


@torch.no_grad()
def answer_all(
    model: nn.Module, questions: list[Question], tokenizer, config: FinetuneConfig, batch_size: int, ranks: Ranks
) -> list[str]:
    """The most likely answer to each question, word for word (greedily); every question on exactly one rank.

    Each new token is a forward, which gathers parameters: a rank whose answers have ended, or that has no questions
    left, must go on calling the model until the last rank is done.
    """
    greedy = require("transformers").GenerationConfig(
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
        # `synced_gpus`: ask all ranks after each token whether any goes on (an all-reduce), and if so, go on.
        together = ranks.world_size > 1
        output = model.generate(tokens, attention_mask=mask, generation_config=greedy, synced_gpus=together)
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
    for gold, right, total in score_by_answer(answers, asked):
        run.ranks.print(f"  where {gold} is right: {right} of {total}")
    usual = most_frequent_answer(trained_on)
    exact, f1 = score([usual] * len(asked), asked)
    frequent = f"always saying {usual!r}, the most frequent answer of training"
    run.ranks.print(f"{frequent}: exact match {exact:.4f}  f1 {f1:.4f}")


def write(model: nn.Module, tokenizer, config: FinetuneConfig, shape, run: Run, ranks: Ranks) -> None:
    """Gather what was trained in rank 0's host memory, and write it in the format of transformers or peft."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=bool(config.lora.rank))
    weights = get_model_state_dict(model, options=options)  # collective: all ranks call it, rank 0 gets it all
    folder, problem = run.folder / "exported", None
    if ranks.is_main:
        try:
            export(weights, tokenizer, config, shape, folder)
        except OSError as error:
            problem = f"{folder}: {error.strerror}; the checkpoint is untouched"
    ranks.fail_together(problem)
    ranks.print(f"exported to {folder}")


if __name__ == "__main__":
    main(parse(FinetuneConfig))
