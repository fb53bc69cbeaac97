"""What generated blocks contain: diffs, source, option tables (recorded runs are in docs_verified.py)."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import io
import json
import os
import re
import sys
import tokenize
import types
import typing
from collections.abc import Iterator
from difflib import SequenceMatcher, unified_diff
from pathlib import Path
from typing import Any

from docs_markdown import DocsError

FENCE_LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".yaml": "yaml", ".json": "json"}


def fence(language: str, text: str) -> str:
    """`text` in a fence that is longer than any row of backticks inside."""
    marks = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", text)), 3)
    return f"{marks}{language}\n{text.rstrip()}\n{marks}"


def read(root: Path, name: str) -> str:
    path = root / name
    if not path.is_file():
        raise DocsError(f"there is no file {name}")
    return path.read_text()


# ----------------------------------------------------------------------------------------------------
# diff A B


def code_lines(name: str, text: str) -> list[str]:
    """The lines of `text` that compute something: without comments, docstrings and blank lines.

    Any bare string statement in a Python file counts as a docstring, the one under a field too.
    """
    if not name.endswith(".py"):
        comment = re.compile(r"\s*#(?!SBATCH|!)")
        return [line.rstrip() for line in text.split("\n") if line.strip() and not comment.match(line)]
    lines = text.split("\n")
    for node in ast.walk(ast.parse(text, filename=name)):
        if isinstance(node, ast.stmt) and _bare_string(node) is not None:
            for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                lines[number - 1] = ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and lines[token.start[0] - 1]:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    return [line.rstrip() for line in lines if line.strip()]


def _bare_string(node: ast.stmt | None) -> str | None:
    """The text of a statement that is nothing but a string: a docstring, or the meaning of a field."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return node.value.value
    return None


def changed_lines(name_a: str, text_a: str, name_b: str, text_b: str) -> tuple[int, int, int]:
    """(changed, added, removed) lines of code from a to b; in `changed` a replaced line counts once."""
    a, b = code_lines(name_a, text_a), code_lines(name_b, text_b)
    changed = added = removed = 0
    for tag, a_start, a_end, b_start, b_end in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag != "equal":
            changed += max(a_end - a_start, b_end - b_start)
            added += b_end - b_start
            removed += a_end - a_start
    return changed, added, removed


def diff_block(root: Path, words: list[str]) -> str:
    """`diff A B [max=N] [context=N]`: a unified diff and the number of changed lines of code.

    Raises DocsError when more than `max` lines of code changed.
    """
    given = [word.split("=") for word in words if re.fullmatch(r"(max|context)=\d+", word)]
    options = {name: int(value) for name, value in given}
    names = [word for word in words if word.split("=")[0] not in options]
    if len(names) != 2:
        raise DocsError("expected `diff FILE_A FILE_B [max=N] [context=N]`")
    a, b = (read(root, name) for name in names)
    changed, added, removed = changed_lines(names[0], a, names[1], b)
    limit = options.get("max", changed)
    if changed > limit:
        raise DocsError(f"{names[1]} differs from {names[0]} by {changed} lines of code; at most {limit} are allowed")
    lines = unified_diff(a.splitlines(), b.splitlines(), *names, n=options.get("context", 2), lineterm="")
    summary = (
        f"{changed} line{'s' * (changed != 1)} of code changed ({added} added, {removed} removed; a replaced "
        "line counts once, comments, docstrings and blank lines do not count)."
    )
    return f"{fence('diff', chr(10).join(lines))}\n\n{summary}"


# ----------------------------------------------------------------------------------------------------
# source FILE [START..END | symbol]


def source_block(root: Path, words: list[str]) -> str:
    """`source FILE`, `source FILE Class.method`, or `source FILE "from text".."to text"` (both included)."""
    if len(words) not in (1, 2):
        raise DocsError('expected `source FILE [symbol | "START".."END"]`')
    name, text = words[0], read(root, words[0])
    lines = text.split("\n")
    if len(words) == 2:
        first, last = _marked(name, lines, words[1]) if ".." in words[1] else _symbol(name, text, words[1])
        lines = lines[first:last]
    indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return fence(FENCE_LANGUAGES.get(Path(name).suffix, "text"), "\n".join(line[indent:] for line in lines))


def _marked(name: str, lines: list[str], selector: str) -> tuple[int, int]:
    start_text, end_text = selector.split("..", 1)
    starts = [index for index, line in enumerate(lines) if start_text in line]
    if len(starts) != 1:
        raise DocsError(f"{start_text!r} stands in {len(starts)} lines of {name}; expected exactly one")
    end = next((index for index in range(starts[0], len(lines)) if end_text in lines[index]), None)
    if end is None:
        raise DocsError(f"{end_text!r} does not stand in {name} after {start_text!r}")
    return starts[0], end + 1


