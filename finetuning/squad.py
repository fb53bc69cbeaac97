"""Questions in SQuAD's format, from files, or about Python's own standard library: what is the default of a parameter?

The answer is a span of the context, or nothing.
"""

import ast
import re
import string
import zlib
from dataclasses import dataclass
from typing import Any

from common.config_fields import PathText
from common.data import standard_library_files
from common.launching import same_start
from common.ranks import fail
from common.strict_files import read_json


@dataclass
class QuestionsConfig:
    """Which questions, and how long prompt and answer may be."""

    train: PathText | None = None
    """A JSON file in SQuAD's format (1.1 or 2.0); by default questions about Python's standard library."""
    validation: PathText | None = None
    """A JSON file in the same format; give train and validation together, or neither."""
    sequence_length: int = 160
    """Tokens of prompt and answer; every sample is padded to it, longer contexts are shortened."""
    answer_length: int = 24
    """Tokens that the model may generate for an answer in evaluation."""
    validation_samples: int = 256
    """Validation questions to ask, evenly spread over the set; 0 asks all."""

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


def normalize(text: str) -> str:
    """Return a text as SQuAD compares it: lower case, no ASCII punctuation, no articles, single spaces."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", bare).split())


def questions_of(tree: Any, where: str) -> list[Question]:
    """Return all questions of a data set in SQuAD's JSON format (arXiv 1606.05250; 2.0: arXiv 1806.03822), in order.

    Raises:
        SystemExit: (exit code 2) `where` is not in this format, or an answer is not at its answer_start.
    """
    questions = []
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
                    questions.append(Question(name, context, asked, tuple(a["text"] for a in answers), first))
    except (KeyError, TypeError, AttributeError) as error:
        fail(
            f"{where} is not in SQuAD's format ({type(error).__name__}: {error}); expected "
            '{"data": [{"paragraphs": [{"context": …, "qas": [{"id": …, "question": …, "answers": …}]}]}]}'
        )
    if not questions:
        fail(f"{where} holds no questions; expected at least one")
    return questions


def read_questions(path: str) -> list[Question]:
    """Read the questions of a JSON file; see `questions_of`."""
    try:
        tree = read_json(path)
    except ValueError as error:
        fail(f"{error}; expected a JSON file in SQuAD's format")
    return questions_of(tree, path)


def standard_library_questions() -> tuple[dict[str, Any], dict[str, Any]]:
    """Make a training and a validation set in SQuAD's 2.0 format: defaults of parameters in Python's standard library.

    A context is a function's signature and the first line of its documentation. Where a parameter has no default, no
    answer is right. The sets are split by file name, as the embedded text of `common.data` is. They differ between
    versions of Python, because the libraries do.
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
    """Ask about one function: each parameter with a default, and one without."""
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
            if at and normalize(text):  # "()" and "''" are nothing but punctuation, which the scores leave out
                qas.append(entry | {"is_impossible": False, "answers": [{"text": text, "answer_start": at.end()}]})
        elif argument.arg not in ("self", "cls") and all(q["answers"] for q in qas):
            qas.append(entry | {"is_impossible": True, "answers": []})
    return {"context": context, "qas": qas} if any(q["answers"] for q in qas) else None


def question_sets(config: QuestionsConfig) -> tuple[list[Question], list[Question]]:
    """Return training and validation questions.

    Raises:
        SystemExit: (exit code 2) a file is missing or not in SQuAD's format.
    """
    if config.train and config.validation:
        train, validation = read_questions(config.train), read_questions(config.validation)
    else:
        embedded = standard_library_questions()
        train, validation = (questions_of(tree, "Python's standard library") for tree in embedded)
    same_start.note({"data for validation": same_start.digest(repr(validation).encode())})
    count = min(config.validation_samples or len(validation), len(validation))
    return train, [validation[i * len(validation) // count] for i in range(count)]
