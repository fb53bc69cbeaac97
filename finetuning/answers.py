"""Loss and answers of a language model, under any strategy whose forward gathers parameters on all ranks."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common.data_sharding import evaluation_batches
from common.loss import count_valid
from common.ranks import Ranks
from finetuning.models import require
from finetuning.scores import most_frequent_answer, score, score_by_answer
from finetuning.squad import Question, QuestionsConfig
from finetuning.tokens import QuestionDataset, left_padded, prompt_of


def token_loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the cross-entropy over the targets that count: a scalar, fp32 or fp64.

    tokens, targets: (batch, sequence) int64.
    """
    logits = model(tokens, use_cache=False).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


@torch.no_grad()
def evaluate(model: nn.Module, dataset: QuestionDataset, batch_size: int, ranks: Ranks) -> float:
    """Return the mean loss per answer token over the validation set: the sum of all losses by the count of all tokens.

    Under FSDP and ZeRO stage 3 a forward gathers parameters. A rank with fewer samples joins in with batches that do
    not count.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # loss, tokens
    model.eval()
    batches = evaluation_batches(dataset, batch_size, ranks.device, ranks.rank, ranks.world_size, equal_batches=True)
    for tokens, targets in batches:
        sums += torch.stack([token_loss(model, tokens, targets).double(), count_valid(targets)])
    model.train()
    dist.all_reduce(sums)  # ranks may have had different numbers of samples: sums, never a mean of means
    loss, count = sums.tolist()
    return loss / count


@torch.no_grad()
def answer_all(
    model: Any,
    questions: list[Question],
    tokenizer: Any,
    config: QuestionsConfig,
    batch_size: int,
    ranks: Ranks,
    synced_gpus: bool | None = None,
) -> list[str]:
    """Return the most likely answer to each question, token by token (greedily); each question is on exactly one rank.

    Under FSDP and ZeRO stage 3 each new token is a forward that gathers parameters. A rank whose answers have ended, or
    that has no questions left, must go on calling the model until the last rank is done.

    Args:
        synced_gpus: of `generate`: after each token ask all ranks whether any goes on (an all-reduce), and if so, go
            on. None: `generate` finds out by itself whether it must (it knows DeepSpeed's stage 3).
    """
    greedy = require("transformers").GenerationConfig(
        max_new_tokens=config.answer_length, do_sample=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    on_this_rank = range(ranks.rank, len(questions), ranks.world_size)
    most = -(-len(questions) // ranks.world_size)  # questions on rank 0: no other rank has more
    room = config.sequence_length - config.answer_length
    answers: dict[int, str] = {}
    model.eval()
    for start in range(0, most, batch_size):  # the same number of batches on every rank
        numbers = on_this_rank[start : start + batch_size]
        asked = [questions[number] for number in numbers or [0]]  # none left: take part with any, and drop the answer
        prompts: list[Any] = [prompt_of(question, tokenizer, room, training=False)[0] for question in asked]
        tokens, mask = left_padded(prompts, tokenizer.eos_token_id, ranks.device)
        output = model.generate(tokens, attention_mask=mask, generation_config=greedy, synced_gpus=synced_gpus)
        texts = tokenizer.batch_decode(output[:, tokens.shape[1] :], skip_special_tokens=True)
        answers |= {number: text.strip() for number, text in zip(numbers, texts, strict=False)}
    model.train()
    by_number = {number: text for part in ranks.all_gather(answers) for number, text in part.items()}
    return [by_number[number] for number in range(len(questions))]


def print_answers(
    ranks: Ranks, answers: list[str], asked: list[Question], trained_on: list[Question], count: int = 5
) -> None:
    """Print `count` answers, the scores by right answer, and the scores of always giving the most frequent answer."""
    for number in range(0, len(asked), -(-len(asked) // count)):
        question, answer = asked[number], answers[number]
        golds = " or ".join(map(repr, dict.fromkeys(question.answers))) or "no answer"
        verdict = "right" if score([answer], [question])[0] else f"expected {golds}"
        ranks.print(f"  {question.context[:100].splitlines()[0]}\n    {question.question} {answer!r} ({verdict})")
    for gold, right, total in score_by_answer(answers, asked):
        ranks.print(f"  where {gold} is right: {right} of {total}")
    usual = most_frequent_answer(trained_on)
    exact, f1 = score([usual] * len(asked), asked)
    ranks.print(f"always saying {usual!r}, the most frequent answer of training: exact match {exact:.4f}  f1 {f1:.4f}")