def _symbol(name: str, text: str, symbol: str) -> tuple[int, int]:
    body: list[ast.stmt] = ast.parse(text).body
    node: ast.stmt | None = None
    for part in symbol.split("."):
        node = next((n for n in body if part in _names(n)), None)
        if node is None:
            raise DocsError(f"{name} defines no {symbol}")
        body = getattr(node, "body", [])
    assert node is not None
    decorators = [decorator.lineno for decorator in getattr(node, "decorator_list", [])]
    return min([node.lineno, *decorators]) - 1, node.end_lineno or node.lineno


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [target.id for target in targets if isinstance(target, ast.Name)]


# ----------------------------------------------------------------------------------------------------
# options FILE | options module:Class


def options_block(root: Path, words: list[str]) -> str:
    """A table of every setting of a config dataclass: name, type, default, meaning.

    `options ddp/train.py` takes the class that the script gives to `parse(…)`; `options ddp/train.py:Config`
    and `options common.config:Config` name it. The meaning is the string literal under the field (or the
    comment behind it); raises DocsError for a setting that nothing describes.
    """
    if len(words) != 1:
        raise DocsError("expected `options FILE`, `options FILE:Class` or `options module:Class`")
    config_class = _config_class(root, words[0])
    rows, undescribed = [], []
    for name, hint, default, meaning in _settings(config_class, _instance(config_class), ""):
        if not meaning:
            undescribed.append(name)
        cells = (f"`{name}`", type_name(hint), f"`{default}`", meaning)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if undescribed:
        raise DocsError(
            f"{config_class.__name__} does not describe {', '.join(undescribed)}; "
            "write a string literal under the field"
        )
    return "\n".join(["| setting | type | default | meaning |", "|---|---|---|---|", *rows])


def _config_class(root: Path, target: str) -> type:
    place, _, name = target.partition(":")
    runs_dir = os.environ.pop("RUNS_DIR", None)  # a default may read it; the table is the same everywhere
    sys.path.insert(0, str(root))
    try:
        if place.endswith(".py"):
            parsed = re.search(r"\bparse\((\w+)", read(root, place))
            name = name or (parsed[1] if parsed else "Config")
            module = _load(root, place)
        else:
            module = importlib.import_module(place)
    finally:
        sys.path.remove(str(root))
        if runs_dir is not None:
            os.environ["RUNS_DIR"] = runs_dir
    config_class = getattr(module, name, None)
    if not (isinstance(config_class, type) and dataclasses.is_dataclass(config_class)):
        raise DocsError(f"{place} has no dataclass {name or '(none named)'}")
    return config_class


def _load(root: Path, place: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("documented_" + re.sub(r"\W", "_", place), root / place)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and inspect look there
    sys.path.insert(0, str((root / place).parent))  # as when the script runs
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def _instance(config_class: type) -> Any:
    runs_dir = os.environ.pop("RUNS_DIR", None)
    try:
        return config_class()
    except TypeError:  # a setting without a default
        return None
    finally:
        if runs_dir is not None:
            os.environ["RUNS_DIR"] = runs_dir


def _settings(config_class: type, instance: Any, prefix: str) -> Iterator[tuple[str, Any, str, str]]:
    """(dotted name, type, default, meaning) of every field, sections flattened."""
    hints, meanings = typing.get_type_hints(config_class), field_meanings(config_class)
    for field in dataclasses.fields(config_class):
        hint, value = hints[field.name], getattr(instance, field.name, dataclasses.MISSING)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            section = value if dataclasses.is_dataclass(value) else _instance(hint)
            yield from _settings(hint, section, f"{prefix}{field.name}.")
            continue
        if value is dataclasses.MISSING:
            default = "(required)"
        elif field.default is None and value is not None:
            default = f"null: {_yaml(value)}"  # filled in from other settings
        else:
            default = _yaml(value)
        yield prefix + field.name, hint, default, meanings.get(field.name, "")


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, default=str)


def type_name(hint: Any) -> str:
    """A type as a reader of YAML thinks of it: `int or null`, `fp32 or bf16`, `list of float`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(f"`{_yaml(choice)}`" for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    if hint is type(None):
        return "null"
    if origin in (list, tuple):
        inner = [argument for argument in arguments if argument is not Ellipsis]
        fixed = len(inner) > 1 or (origin is tuple and Ellipsis not in arguments)
        return f"({', '.join(map(type_name, inner))})" if fixed else f"list of {type_name(inner[0])}"
    if origin is dict:
        return f"map of {' to '.join(map(type_name, arguments))}"
    return getattr(hint, "__name__", str(hint))


def field_meanings(config_class: type) -> dict[str, str]:
    """What each field of a dataclass means: the string literal under it, else the comment behind it."""
    meanings: dict[str, str] = {}
    for owner in reversed(config_class.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        source = inspect.cleandoc("\n" + inspect.getsource(owner))
        lines = source.split("\n")
        definition = ast.parse(source).body[0]
        assert isinstance(definition, ast.ClassDef)
        for node, after in zip(definition.body, [*definition.body[1:], None], strict=True):
            if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
                continue
            rest_of_line = lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset or 0 :]
            comment = re.search(r"#:?\s+(.*)", rest_of_line)
            text = _bare_string(after) or (comment[1] if comment else "")
            if text:
                meanings[node.target.id] = " ".join(text.split())
    return meanings
