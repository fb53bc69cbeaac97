"""Checkpoints: whole or not there, equal after loading, and one line for whatever is wrong with one."""

import json
import shutil

import pytest
from launching import OnRanks, assert_refused

from common.runs import manifest

ON_RANKS = OnRanks("tests/common/checkpoint_on_ranks.py")


@pytest.mark.parametrize(("saved_at", "loaded_at"), [(1, 1), (2, 2), (3, 2), (2, 3), (4, 1)])
def test_round_trip_at_any_world_size(group, tmp_path, saved_at, loaded_at):
    before = group(saved_at)(ON_RANKS.train_and_save, str(tmp_path))
    after = group(loaded_at)(ON_RANKS.load_into_fresh, str(tmp_path / "step_3"))
    assert all(state == before[0] for state in before + after)  # hashes of weights and optimizer state


@pytest.mark.parametrize(("saved", "loaded"), [
    ("plain", "ddp"), ("ddp", "compiled"), ("compiled", "plain"),
    *(pytest.param(saved, loaded, marks=pytest.mark.slow) for saved, loaded in (
        ("plain", "plain"), ("plain", "compiled"), ("ddp", "plain"), ("ddp", "ddp"), ("compiled", "ddp"),
        ("compiled", "compiled"),
    )),
])  # fmt: skip
def test_names_are_those_of_the_bare_model(group, tmp_path, saved, loaded):
    before = group(2)(ON_RANKS.train_and_save, str(tmp_path), saved)
    names = json.loads((tmp_path / "step_3" / "manifest.json").read_text())["parameters"]
    assert not any("module." in name or "_orig_mod" in name for name in names)
    after = group(2)(ON_RANKS.load_into_fresh, str(tmp_path / "step_3"), loaded)
    assert after == before


def test_only_the_newest_committed_ones_stay(group, tmp_path):
    (tmp_path / "step_1" / "shards-dead").mkdir(parents=True)  # a rank of a dead attempt was still writing here
    folders = group(2)(ON_RANKS.save_many, str(tmp_path), [2, 4, 6], 2)
    assert folders[0] == ["step_4", "step_6"]
    assert group(2)(ON_RANKS.latest_step, str(tmp_path)) == ["step_6", "step_6"]


def test_without_a_manifest_it_is_not_there(group, tmp_path):
    group(2)(ON_RANKS.save_many, str(tmp_path), [2, 4], 5)
    (tmp_path / "step_4" / "manifest.json").unlink()  # as if killed before the commit
    assert group(2)(ON_RANKS.latest_step, str(tmp_path)) == ["step_2", "step_2"]


