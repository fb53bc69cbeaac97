"""Every setting of every script × values that are written by mistake: each is taken as it stands, or refused.

The table is made from the scripts' own settings, so that a new one is in it by itself. A setting that several scripts
have in common is tried once.
"""

import contextlib
import io
import math
import re

from launching import ROOT

from common.config import resolve
from common.config_fields import find_settings, type_hints
from common.strict_files import yaml_value
from planner.fake_ranks import loaded

PARSED = re.compile(r"^    .*\bparse\((\w+)", re.MULTILINE)
FOLDERS = ("collectives", "ddp", "deepspeed", "from_scratch", "fsdp", "lightning", "model_parallel")
SCRIPTS = [
    path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) if PARSED.search(path.read_text())
]
# What a file says, and what it means where it is allowed; None: it never is.
VALUES = {
    "null": "null", '""': "", "' '": None, ".nan": None, ".inf": math.inf, "-.inf": None, "-1": None,
    "0": 0, "1.0e+30": 1e30, "1e30": "1e30", str(10**30): 10**30, "'5'": "5", "5": 5, "true": True, "010": "010",
    "1:30": "1:30", "[]": [], "[1, 2]": [1, 2], "[.nan, 0.5]": None, "{a: 1}": None, '"a\\0b"': None,
}  # fmt: skip


def owner(config_class, key):
    """The class that a setting is defined in, and its name there."""
    *sections, name = key.split(".")
    for section in sections:
        config_class = type_hints(config_class)[section]
    of = next(c for c in config_class.__mro__ if name in vars(c).get("__annotations__", {}))
    return of.__module__, of.__qualname__, name


def answer(config_class, key, value):
    """What the config has for a setting that a file gives; or the exit code and what is written on stderr."""
    error = io.StringIO()
    try:
        with contextlib.redirect_stderr(error):
            found = resolve(config_class, [("c.yaml", key, value)])
    except SystemExit as ended:
        return None, (ended.code, error.getvalue())
    for part in key.split("."):
        found = getattr(found, part)
    return found, None


def problem(setting, key, text, found, refusal):
    """What is wrong with an answer; None where it is right."""
    if refusal:
        code, words = refusal
        one_line = code == 2 and words.count("\n") == 1 and key in words and len(words) < 700
        return None if one_line else f"refused by {refusal}"
    meant = VALUES[text]
    if text == "null":
        return None if setting.takes_null else "null is taken"
    if meant is None or (text in ('""', ".inf") and setting.value != meant):
        return f"taken as {found!r}"
    if isinstance(found, float):
        return None if found == float(meant) and not isinstance(meant, bool) else f"taken as {found!r}"
    if text == "true" and found == "true":  # where "true" is a choice
        return None
    found = list(found) if isinstance(found, tuple) else found
    return None if found == meant and type(found) is type(meant) else f"taken as {found!r}"


def test_every_setting_of_every_script():
    values = {text: yaml_value(text) for text in VALUES}
    seen, problems = set(), []
    for script in SCRIPTS:
        with loaded(script) as lesson:
            config_class = getattr(lesson, PARSED.search(script.read_text())[1])
            for key, setting in find_settings(config_class).items():
                if (of := owner(config_class, key)) in seen:
                    continue
                seen.add(of)
                for text, value in values.items():
                    found, refusal = answer(config_class, key, value)
                    if wrong := problem(setting, key, text, found, refusal):
                        problems.append(f"{script.relative_to(ROOT)}: {key}: {text}: {wrong}")
    assert not problems, "\n".join(problems)
    assert len(seen) > 100


def test_settings_that_name_files_are_expanded():
    for script in SCRIPTS:
        with loaded(script) as lesson:
            settings = find_settings(getattr(lesson, PARSED.search(script.read_text())[1]))
        names = {key for key in settings if re.search(r"(path|dir|output|plot|json|folder|resume|_config)$", key)}
        assert {key for key, setting in settings.items() if setting.is_path} >= names, script
