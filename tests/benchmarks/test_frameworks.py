"""The frameworks' overhead: a short measurement for real, and one line where it cannot be."""

import json
import sys
from pathlib import Path

import pytest
from launching import ROOT, run_command

sys.path.insert(0, str(ROOT / "benchmarks"))
import frameworks

FRAMEWORKS = [sys.executable, "benchmarks/frameworks.py"]


@pytest.mark.slow
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


@pytest.fixture
def stand_in(monkeypatch):
    """`stand_in(seconds, losses)`: in place of the frameworks, runs that take so many seconds a step, by round and
    entry; returns the commands that were to be run."""

    def install(seconds, losses=None):
        commands = []

        def execute(command, threads, log):
            given = dict(word[2:].split("=", 1) for word in command if word.startswith("--") and "=" in word)
            turn, _, entry = given["run_name"].split("-")
            commands.append(command)
            folder = Path(given["runs_dir"]) / given["run_name"]
            folder.mkdir()
            record = {"world_size": 2, "units_per_step": 8, "device": "x86_64 CPU", "git_commit": "abc",
                      "versions": {f"library{entry}": "1"}}  # fmt: skip
            (folder / "run.json").write_text(json.dumps(record))
            row = {"loss": (losses or {}).get(int(entry), 5.0), "peak_memory_bytes": 2**30}
            times = [99.0] * 3 + [seconds[int(turn)][int(entry)]] * 5
            rows = [row | {"step": step, "step_seconds": time} for step, time in enumerate(times)]
            (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
            return 0

        monkeypatch.setattr(frameworks, "execute", execute)
        return commands

    return install


SHORT = ["--sizes", "mini", "--steps", "8", "--warmup", "3", "--ranks", "2", "--entries", "Lightning, DDP"]


def test_overhead_is_taken_within_a_round(stand_in, monkeypatch, tmp_path, capsys):
    """The second of three rounds is ten times slower for both; the overhead stays 25, 30 and 20 %."""
    ddp, lightning = 0, list(frameworks.ENTRIES).index("Lightning, DDP")
    commands = stand_in([{ddp: 0.4 * k, lightning: 0.4 * k * much} for k, much in ((1, 1.25), (10, 1.3), (1, 1.2))])
    output = tmp_path / "result.json"
    monkeypatch.setattr(
        sys, "argv", ["frameworks.py", *SHORT, "--rounds", "3", "--output", str(output), "--", "--seed=3"]
    )
    frameworks.main()
    base, other = json.loads(output.read_text())["rows"]
    assert (base["entry"], base["overhead"]) == ("DDP", None)
    assert other["overhead"] == pytest.approx({"median": 0.25, "min": 0.2, "max": 0.3}, rel=1e-9)
    assert other["step_seconds"] == pytest.approx({"median": 0.5, "min": 0.48, "max": 5.2}, rel=1e-9)
    assert (
        "| mini | Lightning, DDP | 500.0 (480.0 to 5200.0) | +25.0 (+20.0 to +30.0) | 1.00 |" in capsys.readouterr().out
    )
    assert [command[5] for command in commands] == ["ddp/train.py", "lightning/train.py"] * 3  # in turn
    assert all({"--batch.global_size=8", "--train.steps=8", "--seed=3"} <= set(command) for command in commands)


def test_another_first_loss_is_refused(stand_in, monkeypatch, capsys):
    """A framework that trains on other batches, or scales the loss otherwise, is not compared."""
    entry = list(frameworks.ENTRIES).index("Lightning, DDP")
    stand_in([{0: 0.4, entry: 0.5}], {entry: 5.1})
    monkeypatch.setattr(sys, "argv", ["frameworks.py", *SHORT, "--rounds", "1"])
    with pytest.raises(SystemExit) as ended:
        frameworks.main()
    assert ended.value.code == 2
    assert "Lightning, DDP starts at a loss of 5.1, DDP at 5.0: other batches?" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "words"), [
    (["--steps", "5", "--warmup", "5"], "more steps than warm-up"),
    pytest.param(["--rounds", "1", "--sizes", "mini", "--entries", "DDP", "--", "--model.width", "65"],
                 "model.width is 65", marks=pytest.mark.slow),
])  # fmt: skip
def test_bad_input(options, words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["frameworks.py", *options])
    with pytest.raises(SystemExit) as ended:
        frameworks.main()
    assert ended.value.code == 2 and words in capsys.readouterr().err