def damage_truncate(folder):
    shard = sorted(folder.glob("shards-*/__1_*.distcp"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    return ["truncated or changed", shard.name]


def damage_flip(folder, rank=1):
    shard = sorted(folder.glob(f"shards-*/__{rank}_*.distcp"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    return ["checksum", shard.name]


def damage_flip_other(folder):
    return damage_flip(folder, rank=0)  # the files are divided among the ranks that check them


def damage_delete(folder):
    shard = sorted(folder.glob("shards-*/__0_*.distcp"))[0]
    shard.unlink()
    return ["is missing", shard.name]


def damage_metadata(folder):
    next(folder.glob("shards-*/.metadata")).write_bytes(b"cos\nsystem\n(S'echo harm'\ntR.")
    return [".metadata", "truncated or changed"]


def damage_manifest(folder):
    (folder / "manifest.json").write_text('{"step": 3')
    return ["manifest.json", "not a manifest that this project wrote"]


def damage_foreign(folder):
    (folder / "manifest.json").write_text('{"version": 1, "files": ["a"]}')
    return ["manifest.json", "not a manifest that this project wrote"]


def damage_no_manifest(folder):
    (folder / "manifest.json").unlink()
    return ["no manifest.json"]


@pytest.mark.parametrize("damage", [
    damage_truncate, damage_flip, damage_flip_other, damage_delete, damage_metadata, damage_manifest, damage_foreign,
    damage_no_manifest,
])  # fmt: skip
def test_damaged(group, tmp_path, damage):
    group(2)(ON_RANKS.train_and_save, str(tmp_path))
    words = damage(tmp_path / "step_3")
    for code, line in group(2)(ON_RANKS.load_fails, str(tmp_path / "step_3"), {}):
        assert code == 2
        assert len(line.strip().splitlines()) == 1
        assert all(word in line for word in words), line


@pytest.mark.parametrize("value", ["lr", None])
def test_a_pickle_in_a_foreign_checkpoint_does_not_run(group, tmp_path, value):
    """It stands in DCP's metadata, or among the values of the optimizer; sizes and checksums are right."""
    mark = tmp_path / "mark"
    group(2)(ON_RANKS.train_and_save, str(tmp_path), "plain", value and str(mark))
    if value is None:
        replace_metadata(tmp_path / "step_3", f"cposix\nsystem\n(S'touch {mark}'\ntR.".encode())
    for code, line in group(2)(ON_RANKS.load_fails, str(tmp_path / "step_3"), {}):
        assert code == 2
        assert len(line.strip().splitlines()) == 1
        assert f"{tmp_path}/step_3" in line, line
        assert ("asks for posix.system" in line) or (value and ".lr is no plain value" in line), line
    assert not mark.exists()


def replace_metadata(folder, content):
    path = next(folder.glob("shards-*/.metadata"))
    path.write_bytes(content)
    written = json.loads((folder / "manifest.json").read_text())
    written["files"][".metadata"] = manifest.checksum(path)
    (folder / "manifest.json").write_text(json.dumps(written))


@pytest.mark.parametrize(("options", "words"), [
    ({"width": 9}, ["another model", "0.bias", "[8] there", "[9] here"]),
    ({"bias": False}, ["another model", "0.bias", "none"]),
    ({"optimizer": "SGD"}, ["AdamW", "SGD", "optimizer.name"]),
])  # fmt: skip
def test_of_another_model(group, tmp_path, options, words):
    group(2)(ON_RANKS.train_and_save, str(tmp_path))
    for code, line in group(2)(ON_RANKS.load_fails, str(tmp_path / "step_3"), options):
        assert code == 2
        assert all(word in line for word in words), line


def test_folders_that_the_ranks_do_not_share(group, tmp_path):
    """As with runs_dir on each node's own disk: nothing is committed that could not be loaded."""
    for code, line in group(2)(ON_RANKS.save_fails, str(tmp_path), 4, True):
        assert code == 2
        assert "is runs_dir on a shared file system?" in line
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_folder_that_cannot_be_written(group, tmp_path):
    group(2)(ON_RANKS.save_many, str(tmp_path), [2], 2)
    (tmp_path / "step_4").write_text("a file where the folder should be")
    for code, line in group(2)(ON_RANKS.save_fails, str(tmp_path), 4):
        assert code == 2
        assert "could not be written" in line
        assert "earlier checkpoints are untouched" in line
    assert group(2)(ON_RANKS.latest_step, str(tmp_path)) == ["step_2", "step_2"]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_leftover_of_a_dead_attempt_commits_nothing(group, tmp_path, ranks):
    """Once another attempt has claimed the folder, the first one's saves end it, on all ranks, and remove nothing."""
    for saves, committed in group(ranks)(ON_RANKS.leftover, str(tmp_path)):
        assert [code for code, _ in saves] == [0, 2, 0, 2, 2]
        assert all("another attempt has taken over" in words for code, words in saves if code)
        assert committed == ["step_1", "step_2"]


@pytest.mark.parametrize("committed_meanwhile", [True, False])
def test_a_leftover_that_wakes_in_its_commit(group, tmp_path, committed_meanwhile):
    """It replaces no manifest; where there is none yet its own is whole, and the new attempt may replace it."""
    [(end, found, then, shards)] = group(1)(ON_RANKS.wakes_before_the_commit, str(tmp_path), committed_meanwhile)
    assert end[0] == 2
    assert "another attempt has taken over" in end[1]
    assert (found, then) == ("second" if committed_meanwhile else "first", "second")
    assert shards == 1


def test_the_latest_is_that_of_the_highest_number(group, tmp_path):
    """Of 9, 10 and 100, which text puts in another order."""
    folders = group(2)(ON_RANKS.save_many, str(tmp_path), [9, 10, 100], 2)
    assert folders[0] == ["step_10", "step_100"]
    assert group(2)(ON_RANKS.latest_step, str(tmp_path)) == ["step_100"] * 2


def test_files_are_on_disk_before_the_manifest(group, tmp_path):
    """A power cut after the commit must find all that the manifest names: shards, their folder, then the manifest."""
    for rank, events in enumerate(group(2)(ON_RANKS.synced, str(tmp_path))):
        shard, folder = f"__{rank}_0.distcp", "shards-"
        assert events.index(shard) < events.index(folder)
        if rank == 0:
            assert events.index(".metadata") < events.index(folder) < events.index("manifest") < events.index("commit")
            assert events[-1] == "step_1"  # the folder that holds the manifest


def test_steps_are_numbers_not_text(tmp_path):
    for step in (9, 10):
        (tmp_path / f"step_{step}").mkdir()
        (tmp_path / f"step_{step}" / "manifest.json").touch()
    assert manifest.latest(tmp_path) == tmp_path / "step_10"


@pytest.mark.parametrize(("where", "value", "words"), [
    ("weight", float("nan"), "0.weight holds nan or inf"), ("moment", float("inf"), "exp_avg_sq holds nan or inf"),
])  # fmt: skip
def test_what_is_not_finite_is_not_saved(group, tmp_path, where, value, words):
    """On one rank, it ends all: a run that goes on from such a checkpoint can never learn again."""
    group(2)(ON_RANKS.save_many, str(tmp_path), [2], 1)
    assert_refused(group(2)(ON_RANKS.save_not_finite, str(tmp_path), where, value), words)
    assert manifest.latest(tmp_path) == tmp_path / "step_2"


def test_what_the_user_put_there_stays(group, tmp_path):
    group(2)(ON_RANKS.save_many, str(tmp_path), [1, 2], 2)
    (tmp_path / "step_info.txt").write_text("a file")
    for copy in ("step_100_best", "step_007", "step_\u0663", "elsewhere"):
        shutil.copytree(tmp_path / "step_1", tmp_path / copy)
    (tmp_path / "step_5").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "step_2" / "notes.txt").write_text("in a checkpoint that will be removed")
    (tmp_path / "step_0").mkdir()
    (tmp_path / "step_0" / "notes.txt").write_text("in a folder that is no checkpoint")
    before = {path for path in tmp_path.rglob("*") if "step_1/" not in f"{path}/" and "step_2/" not in f"{path}/"}
    group(2)(ON_RANKS.save_many, str(tmp_path), [3, 4], 1)
    assert all(path.exists() for path in before)
    assert [path.name for path in (tmp_path / "step_2").iterdir()] == ["notes.txt"]
    assert not (tmp_path / "step_1").exists() and not (tmp_path / "step_3").exists()
    assert manifest.latest(tmp_path) == tmp_path / "step_4"


def test_a_full_disk(group, tmp_path):
    """One short line; what was half written is gone, also what a killed attempt left at this step."""
    group(2)(ON_RANKS.save_many, str(tmp_path), [2], 2)
    (tmp_path / "step_4" / "shards-dead").mkdir(parents=True)
    (tmp_path / "step_4" / "shards-dead" / "__0_0.distcp").write_bytes(b"half")
    answers = group(2)(ON_RANKS.save_without_room, str(tmp_path), 4, 1000)
    # width 999: weights and both moments, each (4 x 999 + 999 + 3 x 999 + 3) x 4 bytes
    assert_refused(answers, "step_4 could not be written: rank 0: ")
    assert_refused(answers, "File too large; it needs 0.1 MiB, and ")
    assert all(len(message) < 400 for _, message in answers)
    assert not (tmp_path / "step_4").exists()
    assert manifest.latest(tmp_path) == tmp_path / "step_2"
