"""Every config file is one that the script it is for accepts, and sets what it says."""

import inspect
import re

import pytest
import yaml
from launching import ROOT

from common.config import parse, to_dict
from planner.script import loaded

DEFAULT = {"model_parallel": "model_parallel/tensor_parallel.py"}  # what a job file runs that is not told otherwise
FILES = sorted(ROOT.glob("*/configs/*.yaml"))


def flat(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)).replace("/", " "))
def test_config(path):
    """The script is the first of its folder that the comments on top name."""
    room = path.parent.parent.name
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    named = re.findall(rf"\b{room}/\w+\.py\b", " ".join(comments))
    script = ROOT / (named[0] if named else DEFAULT.get(room, f"{room}/train.py"))
    with loaded(script) as lesson:
        kind = next(iter(inspect.signature(lesson.main).parameters.values())).annotation
        resolved = dict(flat(to_dict(parse(kind, ["--config", str(path)]))))
    written = dict(flat(yaml.safe_load(path.read_text())))
    assert written
    assert {key: resolved[key] for key in written} == written
