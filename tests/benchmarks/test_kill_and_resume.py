"""A run that is killed five times, at random moments and in saves, is the run that was not."""

import json
import sys

import pytest
from launching import run_command

KILL = [sys.executable, "benchmarks/kill_and_resume.py"]


@pytest.mark.timeout(560)
@pytest.mark.parametrize("script", ["fsdp/train.py", pytest.param("ddp/train.py", marks=pytest.mark.slow)])
def test_five_kills(tmp_path, script):
    printed = run_command([*KILL, script, "--kills", "5", "--output", str(tmp_path / "result.json")], 540).stdout
    assert f"5 kills of 2 ranks of {script}" in printed
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["kills"]) == 5
    assert sum(kill["mid_save"] for kill in result["kills"]) >= 2  # those that waited for a save
    assert all(0 <= kill["lost"] <= result["every"] for kill in result["kills"])
    assert max(result["largest_difference"].values()) == 0  # two ranks, same machine, fp64: bitwise


@pytest.mark.parametrize(("options", "words"), [
    (["nowhere.py"], "there is no script nowhere.py"),
    (["ddp/train.py", "--kills", "0"], "kills 0"),
    (["ddp/train.py", "--kills", "1", "--", "--model.width", "33"], "model.width is 33"),
])  # fmt: skip
def test_bad_input(options, words):
    result = run_command([*KILL, *options], 60, check=False)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
