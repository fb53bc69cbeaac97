"""Settings: what is accepted, and the one line that anything else gets."""

import json
from dataclasses import dataclass, field
from typing import Literal

import pytest
import yaml

from common.config import Config, RunConfig, parse, runs_dir, to_dict


def error_line(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        parse(Config, list(arguments))
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_file_then_command_line(tmp_path):
    (tmp_path / "c.yaml").write_text("train: {steps: 7, precision: bf16}\noptimizer: {lr: 3e-4}\n")
    config = parse(Config, ["--config", str(tmp_path / "c.yaml"), "--train.steps", "9"])
    assert (config.train.steps, config.train.precision, config.optimizer.lr) == (9, "bf16", 3e-4)
    (tmp_path / "c.json").write_text(json.dumps({"batch": {"micro_size": 2}}))
    assert parse(Config, [f"--config={tmp_path}/c.json"]).batch.micro_size == 2


def test_a_preset_on_the_command_line_is_not_overruled_by_the_default_preset():
    model = parse(Config, ["--model.preset", "gpt_124m", "--model.layers", "4"]).model
    assert (model.width, model.layers, model.vocabulary, model.tied) == (768, 4, 50304, True)


def test_the_resolved_settings_read_back_the_same(tmp_path):
    config = parse(Config, ["--model.preset", "gpt_124m", "--optimizer.betas", "[0.8,0.9]", "--run_name", "x"])
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(to_dict(config)))
    assert to_dict(parse(Config, ["--config", str(tmp_path / "c.yaml")])) == to_dict(config)


def test_local_rank_that_a_launcher_adds_is_accepted():
    assert parse(Config, ["--local_rank=1", "--local-rank=0", "--seed", "5"]).seed == 5


def test_runs_dir_from_the_environment(monkeypatch):
    monkeypatch.setenv("RUNS_DIR", "/elsewhere")
    assert parse(Config, []).runs_dir == "/elsewhere"


