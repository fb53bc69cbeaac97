"""Prompt and answer as one sequence of token ids; only the answer's tokens are targets."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.ranks import fail
from finetuning.models import brief, require
from finetuning.squad import Question

IGNORED = -100  # a target that does not count


def load_tokenizer(folder: str | None, hf_config: Any = None) -> Any:
    """Return the tokenizer of a local model's folder; without a folder, one of bytes: 0 … 255, and <end>.

    Args:
        hf_config: of the model that shall take the tokens.

    Raises:
        SystemExit: (exit code 2) there is no tokenizer, or it has no end token, cannot say where tokens begin in a
            text, or has more tokens than the model.
    """
    transformers = require("transformers")
    if folder is None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>"]
        of_bytes = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(symbols)}, []))
        of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        of_bytes.decoder = decoders.ByteLevel()
        return transformers.PreTrainedTokenizerFast(tokenizer_object=of_bytes, eos_token="<end>", pad_token="<end>")
    if not any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        fail(f"{folder} holds no tokenizer (tokenizer.json); expected it next to the weights; fetch it, too")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a damaged file makes the library raise
        fail(f"{folder}: the tokenizer cannot be read ({brief(error)}); fetch its files again")
    if tokenizer.eos_token_id is None or not tokenizer.is_fast:
        fail(f"{folder}: expected a fast tokenizer (tokenizer.json) with an eos_token, which ends an answer")
    if hf_config is not None and len(tokenizer) > hf_config.get_text_config().vocab_size:
        fail(f"{folder}: the tokenizer has {len(tokenizer)} tokens, more than the model; use the model's own")
    return tokenizer


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Return a piece of a sequence as token ids, without beginning and end marks."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []


def prompt_of(question: Question, tokenizer: Any, room: int, training: bool) -> tuple[list[int] | None, bool]:
    """Return context and question as at most `room` token ids, and whether the context was shortened for it.

    Args:
        training: keep the part of the context around the answer; where not even that fits, return None for the ids.
            In evaluation the answer is not to be looked at, so the beginning of the context is kept.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = tokens_of(tokenizer, f"\nQuestion: {question.question}\nAnswer:")
    encoded = tokenizer(question.context, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    context, space, first = encoded["input_ids"], room - len(start) - len(end), 0
    if len(context) <= space:
        return start + context + end, False
    if training:
        stop = question.start + len(question.answers[0]) if question.answers else 0
        inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < stop and b > question.start]
        if len(inside) > max(0, space):
            return None, True
        if inside:
            first = max(0, min(inside[0] - (space - len(inside)) // 2, len(context) - space))
    if room < 1 or (training and space < 0):
        return None, True
    return (start + context[first : first + max(0, space)] + end)[-room:], True


class QuestionDataset:
    """Prompt and first answer as one sequence: items are (tokens, targets), each (sequence_length,) int64.

    Targets are the next tokens where these belong to the answer or its end, IGNORED elsewhere. Shorter samples are
    padded on the right: with causal attention no token sees the padding, positions are 0, 1, …, and no attention mask
    is needed. `shortened` counts the samples whose context was cut, `refused` those that did not fit at all.
    """

    def __init__(self, questions: list[Question], tokenizer: Any, sequence_length: int, training: bool) -> None:
        self.sequence_length, self.end = sequence_length, int(tokenizer.eos_token_id)
        self.samples: list[tuple[np.ndarray, int]] = []
        self.shortened = self.refused = 0
        for question in questions:
            answer = tokens_of(tokenizer, f" {question.answers[0]}" if question.answers else "") + [self.end]
            room = sequence_length + 1 - len(answer)  # the last token is a target only
            prompt, cut = prompt_of(question, tokenizer, room, training)
            if prompt is None:
                self.refused += 1
                continue
            self.shortened += cut
            self.samples.append((np.array(prompt + answer, dtype=np.int32), len(prompt)))
        if not self.samples:
            fail(f"none of {len(questions)} questions fits data.sequence_length = {sequence_length} tokens; raise it")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        sample, prompt_length = self.samples[index]
        tokens = torch.full((self.sequence_length,), self.end)
        targets = torch.full((self.sequence_length,), IGNORED)
        tokens[: len(sample) - 1] = torch.from_numpy(sample[:-1])
        targets[prompt_length - 1 : len(sample) - 1] = torch.from_numpy(sample[prompt_length:])
        return tokens, targets

    def describe(self) -> str:
        """Return one line: samples, tokens that count, padding, and what did not fit."""
        length, tokens = self.sequence_length, sum(len(sample) - 1 for sample, _ in self.samples)
        answers = sum(len(sample) - prompt for sample, prompt in self.samples)
        return (
            f"{len(self):,} samples, {answers:,} answer tokens, {1 - tokens / len(self) / length:.0%} of {length} "
            f"tokens a sample padding; {self.shortened:,} contexts shortened, {self.refused:,} samples refused"
        )

    def fingerprint(self) -> str:
        """Return a short hash of all samples."""
        digest = hashlib.sha256()
        for sample, prompt_length in self.samples:
            digest.update(f"{len(sample)}:{prompt_length}".encode() + sample.tobytes())
        return f"{len(self)}:{digest.hexdigest()[:16]}"


def left_padded(prompts: list[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Align prompts at their ends, to be continued: tokens and attention mask, each (prompts, longest) int64."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return tokens, mask
