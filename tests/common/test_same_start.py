"""Ranks that were started with different settings, code or data are refused before they train."""

import re
import shutil

import pytest
from launching import ROOT, SCRIPTS, assert_refused

from common.config import Config, parse
from common.launching import same_start
from common.launching.same_start import first_difference

SHORT = ["--train.steps", "2", "--data.validation_samples", "4", "--timeout_s", "20"]


def unlike(group, size, script, odd, *, who=-1, common=()):
    """How the ranks end when one of them has other arguments."""
    arguments = [[*SHORT, *common] for _ in range(size)]
    arguments[who] = [*arguments[who], *odd]
    return group(size)(SCRIPTS.ends_unlike, script, arguments)


@pytest.mark.parametrize(("key", "value", "ours", "theirs"), [
    ("seed", "1", "1234", "1"), ("batch.global_size", "12", "24", "12"), ("batch.micro_size", "3", "null", "3"),
    ("data.sequence_length", "64", "128", "64"), ("optimizer.lr", "0.01", "0.003", "0.01"),
    ("train.steps", "3", "2", "3"), ("train.eval_every", "1", "0", "1"), ("checkpoint.every", "1", "0", "1"),
    ("optimizer.clip", "2", "1.0", "2.0"), ("model.layers", "2", "4", "2"),
])  # fmt: skip
def test_a_setting_of_one_rank(group, tmp_path, key, value, ours, theirs):
    answers = unlike(group, 2, "ddp/train.py", [f"--{key}", value], common=["--runs_dir", str(tmp_path / "runs")])
    assert_refused(answers, f"setting {key} is {ours} on rank 0 (")
    assert_refused(answers, f"; {theirs} on rank 1 (")
    assert not (tmp_path / "runs").exists(), "it began"


@pytest.mark.parametrize("who", [0, 2])
def test_all_ranks_name_the_odd_one(group, tmp_path, who):
    answers = unlike(group, 3, "fsdp/train.py", ["--seed", "7"], who=who, common=["--runs_dir", str(tmp_path)])
    assert_refused(answers, f"7 on rank {who} (")
    assert len({words.split("error: ")[1] for _, words in answers}) == 1


@pytest.mark.parametrize("where", [0.1, 0.999], ids=["training", "validation"])
def test_data_of_one_rank(group, tmp_path, where):
    """One path, two contents: here two paths, which may differ."""
    text = bytearray(b"abcdefgh" * 4000)
    (tmp_path / "a.txt").write_bytes(text)
    text[int(len(text) * where)] = 0
    (tmp_path / "b.txt").write_bytes(text)
    places = ["--runs_dir", str(tmp_path / "runs"), "--data.path", str(tmp_path / "a.txt")]
    answers = unlike(group, 2, "ddp/train.py", ["--data.path", str(tmp_path / "b.txt")], common=places)
    assert_refused(answers, f"data for {'training' if where < 0.9 else 'validation'} is ")
    assert_refused(answers, "copy the same data to all nodes")
    assert not (tmp_path / "runs").exists(), "it began"


def test_code_of_one_rank(group, tmp_path):
    """The lesson's folder is copied, and a line is added."""
    for copy in ("here", "there"):
        shutil.copytree(ROOT / "ddp", tmp_path / copy / "ddp")
    with (tmp_path / "there/ddp/train.py").open("a") as file:
        file.write("# newer\n")
    scripts = [str(tmp_path / copy / "ddp/train.py") for copy in ("here", "there")]
    answers = group(2)(SCRIPTS.other_script, scripts, [*SHORT, "--runs_dir", str(tmp_path / "runs")])
    assert_refused(answers, "file ddp/train.py is ")
    assert_refused(answers, "give all nodes the same checkout")


def test_paths_of_a_node_may_differ(group, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abcdefgh" * 4000)
    shutil.copy(tmp_path / "a.txt", tmp_path / "b.txt")
    common = ["--runs_dir", str(tmp_path / "runs"), "--data.path", str(tmp_path / "a.txt"), "--model.layers", "1"]
    odd = ["--runs_dir", str(tmp_path / "other"), "--data.path", str(tmp_path / "b.txt")]
    assert {code for code, _ in unlike(group, 2, "ddp/train.py", odd, common=common)} == {0}


def test_a_file_that_a_setting_names_is_compared_by_its_content(tmp_path):
    file = tmp_path / "settings.json"
    facts = []
    for content in ("{}", "[]"):
        file.write_text(content)
        facts.append(("node", same_start.of_settings({"section": {"name": str(file)}})))
    assert re.search(r"file .*/settings.json is \w{12} on rank 0 \(node\); \w{12} on rank 1", first_difference(facts))


def test_what_is_compared(monkeypatch):
    """Every file of common/ and of the script's folder, the versions, and every setting that is no place of a node."""
    monkeypatch.setattr("sys.argv", [str(ROOT / "fsdp/train.py")])
    parse(Config, ["--seed", "5"])
    facts = same_start.at_start(same_start.torch.device("cpu"))
    files = [f"{folder}/{path.name}" for folder in ("common", "fsdp") for path in (ROOT / folder).glob("*.py")]
    assert {f"file {file}" for file in files} <= facts.keys()
    assert {"version of torch", "version of python", "device type"} <= facts.keys()
    assert facts["setting seed"] == "5" and "setting runs_dir" not in facts and "setting data.path" not in facts
    assert not same_start.noted(), "the next start would be compared with the settings of this one"


def test_many_ranks_are_named_in_one_line():
    starts = [(f"node{rank // 8}", {"version of torch": "2.15.0" if rank != 70 else "2.9.0"}) for rank in range(128)]
    assert first_difference(starts) == (
        "the ranks were started differently: version of torch is 2.15.0 on rank 0 (node0), 1 (node0), 2 (node0), "
        "3 (node0) and 123 more; 2.9.0 on rank 70 (node8); install the same environment on all nodes"
    )
    assert "absent on rank 1" in first_difference([("a", {"file x.py": "1"}), ("b", {})])
    assert first_difference(starts[:64]) is None
    # What a package is needed for may run on rank 0 alone; two versions of it are a difference.
    versions = [("a", {"version of x": "1"}), ("b", {}), ("c", {"version of x": "2"})]
    assert first_difference(versions[:2]) is None
    assert "version of x is 1 on rank 0" in first_difference(versions)
