"""The frameworks' overhead: a short measurement for real, and one line where it cannot be."""

import json
import sys

import pytest
from launching import ROOT, run_command

sys.path.insert(0, str(ROOT / "benchmarks"))
import frameworks

FRAMEWORKS = [sys.executable, "benchmarks/frameworks.py"]


@pytest.mark.timeout(280)
def test_a_short_measurement(tmp_path):
    """Every row has its own runs: more than DDP's time for one, and an overhead against DDP for all others."""
    entries = ["DeepSpeed, stage 0", "Lightning, DDP"]
    options = ["--sizes", "mini", "--rounds", "1", "--steps", "8", "--warmup", "3", "--entries", *entries]
    output = tmp_path / "result.json"
    printed = run_command([*FRAMEWORKS, *options, "--output", str(output)], 270, DEVICE="cpu").stdout
    result = json.loads(output.read_text())
    assert [row["entry"] for row in result["rows"]] == ["DDP", *entries]
    base, *others = result["rows"]
    assert base["overhead"] is None
    for row in others:
        ratio = row["step_seconds"]["median"] / base["step_seconds"]["median"]
        assert row["overhead"]["median"] == pytest.approx(ratio - 1)
    assert {"torch", "deepspeed", "lightning"} <= result["versions"].keys()
    assert frameworks.table(result) in printed
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("options", "words"), [
    (["--steps", "5", "--warmup", "5"], "more steps than warm-up"),
    (["--rounds", "1", "--sizes", "mini", "--entries", "DDP", "--", "--model.width", "65"], "model.width is 65"),
])  # fmt: skip
def test_bad_input(options, words):
    result = run_command([*FRAMEWORKS, *options], 60, check=False, DEVICE="cpu")
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
