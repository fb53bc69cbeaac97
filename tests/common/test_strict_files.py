"""Strict reading of YAML and JSON: what is refused, in one line with its place, and that nothing takes long."""

import re

import pytest
import yaml

from common.strict_files import read_json, read_yaml

BOMB = "b0: &b0 {k: 1}\n" + "".join(f"b{i + 1}: &b{i + 1} [{', '.join([f'*b{i}'] * 4)}]\n" for i in range(13))


@pytest.mark.parametrize(("text", "words"), [
    ("train: {steps: 1}\nseed: 2\ntrain: {steps: 3}\n", "line 3: train is given twice, first in line 1; keep one"),
    ("train:\n  steps: 1\n  'steps': 2\n", "line 3: steps is given twice, first in line 2; keep one"),
    (BOMB, "holds more than 10000 values, aliases counted"),
    ("a: &a {b: *a}", "line 1: repeats *a inside itself"),
    ("a: " + "[" * 2000 + "]" * 2000, "line 1: is nested more than 50 levels deep"),
    ("a: " + "9" * 5000, "more digits than Python reads"),
    ("a: !!python/object/apply:os.getcwd []", "line 1: has the tag"),
    ("a: !!int '010'", "line 1: has the tag"),
    ("[a]: 1", "line 1: has a list or a mapping as a key"),
    ("a: [", "not valid YAML: line 1"),
    ("a: \x07", "not valid YAML: unacceptable character"),
    ("a: 1\n---\na: 2", "not valid YAML: line 2"),
    ("#" * 2**18 + "\n", "more than 262,144 bytes"),
])  # fmt: skip
def test_refused_yaml(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        read_yaml(tmp_path / "c.yaml")
    line = str(refused.value)
    assert line.startswith(f"{tmp_path}/c.yaml") and "\n" not in line, line


def test_yaml_values_are_what_they_look_like(tmp_path):
    texts = {
        "010": "010", "1:30": "1:30", "yes": "yes", "off": "off", "0x1f": "0x1f", "2024-13-45": "2024-13-45",
        "1_000": 1000, "-3": -3, "true": True, "null": None, "": None, "1.5": 1.5, "1.0e+3": 1000.0, "'5'": "5",
    }  # fmt: skip
    for text, value in texts.items():
        (tmp_path / "c.yaml").write_text(f"on: {text}\n")
        (found,) = read_yaml(tmp_path / "c.yaml").items()
        assert (*found, type(found[1])) == ("on", value, type(value))


def test_text_that_yaml_wrote_is_text_again(tmp_path):
    texts = [
        "1e3",
        "1.5e3",
        "-.5",
        "010",
        "yes",
        "1:30",
        "~",
        "null",
        "0x1f",
        "<<",
        "=",
        "2026-01-02",
        "5",
        ".inf",
        "a\tb",
    ]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(dict(zip(texts, texts, strict=True))))
    assert list(read_yaml(tmp_path / "c.yaml").items()) == list(zip(*[sorted(texts)] * 2, strict=True))


def test_a_value_may_be_repeated_by_name(tmp_path):
    (tmp_path / "c.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a\n")
    assert read_yaml(tmp_path / "c.yaml") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}


@pytest.mark.parametrize(("text", "words"), [
    ('{"a": {"b": 1,\n"c": "\\"b\\": {",\n"b": 2}}', "line 3: b is given twice, first in line 1; keep one"),
    ('{"\\u0061": 1,\n"a": 2}', "line 2: a is given twice, first in line 1"),
    ('{"a": NaN}', "NaN is no number in JSON"), ('{"a": -Infinity}', "-Infinity is no number in JSON"),
    ("[" * 100000, "nested too deeply"), ('{"a": ' + "9" * 5000 + "}", "limit (4300 digits)"),
    ('{"a": 1,}', "not valid JSON: line 1"), ("", "not valid JSON: line 1"),
])  # fmt: skip
def test_refused_json(tmp_path, text, words):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        read_json(tmp_path / "c.json")
    line = str(refused.value)
    assert line.startswith(f"{tmp_path}/c.json: ") and "\n" not in line, line


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_files_that_cannot_be_read(tmp_path, read):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "latin").write_bytes(b"# caf\xe9\n")
    found = {
        "loop": "Too many levels",
        "latin": "byte 5 is 0xe9",
        "": "Is a directory",
        "none": "No such file",
        "\0": "null byte",
    }
    for name, words in found.items():
        with pytest.raises(ValueError, match=words):
            read(tmp_path / name)
    (tmp_path / "mark").write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')  # as editors on Windows write it
    assert read(tmp_path / "mark") == {"a": 1}
