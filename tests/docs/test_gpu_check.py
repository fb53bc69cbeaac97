"""`make gpu-check` without a GPU: that its commands would be understood, and what it makes of their outputs."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import gpu_check
import readme_parse
from docs_markdown import ROOT
from gpu_check import Row
from gpu_check_list import CHECKS, Check
from processes import Finished
from readme_commands import Block


@pytest.mark.parametrize("check", [check for check in CHECKS if "pytest" not in check.command], ids=lambda c: c.name)
def test_the_commands_have_files_and_options_that_exist(check: Check) -> None:
    """Nobody runs them where there is no GPU: a renamed setting would only be found on one."""
    block = Block(Path(check.name), 0, "parse", f"python {check.command}")
    assert list(readme_parse.parse_problems(ROOT, block)) == []


def test_without_a_gpu_it_is_one_line_and_exit_code_2(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1 and "CUDA finds no GPU here" in printed.err


@pytest.mark.parametrize(("check", "gpus", "memory_gb", "nccl", "on_gpus", "reason"), [
    (Check("a", "x.py", 2), 1, 80, (2, 30, 7), True, ""),  # they share it
    (Check("a", "x.py", 2), 1, 80, (2, 29, 3), True, "2 ranks on 1 GPU(s) need NCCL 2.30, found 2.29.3"),
    (Check("a", "x.py", 2), 2, 80, (2, 29, 3), True, ""),
    (Check("a", "x.py", memory_gb=70), 1, 48, (2, 30), True, "for GPUs of 70 to inf GB, found 48"),
    (Check("a", "x.py", memory_gb=14, below_gb=38), 1, 80, (2, 30), True, "for GPUs of 14 to 38 GB, found 80"),
    (Check("a", "x.py", only_on_gpus=True), 0, 0, (0, 0), False, "needs a GPU"),
    (Check("a", "x.py", 2, memory_gb=70), 0, 0, (0, 0), False, ""),
])  # fmt: skip
def test_what_a_machine_cannot_run_is_left_out_with_the_reason(check, gpus, memory_gb, nccl, on_gpus, reason) -> None:
    assert gpu_check.why_left_out(check, gpus, memory_gb, nccl, on_gpus) == reason


@pytest.mark.parametrize(("output", "line"), [
    ("step 1\n[rank 1] error: the loss is nan\nTraceback\nChildFailedError: x\n", "[rank 1] error: the loss is nan"),
    ("a\nTraceback …\ntorch.OutOfMemoryError: CUDA out of memory\nW12 bye\n", "torch.OutOfMemoryError: CUDA"),
    ("a\nSegmentation fault\n\n", "Segmentation fault"),
    ("", "no output"),
])  # fmt: skip
def test_the_cause_of_a_failure(output, line) -> None:
    assert gpu_check.cause(output).startswith(line)


def test_figures_come_from_the_run_folder(tmp_path) -> None:
    (tmp_path / "ddp").mkdir()
    record = {"tokens_per_second": 270e3, "mfu": 0.241, "peak_memory_bytes": [2**30, 3 * 2**30]}
    (tmp_path / "ddp" / "run.json").write_text(json.dumps(record))
    check = Check("speed_x", "x.py", timeout_s=9)
    assert gpu_check.judge(check, Finished(0, "", 5), tmp_path) == Row("speed_x", "ok", 5, "", 270e3, 0.241, 3.0)
    assert gpu_check.judge(check, Finished(0, "", 5), tmp_path / "none") == Row("speed_x", "ok", 5)
    assert gpu_check.judge(check, Finished(1, "error: no\n", 5), tmp_path) == Row("speed_x", "failed", 5, "error: no")
    assert gpu_check.judge(check, Finished(None, "", 9), tmp_path).status == "too slow"


def test_the_verdict() -> None:
    good, bad, left = Row("a", "ok", 5, "", 1e5, 0.25, 2), Row("b", "failed", 1, "why"), Row("c", "left out", note="no")
    text, code = gpu_check.verdict([good, bad, left], 6)
    assert code == 1 and text.endswith("GPU check: 1 of 2 passed, 1 left out; 6 s; failed: b")
    assert "100,000  25.0%     2.00" in text and "why" in text
    assert gpu_check.verdict([good, left], 6)[1] == 0
    assert gpu_check.verdict([left], 6)[1] == 1  # where nothing ran, nothing is shown
