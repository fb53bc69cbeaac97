"""Records after a crash: read as far as they are whole, with a word for the rest; and written whole."""

import json
import os

import pytest

from common.runs import records

ROW, EVALUATED = {"step": 0, "loss": 1.5, "lr": 0.1}, {"step": 1, "val_loss": 2.5}


@pytest.mark.parametrize("line", [
    b"", b"\0" * 200, b"\0" * 9 + json.dumps(ROW).encode(), b"{}", b"[]", b"1", b"null", b"{'step': 0}", b'{"step": 0}',
    b'{"step": "0", "loss": 1.0}', b'{"step": 0, "loss": null}', b'{"step": 0, "lo', b"\xff\xfe", b"[" * 9999,
])  # fmt: skip
@pytest.mark.parametrize("place", [0, 1, 2])
def test_damaged_rows_are_left_out_with_a_word(tmp_path, capsys, line, place):
    lines = [json.dumps(row).encode() for row in (ROW, EVALUATED)]
    lines.insert(place, line)
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    assert records.read_rows(tmp_path) == [ROW, EVALUATED]
    assert capsys.readouterr().err == f"warning: {tmp_path}/metrics.jsonl: 1 damaged lines of 3 are left out\n"


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"\xff\xfe", b"[]", b"{", b"text", b"null", b"[" * 9999])
@pytest.mark.parametrize(("name", "read"), [("config.yaml", records.read_settings), ("run.json", records.read_record)])
def test_a_damaged_record_is_named_with_what_to_do(tmp_path, name, read, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"after a crash of the machine; remove it \(rm ") as caught:
        read(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name} ({len(content)} bytes)")


def test_a_record_is_on_the_disk_before_its_name_and_its_name_after(tmp_path, monkeypatch):
    """Otherwise a crash leaves a file of 0 bytes under the name."""
    events, fsync, replace = [], os.fsync, os.replace
    real = lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda d: (events.append(os.path.basename(real(d))), fsync(d)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replaced"), replace(a, b)))
    records.write_record(tmp_path, {"a": 1})
    assert events == ["run.json.tmp", "replaced", tmp_path.name]
    assert records.read_record(tmp_path) == {"a": 1}
