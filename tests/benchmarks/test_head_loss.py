"""benchmarks/head_loss.py: three ways to one loss; a way that computes something else is found out."""

import json
import sys

import pytest
from launching import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import head_loss

from common.loss import chunked_cross_entropy

SMALL = ["head_loss.py", "--tokens", "24", "--width", "8", "--vocabulary", "40", "--chunk", "10", "--rounds", "2",
         "--device", "cpu"]  # fmt: skip


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_the_table(monkeypatch, tmp_path, capsys, precision):
    options = ["--precision", precision, "--output", str(tmp_path / "result.json")]
    monkeypatch.setattr(sys, "argv", [*SMALL, *options])
    head_loss.main()
    result = json.loads((tmp_path / "result.json").read_text())["contestants"]
    assert list(result) == ["whole", "recomputed", "fused"]
    assert all(found["seconds"]["min"] > 0 for found in result.values())
    assert "| fused | " in capsys.readouterr().out


def test_another_gradient_is_found_out(monkeypatch, capsys):
    """Twice the loss has twice the gradients."""
    monkeypatch.setattr(sys, "argv", SMALL)
    monkeypatch.setitem(head_loss.CONTESTANTS, "fused", lambda *inputs: 2 * chunked_cross_entropy(*inputs))
    with pytest.raises(SystemExit, match="2"):
        head_loss.main()
    assert "error: fused: a gradient differs from that of whole" in capsys.readouterr().err
