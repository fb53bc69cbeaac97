"""YAML and JSON files of settings, read strictly: a key stands once, and a value is what it looks like.

`yaml` keeps the last of two equal keys, reads `010` as 8, `1:30` as 90 and `no` as false, and follows aliases that
multiply until memory is full. `json` keeps the last of two equal keys as well, and takes NaN.
"""

import json
import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

MOST_BYTES, MOST_NODES, MOST_LEVELS = 2**18, 10_000, 50  # of a YAML file; settings take a few KB and four levels


class _Loader(yaml.SafeLoader):
    """Plain values as YAML 1.1 and 1.2 both read them (https://yaml.org/spec/1.2.2/#103-core-schema); all else is text.

    So text that `yaml` wrote without quotes is text here, too.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.nodes = self.levels = 0
        self.sizes: dict[Any, int] = {}  # nodes that an alias of each would add; none while it is still open

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Count the nodes, those that aliases repeat among them, before any value is made."""
        event, before = self.peek_event(), self.nodes
        if getattr(event, "tag", None) not in (None, "!"):
            _refuse(f"has the tag {event.tag}; leave it out", event)
        self.nodes, self.levels = self.nodes + 1, self.levels + 1
        if self.levels > MOST_LEVELS:
            _refuse(f"is nested more than {MOST_LEVELS} levels deep; settings have a few", event)
        node = super().compose_node(parent, index)
        self.levels -= 1
        if isinstance(event, yaml.AliasEvent):
            if node not in self.sizes:
                _refuse(f"repeats *{event.anchor} inside itself; write the value out", event)
            self.nodes += self.sizes[node]
        self.sizes.setdefault(node, self.nodes - before)
        if self.nodes > MOST_NODES:
            _refuse(f"holds more than {MOST_NODES} values, aliases counted; settings are fewer", event)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Refuse a key that stands twice, or is no plain word."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                _refuse("has a list or a mapping as a key; expected a name", key)
            line = key.start_mark.line + 1
            if key.value in lines:
                _refuse(f"{key.value} is given twice, first in line {lines[key.value]}; keep one", key)
            lines[key.value] = line
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return node


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", r"(?:[-+]?[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+][0-9]+)?", list("-+0123456789.")),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.")),
    ("merge", "<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


class _Refused(yaml.MarkedYAMLError):
    """It is YAML, but not what settings are."""


def _refuse(words: str, where: Any) -> NoReturn:
    raise _Refused(problem=words, problem_mark=where.start_mark)


def yaml_value(text: str) -> Any:
    """Return what a YAML text holds, None if that is nothing. Raises ValueError: in one line, what is wrong where."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        kind, mark = "" if isinstance(error, _Refused) else "not valid YAML: ", error.problem_mark or error.context_mark
        words = ", ".join(filter(None, (error.context, error.problem)))
        raise ValueError(f"{kind}line {mark.line + 1}: {words}" if mark else kind + words) from None
    except yaml.YAMLError as error:  # a character that no YAML has
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None
    except ValueError:
        raise ValueError("a whole number has more digits than Python reads") from None


def read_yaml(path: str | Path) -> Any:
    """Return what a YAML file holds, None if that is nothing.

    Raises:
        ValueError: in one line with file and line: it cannot be read, is not YAML, gives a key twice, or is too large.
    """
    text = _text(path, MOST_BYTES)
    try:
        return yaml_value(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_json(path: str | Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        ValueError: in one line with file and line: it cannot be read, is not JSON, or gives a key twice.
    """
    text = _text(path)
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except _Twice:
        words = _where_twice(text)
    except json.JSONDecodeError as error:
        words = f"not valid JSON: line {error.lineno}: {error.msg}"
    except RecursionError:
        words = "nested too deeply"
    except ValueError as error:
        words = str(error).partition(";")[0]
    raise ValueError(f"{path}: {words}")


class _Twice(Exception):
    """A key is given twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(tree := dict(pairs)) < len(pairs):
        raise _Twice
    return tree


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number in JSON")


def _where_twice(text: str) -> str:
    """Name the first key that stands twice in an object of a JSON text, which is valid up to there, and both lines."""
    objects: list[dict[str, int]] = []
    line, end = 1, 0
    for token in re.finditer(r'("(?:[^"\\]|\\.)*")(\s*:)?|[{}]', text):
        line, end = line + text.count("\n", end, token.start()), token.start()
        if token[0] in "{}":
            objects.append({}) if token[0] == "{" else objects.pop()
        elif token[2]:
            key = json.loads(token[1])
            if key in objects[-1]:
                return f"line {line}: {key} is given twice, first in line {objects[-1][key]}; keep one"
            objects[-1][key] = line
    return "a key is given twice; keep one"


def _text(path: str | Path, most_bytes: int | None = None) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(None if most_bytes is None else most_bytes + 1)
        if most_bytes is not None and len(content) > most_bytes:
            raise ValueError(f"it has more than {most_bytes:,} bytes; expected a file of settings")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        words = f"byte {error.start} is {content[error.start]:#04x}; expected text in UTF-8"
    except OSError as error:
        words = str(error.strerror)
    except ValueError as error:  # too large, or a NUL in the path
        words = str(error)
    raise ValueError(f"{path}: {words}")