def test_home_and_variables_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("RUNS_DIR", "$SCRATCH/runs")
    (tmp_path / "c.yaml").write_text("data: {path: ~/text}\nresume: ${SCRATCH}/runs/a\n")
    config = parse(Config, ["--config=~/c.yaml"])
    assert (config.runs_dir, config.data.path, config.resume) == (
        "/scratch/me/runs",
        f"{tmp_path}/text",
        "/scratch/me/runs/a",
    )
    assert str(runs_dir()) == "/scratch/me/runs"
    monkeypatch.setenv("RUNS_DIR", "")
    assert parse(Config, []).runs_dir == "runs"
    monkeypatch.setenv("RUNS_DIR", "$UNSET_VARIABLE/runs")
    assert parse(Config, ["--runs_dir", "~"]).runs_dir == str(tmp_path)


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "train:\n  # steps: 50\noptimizer: {}\n", "{}"])
def test_what_is_commented_out_has_its_default(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    assert parse(Config, ["--config", f"{tmp_path}/c.yaml"]) == Config()


def test_a_lesson_adds_its_own_section():
    @dataclass
    class Mesh:
        tensor: int = 1

    @dataclass
    class Lesson(RunConfig):
        mesh: Mesh = field(default_factory=Mesh)

    assert parse(Lesson, ["--mesh.tensor", "2"]).mesh == Mesh(2)
    with pytest.raises(SystemExit):
        parse(Config, ["--mesh.tensor", "2"])


@pytest.mark.parametrize(("text", "words"), [
    ("train: {stepz: 3}", ["c.yaml", "train.stepz", "3", "did you mean train.steps"]),
    ("trian: {steps: 3}", ["c.yaml", "trian", "train.steps"]),
    ("steps: 3", ["c.yaml", "unknown key steps", "did you mean train.steps"]),
    ("train: {steps: many}", ["c.yaml", "train.steps", "many", "whole number"]),
    ("train: {steps: 0}", ["c.yaml", "train.steps = 0", "at least 1"]),
    ("train: {precision: fp8}", ["c.yaml", "train.precision", "fp8", "one of fp32, bf16, fp16, fp64"]),
    ("batch: {global_size: -1}", ["c.yaml", "batch.global_size = -1", "at least 1"]),
    ("optimizer: {betas: [0.9, 2]}", ["c.yaml", "optimizer.betas", "2.0"]),
    ("model: {preset: tinny}", ["c.yaml", "model.preset", "tinny", "did you mean tiny"]),
    ("model: {heads: 7}", ["c.yaml", "model.heads 7", "128"]),
    ("data: {source: tokens}", ["c.yaml", "data.source", "data.path"]),
    ("run_name: ../up", ["c.yaml", "run_name", "../up"]),
    ("run_name: 5", ["c.yaml", "run_name = 5", "text or null", "quotes"]),
    ("train: {steps: null}", ["c.yaml", "train.steps = null", "whole number"]),
    ("train: {compile: 1}", ["c.yaml", "train.compile = 1", "true or false"]),
    ("train: {steps: true}", ["c.yaml", "train.steps = true", "whole number"]),
    ("train: {steps: {}}", ["c.yaml", "train.steps = {}", "whole number"]),
    ("train: 3", ["c.yaml", "train = 3", "train is a section", "train.steps"]),
    ("optimizer: {betas: [0.9]}", ["c.yaml", "optimizer.betas = [0.9]", "list of 2 numbers"]),
    ("optimizer: {milestones: [1, 2.5]}", ["c.yaml", "optimizer.milestones = [1, 2.5]", "list of whole numbers"]),
    ("train: [", ["c.yaml", "not valid YAML"]),
    ("train: {steps: 1}\nseed: 1\ntrain: {steps: 2}", ["c.yaml: line 3: train is given twice, first in line 1"]),
    ("train: {steps: 1}\ntrain.steps: 2", ["c.yaml: train.steps is given twice, by its dotted name"]),
    ("train: {steps: {a: 1}}", ["c.yaml: train.steps.a = 1, but train.steps is no section", "whole number"]),
    ("optimizer: {lr: .nan}", ["c.yaml: optimizer.lr = NaN", "it is not finite", "number"]),
    ("optimizer: {clip: .inf}", ["c.yaml: optimizer.clip = Infinity", "it is not finite"]),
    ("seed: -1", ["c.yaml: seed = -1", "0 or more"]),
    ("seed: 99999999999999999999", ["c.yaml: seed = 99999999999999999999", "more than 64 bits"]),
    ("timeout_s: 1.0e+30", ["c.yaml: timeout_s = 1e+30", "at most 1e6"]),
    ("train: {compile: yes}", ["c.yaml: train.compile = yes", "true or false"]),
    ("train: {steps: 010}", ["c.yaml: train.steps = 010", "whole number"]),
    ("data: {path: ''}", ["c.yaml: data.path = \"\"", "it is empty"]),
    ("data: {path: $UNSET_VARIABLE/x}", ["data.path = $UNSET_VARIABLE/x", "the variable UNSET_VARIABLE is not set"]),
    ("runs_dir: ~unknown_user/x", ["runs_dir = ~unknown_user/x", "there is no user unknown_user"]),
    ("just words", ["c.yaml", "expected settings"]),
])  # fmt: skip
def test_wrong_file(tmp_path, capsys, text, words):
    (tmp_path / "c.yaml").write_text(text)
    line = error_line(capsys, "--config", str(tmp_path / "c.yaml"))
    assert all(word in line for word in words), line


@pytest.mark.parametrize(("arguments", "words"), [
    (["--train.stepz", "3"], ["command line", "train.stepz", "'3'", "did you mean train.steps"]),
    (["--train.stepz=3"], ["train.stepz", "'3'"]),
    (["--learning_rate", "3"], ["learning_rate", "allowed here"]),
    (["--train.steps", "3.5"], ["train.steps = 3.5", "whole number"]),
    (["--model.layers", "abc"], ["model.layers = abc", "whole number or null"]),
    (["--train.steps"], ["train.steps", "expected one argument"]),
    (["--config", "nowhere.yaml"], ["nowhere.yaml", "does not exist"]),
    (["stray"], ["stray"]),
    (["--train", "{steps: 3}"], ["train is a section"]),
    (["--optimizer.milestones", "[1"], ["optimizer.milestones = [1", "list of whole numbers"]),
    (["--train.compile"], ["train.compile", "expected one argument"]),
    (["--timeout_s", "0"], ["timeout_s = 0"]),
    (["--runs_dir="], ["command line: runs_dir = \"\"", "it is empty"]),
    (["--resume="], ["command line: resume = \"\"", "it is empty"]),
    (["--config="], ["config: expected one argument"]),
    (["--config=loop.yaml"], ["loop.yaml", "is no file"]),
    (["--config=a\0b"], ["does not exist"]),
    (["--seed", "9" * 5000], ["seed = 9999", "more digits than Python reads"]),
    (["--device", "tpu"], ["device", "tpu", "one of auto, cpu, cuda"]),
])  # fmt: skip
def test_wrong_command_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    line = error_line(capsys, *arguments)
    assert all(word in line for word in words), line


def test_the_source_of_an_impossible_value_is_where_it_stands(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("train: {steps: 0}\nbatch: {global_size: 6}\n")
    path = str(tmp_path / "c.yaml")
    assert "c.yaml: train.steps = 0" in error_line(capsys, "--config", path, "--seed", "1")
    line = error_line(capsys, "--config", path, "--train.steps", "3", "--batch.global_size", "0")
    assert "command line: batch.global_size = 0" in line


def test_the_command_line_wins_wherever_the_file_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\ntrain:\nbatch: {}\n")
    (tmp_path / "b.yaml").write_text("seed: 2\ntrain: {steps: 5}\n")
    files = [f"--config={tmp_path}/a.yaml", f"--config={tmp_path}/b.yaml"]
    assert parse(Config, files).seed == 2
    assert parse(Config, ["--seed", "3", *files]).seed == 3
    assert parse(Config, ["--seed", "3", "--seed", "4", *files]).seed == 4


@dataclass
class Values:
    flag: bool = False
    rate: float = 1.0
    count: int = 1
    text: str = "a"
    name: str | None = "a"
    size: int | None = 1
    part: float | None = 1.0
    pair: tuple[float, float] = (0.1, 0.2)
    names: list[str] = field(default_factory=lambda: ["a"])
    steps: list[int] | None = None
    when: Literal["true", "false", "both"] = "both"
    stage: Literal[1, 2] = 1
    kind: Literal["a", "b"] | None = "a"


@pytest.mark.parametrize(("key", "text", "value"), [
    ("flag", "true", True), ("flag", "false", False), ("rate", "1e-3", 1e-3), ("rate", "+1e-3", 1e-3),
    ("rate", "2.5E3", 2500.0), ("rate", "3", 3.0), ("rate", ".5", 0.5), ("count", "3", 3), ("count", "1_000", 1000),
    ("text", "a b", "a b"), ("text", "it's 5%", "it's 5%"), ("name", "null", None), ("size", "null", None),
    ("size", "7", 7),
    ("part", "null", None), ("part", "2e-1", 0.2), ("pair", "[0.8, 1]", (0.8, 1.0)),
    ("pair", "[1e-3,2]", (1e-3, 2.0)),
    ("names", "[q_proj, v_proj]", ["q_proj", "v_proj"]), ("names", "[]", []), ("steps", "null", None),
    ("steps", "[1, 2]", [1, 2]), ("when", "true", "true"), ("when", "both", "both"), ("stage", "2", 2),
    ("kind", "b", "b"), ("kind", "null", None),
])  # fmt: skip
def test_values_from_a_file_and_from_the_command_line(tmp_path, key, text, value):
    (tmp_path / "c.yaml").write_text(f"{key}: {text}\n")
    for arguments in (["--config", f"{tmp_path}/c.yaml"], [f"--{key}={text}"], [f"--{key}", text]):
        found = getattr(parse(Values, arguments), key)
        assert found == value
        assert type(found) is type(value)
    if isinstance(value, list | tuple):
        assert [type(item) for item in found] == [type(item) for item in value]


@pytest.mark.parametrize(("key", "texts"), [
    ("flag", ["1", "null", "[true]"]), ("rate", ["true", "null", "abc", "[1]"]), ("count", ["1e3", "1.0", "true", ""]),
    ("size", ["true", "1.5", "None"]), ("part", ["x", "false"]),
    ("pair", ["[1]", "[1, 2, 3]", "[a, b]", "[true, 1]", "1"]),
    ("names", ["a", "[1]", "null"]), ("steps", ["[a]", "1"]), ("when", ["x", "null"]), ("stage", ["3", "1.0", "true"]),
    ("kind", ["c", "true"]),
])  # fmt: skip
def test_values_of_another_type(tmp_path, capsys, key, texts):
    for text in texts:
        (tmp_path / "c.yaml").write_text(f"{key}: {text}\n")
        for arguments in (["--config", f"{tmp_path}/c.yaml"], [f"--{key}={text}"], [f"--{key}", text]):
            with pytest.raises(SystemExit) as ended:
                parse(Values, arguments)
            assert ended.value.code == 2
            assert f"{key} = " in capsys.readouterr().err


@pytest.mark.parametrize("text", ["5", "true", "no", "[1]", "1e-3", "a: b", "-x", "#"])
def test_text_on_the_command_line_is_not_yaml(text):
    assert parse(Values, ["--text", text]).text == text
    assert parse(Values, [f"--name={text}"]).name == text


def test_print_config_reads_back_the_same(tmp_path, capsys):
    arguments = ["--model.preset", "gpt_124m", "--optimizer.betas", "[0.8,0.9]", "--run_name", "5"]
    with pytest.raises(SystemExit) as ended:
        parse(Config, [*arguments, "--print_config"])
    assert ended.value.code == 0
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    assert parse(Config, ["--config", f"{tmp_path}/c.yaml"]) == parse(Config, arguments)


def test_help_shows_what_each_setting_means(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(Config, ["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Samples per optimizer step over all ranks" in text
    assert "Peak learning rate" in text


def test_form_of_the_help(launch):
    text = launch("ddp/train.py", "--help", nproc=0, env={"COLUMNS": "120"}).stdout
    lines = text.splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 120
    assert lines[:2] == ["usage: ddp/train.py [settings]", "example: ddp/train.py --config FILE --train.steps 50"]
    assert "Literal" not in text
    assert "CONFIG" not in text
    groups = ["train", "batch", "optimizer", "model", "data", "checkpoint", "more settings"]
    assert [line.partition(":")[0] for line in lines[3:] if line and not line.startswith(" ")] == groups

    def names(tree, prefix=""):
        for key, value in tree.items():
            yield from names(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]

    shown = [line.split()[0] for line in lines if line.startswith("  --")]
    assert sorted(shown) == sorted(["--config", "--print_config", *(f"--{name}" for name in names(to_dict(Config())))])
    assert "--optimizer.betas  list of 2 numbers; default [0.9, 0.95]. " in text
    assert "--train.precision  one of fp32, bf16, fp16, fp64; default fp32. " in text
    assert "--model.width  whole number or null; default from the preset. " in text


def test_help_of_a_class_without_docstring_shows_no_signature(capsys):
    with pytest.raises(SystemExit):
        parse(Values, ["--help"])
    text = capsys.readouterr().out
    assert "\nsettings:\n  --flag  true or false; default false." in text
    assert "  --kind  one of a, b or null; default a." in text
    assert "Literal" not in text


def test_a_sequence_that_the_model_does_not_take_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(Config, ["--model.max_sequence", "64", "--data.sequence_length", "65"])
    assert ended.value.code == 2
    assert "data.sequence_length = 65 cannot work; allowed: at most model.max_sequence = 64" in capsys.readouterr().err
