"""A run that is killed five times, at random moments and in saves, is the run that was not."""

import contextlib
import json
import shutil
import sys
import warnings

import pytest
import torch.distributed.checkpoint as dcp
from equality import read_checkpoint
from launching import ROOT, SCRIPTS, run_command

from common.runs import manifest

sys.path.insert(0, str(ROOT / "benchmarks"))
import kill_and_resume

KILL = [sys.executable, "benchmarks/kill_and_resume.py"]


@pytest.mark.slow
@pytest.mark.timeout(560)
@pytest.mark.parametrize("script", ["fsdp/train.py", "ddp/train.py"])
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
    pytest.param(["ddp/train.py", "--kills", "1", "--", "--model.width", "33"], "model.width is 33",
                 marks=pytest.mark.slow),
])  # fmt: skip
def test_bad_input(options, words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["kill_and_resume.py", *options])
    with pytest.raises(SystemExit) as ended:
        kill_and_resume.main()
    assert ended.value.code == 2 and words in capsys.readouterr().err


# ------------------------------------------------------------------- its judgement, on runs that were made beforehand


@pytest.fixture(scope="module")
def runs(group, tmp_path_factory):
    """Two equal runs of six steps in fp64, with a checkpoint every other step."""
    folder = tmp_path_factory.mktemp("runs")
    settings = [*kill_and_resume.SETTINGS, "--train.steps", "6", "--checkpoint.every", "2"]
    for name in ("undisturbed", "killed"):
        group(1)(SCRIPTS.train, "ddp/train.py", [*settings, "--runs_dir", str(folder), "--run_name", name])
    return folder


@pytest.fixture
def judge(runs, monkeypatch, capsys):
    """`judge(change, kills)`: run the benchmark's main on the two runs, of which `change` spoils the second; what it
    printed, and its error line ("" where it was content)."""

    class Ended:
        def wait(self):
            return 0

    def run(change, kills):
        def disturb(options, dice):
            for name in ("undisturbed", "killed"):
                shutil.copytree(runs / name, options.folder / name)
            change(options.folder / "killed")
            return [{"mid_save": False, "committed": 4, "lost": lost} for lost in kills]

        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(kill_and_resume, "start", lambda *_: Ended())
        monkeypatch.setattr(kill_and_resume, "disturb", disturb)
        monkeypatch.setattr(sys, "argv", ["kill_and_resume.py", "ddp/train.py", "--steps", "6"])
        with contextlib.suppress(SystemExit):
            kill_and_resume.main()
        said = capsys.readouterr()
        errors = [line for line in said.err.splitlines() if "error: " in line]
        return said.out, errors[0] if errors else ""

    return run


def spoil_loss(run, change=1e-11):
    file = run / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[3]["loss"] += change
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")


def spoil_state(run):
    """One number of AdamW's second moments: no loss has seen it yet."""
    step = run / "checkpoints" / "step_6"
    content = json.loads((step / "manifest.json").read_text())
    tensors = read_checkpoint(run, 6)
    name = next(name for name in tensors if name.endswith("exp_avg_sq"))
    tensors[name].view(-1)[-1] += 1e-10
    shards = step / content["shards"]
    shutil.rmtree(shards)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dcp.save(tensors, checkpoint_id=shards, no_dist=True)
    content["files"] = {file.name: manifest.checksum(file) for file in shards.iterdir()}
    (step / "manifest.json").write_text(json.dumps(content))


def repeat_a_step(run):
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:3], lines[2], *lines[3:]]) + "\n")


def test_equal_runs_are_content(judge):
    out, error = judge(lambda run: None, [0, 2])
    assert error == "" and out.endswith("2 kills of 2 ranks of ddp/train.py: nothing torn, nothing lost\n")
    assert "| `ddp/train.py` | 2 | 6 | 2 | 0 | 2 (1.0), of 2 | 0 | 0 |" in out


@pytest.mark.parametrize(("change", "kills", "words"), [
    (spoil_loss, [0], "the run that was killed is not the undisturbed one"),
    (spoil_state, [0], "the run that was killed is not the undisturbed one"),
    (repeat_a_step, [0], "expected each once, in order"),
    (lambda run: None, [0, 3, 1], "3 steps lost; expected at most the 2 between two checkpoints"),
])  # fmt: skip
def test_a_run_that_resumed_wrongly_is_found_out(judge, change, kills, words):
    out, error = judge(change, kills)
    assert words in error and "nothing lost" not in out


def test_a_torn_checkpoint_is_found_out(runs, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs / "killed", run)
    assert kill_and_resume.check(run) == 6 and kill_and_resume.committed(run) == [4, 6]
    step = run / "checkpoints" / "step_4"
    (shard,) = step.glob("shards-*/*.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(SystemExit):
        kill_and_resume.check(run)
    assert "is torn: what was committed was not whole" in capsys.readouterr().err
    (step / "manifest.json").unlink()
    assert kill_and_resume.being_written(run) == {shard.parent}
    assert kill_and_resume.check(run) == 6 and kill_and_resume.steps_done(run) == 6
    attempt = kill_and_resume.attempt_of(run)
    assert not kill_and_resume.goes_on(run, attempt, 4) and not kill_and_resume.goes_on(run, "before", 6)
    assert kill_and_resume.goes_on(run, "before", 4)
