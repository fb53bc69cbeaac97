"""Settings: what is accepted, and the one line that anything else gets."""

import json
from dataclasses import dataclass, field

import pytest
import yaml

from common.config import Config, RunConfig, parse, to_dict


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
    ("train: {steps: many}", ["c.yaml", "train.steps", "many", "int"]),
    ("train: {steps: 0}", ["c.yaml", "train.steps = 0", "at least 1"]),
    ("train: {precision: fp8}", ["c.yaml", "train.precision", "fp8", "'fp32', 'bf16', 'fp16', 'fp64'"]),
    ("batch: {global_size: -1}", ["c.yaml", "batch.global_size = -1", "at least 1"]),
    ("optimizer: {betas: [0.9, 2]}", ["c.yaml", "optimizer.betas", "2.0"]),
    ("model: {preset: tinny}", ["c.yaml", "model.preset", "tinny", "did you mean tiny"]),
    ("model: {heads: 7}", ["c.yaml", "model.heads 7", "128"]),
    ("data: {source: tokens}", ["c.yaml", "data.source", "data.path"]),
    ("run_name: ../up", ["c.yaml", "run_name", "../up"]),
    ("train: [", ["c.yaml", "not valid YAML"]),
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
    (["--train.steps", "3.5"], ["train.steps = 3.5", "int"]),
    (["--model.layers", "abc"], ["model.layers = abc", "int, null"]),
    (["--train.steps"], ["train.steps", "expected one argument"]),
    (["--config", "nowhere.yaml"], ["nowhere.yaml", "does not exist"]),
    (["stray"], ["stray"]),
    (["--timeout_s", "0"], ["timeout_s = 0"]),
    (["--device", "tpu"], ["device", "tpu", "'auto', 'cpu', 'cuda'"]),
])  # fmt: skip
def test_wrong_command_line(capsys, arguments, words):
    line = error_line(capsys, *arguments)
    assert all(word in line for word in words), line


def test_help_shows_what_each_setting_means(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(Config, ["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Samples per optimizer step over all ranks" in text
    assert "Peak learning rate" in text
