"""Extractive question answering for language models: questions in SQuAD's format, tokens, and the official scores.

The answer is a span of the context, or nothing. A sample is prompt and answer in one sequence; only the answer's tokens
are targets. Without a file the questions are about Python's own standard library: what is the default of a parameter?
"""

import ast
import collections
import hashlib
import importlib
import json
import os
import re
import string
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.data import standard_library_files
from common.ranks import fail

IGNORED = -100  # a target that does not count

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models and tokenizers are folders here: nothing is fetched


@dataclass
class QuestionsConfig:
    """Which questions, and how long prompt and answer may be."""

    train: str | None = None
    """A JSON file in SQuAD's format (1.1 or 2.0); by default questions about Python's standard library."""
    validation: str | None = None
    """Likewise; train and validation are given together."""
    sequence_length: int = 160
    """Tokens of prompt and answer; every sample is padded to it, longer contexts are shortened."""
    answer_length: int = 24
    """Most tokens of an answer that the model gives in evaluation."""
    validation_samples: int = 256
    """Ask so many validation questions, evenly spread; 0 asks all."""

    def __post_init__(self) -> None:
        if bool(self.train) != bool(self.validation):
            raise ValueError(
                f"data.train = {self.train} and data.validation = {self.validation} must be given together"
            )
        if not 1 <= self.answer_length < self.sequence_length or self.validation_samples < 0:
            raise ValueError(
                f"data.answer_length = {self.answer_length} must be at least 1 and below data.sequence_length = "
                f"{self.sequence_length}, and data.validation_samples = {self.validation_samples} 0 (all) or more"
            )


@dataclass(frozen=True)
class Question:
    """One question; `answers` is empty where the context holds none, `start` is the first answer's character."""

    id: str
    context: str
    question: str
    answers: tuple[str, ...]
    start: int = 0


