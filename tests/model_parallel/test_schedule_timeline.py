"""The commands of its docstring draw a picture, and what cannot be written is said before anything is measured."""

import re

import pytest
from launching import ROOT, SCRIPTS

SCRIPT = "model_parallel/schedule_timeline.py"
COMMANDS = re.findall(rf"torchrun --nproc-per-node=(\d) {SCRIPT} (.+)", (ROOT / SCRIPT).read_text())


@pytest.mark.parametrize(("ranks", "options"), [
    pytest.param(ranks, options, marks=pytest.mark.slow) for ranks, options in COMMANDS
])  # fmt: skip
def test_commands_of_the_docstring(launch, tmp_path, ranks, options):
    output = tmp_path / "timeline.png"
    options = re.sub("--output \\S+", "", options).split()
    printed = launch(SCRIPT, *options, "--repeats", "1", "--output", output, nproc=int(ranks), timeout=240).stdout
    for schedule, stages in ("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero_bubble", 2):
        assert re.search(rf"^{schedule} +{stages} +\d+ ms", printed, re.MULTILINE), printed
    assert output.read_bytes().startswith(b"\x89PNG")


def test_there_are_commands():
    assert sorted(ranks for ranks, _ in COMMANDS) == ["2", "4"]


@pytest.mark.parametrize("output", ["no/such/folder/timeline.png", "timeline.txt", "timeline"])
def test_bad_output(group, output):
    options = ["--batch.micro_size", "3", "--output", output]
    for code, message in group(2)(SCRIPTS.ends, SCRIPT, options):
        assert code == 2
        assert len([line for line in message.splitlines() if "error: output = " in line]) == 1, message
        assert "Traceback" not in message
