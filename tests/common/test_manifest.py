"""A manifest that anyone may have written: nothing that it names lies outside of the checkpoint's folder."""

import json
import pickle
import re

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from common.runs import manifest
from common.runs.checkpoint_reader import Reader

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # as is meant


@pytest.fixture
def checkpoint(tmp_path):
    """A whole checkpoint: its folder, its shards, its manifest."""
    shards = tmp_path / "step_3" / "shards-a1"
    save({"a": torch.ones(2), "b": 3}, storage_writer=FileSystemWriter(shards), no_dist=True)
    content = {"step": 3, "parameters": {}, "optimizer": None, "extra": {}, "shards": shards.name, "world_size": 1}
    content["files"] = {path.name: manifest.checksum(path) for path in shards.iterdir()}
    write(shards.parent, content)
    assert manifest.read(shards.parent) == content
    return shards.parent, shards, content


def write(folder, content):
    (folder / "manifest.json").write_text(json.dumps(content))


def refused(folder, words):
    with pytest.raises(ValueError, match=re.escape(words)) as refusal:
        manifest.read(folder)
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(("changes", "words"), [
    ({"shards": "../step_3/shards-a1"}, "shards = '../step_3/shards-a1'"), ({"shards": ".."}, "shards = '..'"),
    ({"shards": "/tmp"}, "shards = '/tmp'"), ({"shards": ["a"]}, "TypeError"), ({"files": {}}, "files lacks .metadata"),
    ({"files": None}, "TypeError"), ({"step": "3"}, "step = '3'"), ({"parameters": []}, "parameters = []"),
    ({"extra": None}, "extra = None"), ({"optimizer": 1}, "optimizer = 1"),
])  # fmt: skip
def test_what_a_manifest_may_not_say(checkpoint, changes, words):
    folder, _, content = checkpoint
    write(folder, content | changes)
    refused(folder, f"manifest.json is not a manifest that this project wrote ({words}")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "__0_0.distcp/../x", "data.pkl", "__0_0.distcp\n"])
def test_names_that_dcp_does_not_write(checkpoint, name):
    folder, _, content = checkpoint
    content["files"][name] = content["files"][".metadata"]
    write(folder, content)
    refused(folder, f"files has {name!r}")


def test_links_and_other_files(checkpoint, tmp_path):
    folder, shards, _ = checkpoint
    (shards / "extra.pt").touch()
    refused(folder, "shards-a1/extra.pt is not in the manifest")
    (shards / "extra.pt").unlink()
    (shards / ".nfs0001").touch()  # an open file that NFS keeps after it was removed
    manifest.read(folder)
    (shards / "__0_0.distcp").rename(tmp_path / "outside")
    (shards / "__0_0.distcp").symlink_to(tmp_path / "outside")
    refused(folder, "shards-a1/__0_0.distcp is a link")
    shards.rename(tmp_path / "shards")
    shards.symlink_to(tmp_path / "shards")
    refused(folder, "shards-a1 is a link")


def test_changed_metadata_is_noticed_before_anything_is_loaded(checkpoint):
    folder, shards, _ = checkpoint
    content = (shards / ".metadata").read_bytes()
    (shards / ".metadata").write_bytes(content[:-2] + b"0.")
    refused(folder, "shards-a1/.metadata does not have the checksum")


def test_metadata_that_lead_elsewhere(checkpoint):
    _, shards, content = checkpoint
    Reader(shards, content["files"])
    metadata = pickle.loads((shards / ".metadata").read_bytes())
    for entry in metadata.storage_data.values():
        entry.relative_path = "../../secret"
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=re.escape("/.metadata leads to ['../../secret']")):
        Reader(shards, content["files"])


@pytest.mark.parametrize("text", [b"cos\nsystem\n(S'touch mark'\ntR.", b"ctorch.serialization\nload\n.", b"",
                                  b"ctorch.distributed.checkpoint.metadata\nos.system\n.", b"\x80\x04N."])  # fmt: skip
def test_pickles_that_are_no_metadata(checkpoint, monkeypatch, tmp_path, text):
    monkeypatch.chdir(tmp_path)
    _, shards, content = checkpoint
    (shards / ".metadata").write_bytes(text)
    with pytest.raises(ValueError, match=r"/\.metadata is no metadata of DCP"):
        Reader(shards, content["files"])
    assert not (tmp_path / "mark").exists()
