"""What a config class holds: its settings by dotted name, what each of them takes, and the text of `--help`."""

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import json
import math
import os
import re
import shutil
import sys
import textwrap
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from common.strict_files import yaml_value

PathText = Annotated[str, "path"]  # the type of a setting that names a file or folder
FIRST_SECTIONS = ("train", "batch", "optimizer", "model", "data", "checkpoint")  # in --help; then the lesson's own
TEXT_TO_YAML = re.compile(r"(?=.*[.eE])[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")  # 1e-3, 1e3, -.5
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class Setting:
    """One setting: its type, whether null is a value too, and its default: as it is, and as a config file has it."""

    hint: Any
    takes_null: bool
    value: Any
    default: str
    is_path: bool

    @property
    def allowed(self) -> str:
        """The values that it takes, in words."""
        return type_words(self.hint) + (" or null" if self.takes_null else "")

    def convert(self, value: object) -> Any:
        """Return a value of a config file as the type of the setting.

        Raises:
            ValueError: it is not of that type, or none that a setting can have; in words, if they say more.
        """
        if (value is None and self.takes_null) or (value == self.value == ""):
            return value
        if value == self.value == math.inf:  # not finite, but this setting's default is it as well
            return value
        converted = _convert(value, self.hint)
        return expand_path(converted) if self.is_path else converted

    def convert_text(self, text: str) -> Any:
        """Return a value of the command line, which is YAML unless the setting takes text. Raises ValueError."""
        is_text = self.hint is str or any(isinstance(choice, str) for choice in typing.get_args(self.hint))
        return self.convert(text if is_text and not (text == "null" and self.takes_null) else yaml_value(text))


@functools.cache
def type_hints(config_class: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields; that of a path is still `PathText`."""
    return typing.get_type_hints(config_class, include_extras=True)


def find_settings(config_class: type, prefix: str = "") -> dict[str, Setting]:
    """Return every setting of a config class by its dotted name. Sections are not settings, but what they hold is."""
    settings: dict[str, Setting] = {}
    hints = type_hints(config_class)
    for item in dataclasses.fields(config_class):
        name, hint = prefix + item.name, hints[item.name]
        if dataclasses.is_dataclass(hint):
            settings |= find_settings(typing.cast(type, hint), f"{name}.")
            continue
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        alternatives = typing.get_args(hint) if is_union else (hint,)
        takes_null = default is None or type(None) in alternatives
        shown = item.metadata.get("default") or (default if isinstance(default, str) else json.dumps(default))
        is_path = alternatives[0] is PathText
        settings[name] = Setting(str if is_path else alternatives[0], takes_null, default, shown or '""', is_path)
    return settings


def expand_path(text: str) -> str:
    """Return a path with `~`, `$NAME` and `${NAME}` replaced, as a shell does. Raises ValueError if it cannot be."""

    def value(name: re.Match[str]) -> str:
        if not (found := os.environ.get(name[1] or name[2])):
            raise ValueError(f"the variable {name[1] or name[2]} is not set")
        return found

    home = os.path.expanduser(text)
    if home.startswith("~"):
        raise ValueError(f"there is no user {home.split('/')[0][1:]}; write ./{text} for a name that begins with ~")
    return re.sub(r"\$(?:(\w+)|\{(\w+)\})", value, home)


def to_path(text: str) -> Path:
    """Return a path of a command line that argparse reads, expanded."""
    try:
        return Path(expand_path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _convert(value: Any, hint: Any) -> Any:
    """Return `value` as a `hint`: text, a whole number, a number, a bool, a choice, or a list or tuple of these."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        value = json.dumps(value) if isinstance(value, bool) else value  # YAML's true, where "true" is a choice
        if value in inner and type(value) in map(type, inner):
            return value
    elif origin in (list, tuple):
        if isinstance(value, list) and (origin is list or len(value) == len(inner)):
            return origin(_convert(item, inner[0]) for item in value)
    elif hint is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number or (isinstance(value, str) and TEXT_TO_YAML.fullmatch(value)):
            if not math.isfinite(float(value)):
                raise ValueError("it is not finite")
            return float(value)
    elif type(value) is hint:
        if hint is int and abs(value) >= 2**63:
            raise ValueError("it has more than 64 bits")
        if hint is str and (not value.strip() or UNPRINTABLE.search(value)):
            raise ValueError("it holds a character that no name has" if value.strip() else "it is empty")
        return value
    raise ValueError


def type_words(hint: Any) -> str:
    """Return a type in the words of a reader who knows no Python."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (list, tuple):
        return f"list of {len(inner) if origin is tuple else ''} {type_words(inner[0])}s".replace("  ", " ")
    return {int: "whole number", float: "number", bool: "true or false", str: "text"}[hint]


def field_meanings(config_class: type) -> dict[str, str]:
    """Return what each field of a dataclass means: the string literal under it."""
    meanings: dict[str, str] = {}
    for owner in filter(dataclasses.is_dataclass, reversed(config_class.__mro__)):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(definition, ast.ClassDef)
        for statement, after in itertools.pairwise(definition.body):
            match statement, after:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(words))):
                    meanings[name] = " ".join(words.split())
    return meanings


def help_text(config_class: type) -> str:
    """Return the text of `--help`: usage, an example, and each setting with its type, default and meaning."""
    settings = find_settings(config_class)
    key = "train.steps" if "train.steps" in settings else next(iter(settings))
    value = "50" if key == "train.steps" else settings[key].default
    lines = [f"usage: {sys.argv[0]} [settings]", f"example: {sys.argv[0]} --config FILE --{key} {value}", ""]
    lines += _wrap("--config FILE  Read settings from a YAML or JSON file. The command line overrides the file.")
    lines += _wrap("--print_config  Print all settings as YAML, and end.")
    owners = {
        name: hint for name, hint in typing.get_type_hints(config_class).items() if dataclasses.is_dataclass(hint)
    }
    for section in sorted(owners, key=lambda name: [*FIRST_SECTIONS, name].index(name)) + [""]:
        owner = typing.cast(type, owners.get(section, config_class))
        meanings = field_meanings(owner)
        summary = " ".join((inspect.getdoc(owner) or "").split("\n\n")[0].split())
        if summary.startswith(f"{owner.__name__}("):  # the signature, which a dataclass has for want of a docstring
            summary = "settings:"
        lines += ["", f"{section}: {summary}" if section else "more settings:" if owners else summary]
        for name, setting in settings.items():
            if name.rpartition(".")[0] == section:
                meaning = meanings.get(name.rpartition(".")[2], "")
                lines += _wrap(f"--{name}  {setting.allowed}; default {setting.default}. {meaning}")
    return "\n".join(lines)


def _wrap(text: str) -> list[str]:
    width = min(120, shutil.get_terminal_size((120, 24)).columns)
    return textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False)