def require(package: str) -> Any:
    """Import a package that only some lessons need. SystemExit: (exit code 2) it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        fail(f"this script needs the package {package} ({error}); install it: pip install -r requirements.txt")


# ------------------------------------------------------------------------------------------------------- questions


def questions_of(tree: Any, where: str) -> list[Question]:
    """All questions of a data set in SQuAD's JSON format (arXiv 1606.05250; 2.0: arXiv 1806.03822), in order.

    Raises:
        SystemExit: (exit code 2) `where` is not in this format, or an answer does not stand where it says.
    """
    found = []
    try:
        for article in tree["data"]:
            for paragraph in article["paragraphs"]:
                context = str(paragraph["context"])
                for entry in paragraph["qas"]:
                    name, asked = str(entry["id"]), str(entry["question"])
                    answers = [] if entry.get("is_impossible") else entry["answers"]
                    for answer in answers:
                        text, start = answer["text"], answer["answer_start"]
                        if start < 0 or not text or context[start : start + len(text)] != text:
                            there = context[max(0, start) : max(0, start) + len(text)]
                            fail(
                                f"{where}: question {name}: the answer {text!r} is not at answer_start = {start} of "
                                f"its context, {there!r} is; correct the file"
                            )
                    first = answers[0]["answer_start"] if answers else 0
                    found.append(Question(name, context, asked, tuple(a["text"] for a in answers), first))
    except (KeyError, TypeError, AttributeError) as error:
        fail(
            f"{where} is not in SQuAD's format ({type(error).__name__}: {error}); expected "
            '{"data": [{"paragraphs": [{"context": …, "qas": [{"id": …, "question": …, "answers": …}]}]}]}'
        )
    if not found:
        fail(f"{where} holds no questions; expected at least one")
    return found


def read_questions(path: str) -> list[Question]:
    """The questions of a JSON file; see `questions_of`."""
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        fail(f"{path}: {error.strerror}; expected a JSON file in SQuAD's format")
    except ValueError as error:
        fail(f"{path} is not JSON ({error}); expected a file in SQuAD's format")
    return questions_of(tree, path)


def standard_library_questions() -> tuple[dict[str, Any], dict[str, Any]]:
    """Training and validation set in SQuAD's 2.0 format: the defaults of parameters in Python's standard library.

    A context is a function's signature and the first line of its documentation; where a parameter has no default the
    right answer is none. Split by file name, as the embedded text of `common.data` is. Differs between versions of
    Python, because their libraries do.
    """
    sets: tuple[list[Any], list[Any]] = ([], [])
    seen: set[str] = set()
    for path in standard_library_files():
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        paragraphs = []
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                signature = f"{node.name}({ast.unparse(node.args)})"
                if len(signature) <= 72 and signature not in seen:
                    seen.add(signature)
                    paragraphs.append(_paragraph(node, signature, f"{path.name}:{node.lineno}"))
        sets[zlib.crc32(path.name.encode()) % 10 == 0].append(
            {"title": path.name, "paragraphs": [p for p in paragraphs if p]}
        )
    train, validation = ({"version": "v2.0", "data": part} for part in sets)
    return train, validation


def _paragraph(node: ast.FunctionDef | ast.AsyncFunctionDef, signature: str, name: str) -> dict[str, Any] | None:
    """The questions about one function: each parameter with a default, and one without."""
    arguments, doc = node.args, (ast.get_docstring(node) or "").split("\n")[0]
    context = f"{signature}\n{doc}" if doc and len(signature) + len(doc) < 96 else signature
    usual = [*arguments.posonlyargs, *arguments.args]
    given = dict(zip(reversed(usual), reversed(arguments.defaults), strict=False))
    given |= {a: value for a, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if value}
    qas: list[dict[str, Any]] = []
    for argument in [*usual, *arguments.kwonlyargs]:
        entry = {"id": f"{name}:{argument.arg}", "question": f"What is the default of {argument.arg}?"}
        if value := given.get(argument):
            text = ast.unparse(value)
            at = re.search(rf"[( ]{argument.arg}(: [^=]*? =|=) ?(?={re.escape(text)}[,)])", signature)
            if at and normalise(text):  # "()" and "''" are nothing but punctuation, which the scores leave out
                qas.append(entry | {"is_impossible": False, "answers": [{"text": text, "answer_start": at.end()}]})
        elif argument.arg not in ("self", "cls") and all(q["answers"] for q in qas):
            qas.append(entry | {"is_impossible": True, "answers": []})
    return {"context": context, "qas": qas} if any(q["answers"] for q in qas) else None


def question_sets(config: QuestionsConfig) -> tuple[list[Question], list[Question]]:
    """Training and validation questions. SystemExit: (exit code 2) a file is missing or not in SQuAD's format."""
    if config.train and config.validation:
        train, validation = read_questions(config.train), read_questions(config.validation)
    else:
        embedded = standard_library_questions()
        train, validation = (questions_of(tree, "Python's standard library") for tree in embedded)
    count = min(config.validation_samples or len(validation), len(validation))
    return train, [validation[i * len(validation) // count] for i in range(count)]


# ---------------------------------------------------------------------------------------------------------- tokens


def load_tokenizer(folder: str | None) -> Any:
    """The tokenizer of a local model's folder; without one, bytes: 0 … 255 by value of their symbol, and <end>.

    Raises:
        SystemExit: (exit code 2) no tokenizer there, or one that has no end token or cannot say where tokens stand.
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
        fail(f"{folder} holds no tokenizer (tokenizer.json); expected it beside the weights; fetch it, too")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a damaged file makes the library raise
        fail(f"{folder}: the tokenizer cannot be read ({error}); fetch its files again")
    if tokenizer.eos_token_id is None or not tokenizer.is_fast:
        fail(f"{folder}: expected a fast tokenizer (tokenizer.json) with an eos_token, which ends an answer")
    return tokenizer


def load_shape(folder: str | None, sequence_length: int) -> Any:
    """The `transformers` configuration of a local model's folder; without one, that of a tiny Llama over bytes.

    Raises:
        SystemExit: (exit code 2) no such folder, no config.json, no safetensors, or sequences too long for the model.
    """
    transformers = require("transformers")
    transformers.utils.logging.disable_progress_bar()
    if folder is None:
        return transformers.LlamaConfig(
            vocab_size=257, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, eos_token_id=256,
            bos_token_id=None, pad_token_id=None,
        )  # fmt: skip
    place, weights = Path(folder), ("model.safetensors", "model.safetensors.index.json")
    if not (place / "config.json").is_file():
        fail(f"model_path = {folder}: no config.json there; expected a model's folder in the Hugging Face format")
    if not any((place / name).is_file() for name in weights):
        fail(f"model_path = {folder}: neither {' nor '.join(weights)} there; other kinds of weights may run code")
    try:
        shape = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a damaged file makes the library raise
        fail(f"model_path = {folder}: config.json cannot be used ({error}); fetch it again")
    longest = getattr(shape.get_text_config(), "max_position_embeddings", None)
    if longest and sequence_length > longest:
        found = f"data.sequence_length = {sequence_length}, but {folder} takes {longest} tokens"
        fail(f"{found}; lower it to {longest} or less")
    return shape


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """A piece of a sequence as token ids, without beginning and end marks."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []


def prompt_of(question: Question, tokenizer: Any, room: int, keep_answer: bool) -> tuple[list[int] | None, bool]:
    """Context and question as at most `room` token ids; true if the context had to be shortened for it.

    Args:
        keep_answer: in training, what is left of the context is the part around the answer, or None where not even
            that fits. In evaluation nobody may look at the answer: the beginning is kept.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = tokens_of(tokenizer, f"\nQuestion: {question.question}\nAnswer:")
    encoded = tokenizer(question.context, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    context, space, first = encoded["input_ids"], room - len(start) - len(end), 0
    if len(context) <= space:
        return start + context + end, False
    if keep_answer:
        stop = question.start + len(question.answers[0]) if question.answers else 0
        places = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < stop and b > question.start]
        if len(places) > max(0, space):
            return None, True
        if places:
            first = max(0, min(places[0] - (space - len(places)) // 2, len(context) - space))
    if room < 1 or (keep_answer and space < 0):
        return None, True
    return (start + context[first : first + max(0, space)] + end)[-room:], True


class QuestionDataset:
    """Prompt and first answer as one sequence: items are (tokens, targets), each (sequence_length,) int64.

    Targets are the tokens one place further on where these belong to the answer or its end, IGNORED elsewhere. What is
    shorter is padded on the right: with causal attention no token sees the padding, positions are 0, 1, …, and no
    attention mask is needed. `shortened` and `refused` count the samples whose context, or all of it, was too long.
    """

    def __init__(self, questions: list[Question], tokenizer: Any, sequence_length: int, keep_answer: bool) -> None:
        self.sequence_length, self.end = sequence_length, int(tokenizer.eos_token_id)
        self.samples: list[tuple[np.ndarray, int]] = []
        self.shortened = self.refused = 0
        for question in questions:
            answer = tokens_of(tokenizer, f" {question.answers[0]}" if question.answers else "") + [self.end]
            room = sequence_length + 1 - len(answer)  # the last token is a target only
            prompt, cut = prompt_of(question, tokenizer, room, keep_answer)
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
        """One line: samples, tokens that count, padding, and what did not fit."""
        length, tokens = self.sequence_length, sum(len(sample) - 1 for sample, _ in self.samples)
        answers = sum(len(sample) - prompt for sample, prompt in self.samples)
        return (
            f"{len(self):,} samples, {answers:,} answer tokens, {1 - tokens / len(self) / length:.0%} of {length} "
            f"tokens a sample padding; {self.shortened:,} contexts shortened, {self.refused:,} samples refused"
        )

    def fingerprint(self) -> str:
        """A short hash of all samples."""
        digest = hashlib.sha256()
        for sample, prompt_length in self.samples:
            digest.update(f"{len(sample)}:{prompt_length}".encode() + sample.tobytes())
        return f"{len(self)}:{digest.hexdigest()[:16]}"


def left_padded(prompts: list[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts that end together, to be continued: tokens and attention mask, each (prompts, longest) int64."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return tokens, mask


# ---------------------------------------------------------------------------------------------------------- scores


def normalise(text: str) -> str:
    """Text as SQuAD compares it: lower case, no ASCII punctuation, no articles, single spaces."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", bare).split())


def exact_match(answer: str, gold: str) -> float:
    """1 if both are the same when normalised, else 0."""
    return float(normalise(answer) == normalise(gold))


def f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall over the normalised words; no words on one side: 1 if on neither."""
    ours, theirs = normalise(answer).split(), normalise(gold).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def score(answers: list[str], questions: list[Question]) -> tuple[float, float]:
    """Exact match and F1 in per cent, as SQuAD's official evaluation (2.0, without a no-answer threshold) has them.

    Each question counts for the best of its right answers (those that are not empty when normalised); where there is
    none, for saying nothing.
    """
    totals = [0.0, 0.0]
    for answer, question in zip(answers, questions, strict=True):
        golds = [gold for gold in question.answers if normalise(gold)] or [""]
        totals[0] += max(exact_match(answer, gold) for gold in golds)
        totals[1] += max(f1(answer, gold) for gold in golds)
    return 100 * totals[0] / len(questions), 100 * totals[1] / len(questions)


def most_frequent_answer(questions: list[Question]) -> str:
    """What a model says that has learned nothing but which answer is the most frequent; "" is no answer."""
    return collections.Counter(q.answers[0] if q.answers else "" for q in questions).most_common(1)[0][0]
