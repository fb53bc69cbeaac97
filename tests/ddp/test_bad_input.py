"""Mistakes of a user: one line, a non-zero exit on every rank, in seconds, and nothing lost."""

import json
import shutil

import pytest
from equality import SMALL
from launching import SCRIPTS, OnRanks, whose_rank_1_dies

ON_RANKS = OnRanks("tests/ddp/starts_on_ranks.py")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, group):
    """A finished run of two ranks, to be damaged in copies."""
    folder = tmp_path_factory.mktemp("finished")
    arguments = [*SMALL, "--train.steps", "2", "--runs_dir", str(folder), "--run_name", "run"]
    group(2)(SCRIPTS.train, "ddp/train.py", arguments)
    return folder / "run"


def truncate(run):
    shard = next(run.glob("checkpoints/step_2/shards-*/__0_*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])


def foreign(run):
    (run / "checkpoints" / "step_2" / "manifest.json").write_text(json.dumps({"made by": "another program"}))


def other_settings(run):
    path = run / "checkpoints" / "step_2" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["extra"]["settings"]["seed"] = 99
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(("arguments", "words"), [
    (["--train.stepz", "3"], ["train.stepz", "train.steps"]),
    (["--batch.global_size", "25"], ["global_size = 25", "2 data-parallel ranks"]),
    (["--batch.micro_size", "5"], ["micro_size = 5", "12 samples", "[1, 2, 3, 4, 6, 12]"]),
    (["--data.path", "nowhere.txt"], ["nowhere.txt", "no such file"]),
    (["--data.source", "tokens", "--data.path", "nowhere"], ["nowhere", "meta.json", "tools/tokenize_text.py"]),
    (["--model.vocabulary", "100"], ["vocabulary of 256, the model 100"]),
    (["--model.heads", "7"], ["model.heads 7"]),
    (["--data.sequence_length", "500"], ["data.sequence_length = 500", "max_sequence"]),
    (["--resume", "nowhere"], ["nowhere", "no manifest.json"]),
    (["--device", "cuda"], ["no GPU"]),
    (["--network_profile", "token-ring"], ["token-ring", "infiniband"]),
    (["--optimizer.lr", "1e30", "--train.precision", "fp32"], ["gradient norm is", "optimizer.lr"]),
])  # fmt: skip
def test_one_line_on_every_rank(group, tmp_path, arguments, words):
    common = [] if "--data.sequence_length" in arguments else SMALL
    answers = group(2)(SCRIPTS.ends, "ddp/train.py", [*common, "--runs_dir", str(tmp_path), *arguments], timeout=60)
    for code, text in answers:
        lines = [line for line in text.splitlines() if "error: " in line]
        assert code == 2
        assert len(lines) == 1, text
        assert all(word in lines[0] for word in words), lines
        assert "Traceback" not in text


@pytest.mark.parametrize(("damage", "words"), [
    (truncate, ["truncated or changed"]), (foreign, ["not a manifest that this project wrote"]),
    (other_settings, ["other settings of seed"]),
])  # fmt: skip
def test_damaged_or_changed_runs(group, finished, tmp_path, damage, words):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    damage(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    arguments = [*SMALL, "--train.steps", "4", "--runs_dir", str(tmp_path), "--run_name", "run"]
    for code, text in group(2)(SCRIPTS.ends, "ddp/train.py", arguments, timeout=60):
        assert code == 2
        assert all(word in text for word in words), text
    of_the_attempt = ("config.yaml", "run.json", "attempt")  # what every start writes
    kept = {p: p.read_bytes() for p in before if p.name not in of_the_attempt}
    assert kept == {p: c for p, c in before.items() if p.name not in of_the_attempt}  # nothing is lost


def test_never_resume(group, finished):
    arguments = [*SMALL, "--runs_dir", str(finished.parent), "--run_name", "run", "--resume", "never"]
    for code, text in group(2)(SCRIPTS.ends, "ddp/train.py", arguments):
        assert code == 2
        assert "exists already" in text


def test_unwritable_run_folder(group, tmp_path):
    (tmp_path / "file").write_text("not a folder")  # also root, who may write anywhere, cannot make a folder in a file
    for code, text in group(2)(SCRIPTS.ends, "ddp/train.py", [*SMALL, "--runs_dir", str(tmp_path / "file")]):
        assert code == 2
        assert "run folder" in text
        assert "--runs_dir" in text


@pytest.mark.slow  # a torchrun of its own; what it reads is in tests/common/test_ranks.py
@pytest.mark.parametrize("script", ["ddp/train.py"])
def test_under_torchrun_all_ranks_end_and_the_root_cause_is_shown(launch, script):
    result = launch(script, "--train.stepz", "3", nproc=3, check=False, timeout=60)
    assert result.returncode != 0
    assert "[rank " in result.stderr
    cause = result.stderr.split("Root Cause")[1]
    assert "unknown key train.stepz (value '3'); did you mean train.steps?" in cause


def test_half_set_environment(group):
    [(code, stderr)] = group(1)(ON_RANKS.ends_with, {"RANK": "0"}, "ddp/train.py", [])
    assert code == 2
    assert "half-set torchrun environment: found RANK=0, missing WORLD_SIZE" in stderr


def test_minimal_says_how_to_start_it(group):
    [(message, _)] = group(1)(ON_RANKS.ends_with, {}, "ddp/minimal.py", [])  # a message: exit code 1
    assert "torchrun --nproc-per-node=2 ddp/minimal.py" in message


def test_minimal_refuses_a_batch_that_does_not_divide(group):
    """Five ranks would drop samples of each batch without a word."""
    for message, _ in group(5)(SCRIPTS.ends, "ddp/minimal.py", []):
        assert "error: a batch of 48 does not divide among 5 processes" in message


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_others_with_it(launch, tmp_path):
    """One rank is killed in mid-run: torchrun ends the other one, and says which it was."""
    script = whose_rank_1_dies("ddp/train.py", tmp_path)
    result = launch(script, *SMALL, "--train.steps", "4000", check=False, timeout=100)
    assert result.returncode != 0
    assert "Root Cause" in result.stderr
    assert "SIGKILL" in result.stderr.split("Root Cause")[1]
    assert result.stderr.count("[rank 0] error: lost rank 1 (") == 1 and "[rank0]: Traceback" not in result.stderr
