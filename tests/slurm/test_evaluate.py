"""slurm/evaluate.py: the loss that a run of any lesson reported, and one line for a run of another kind."""

import json

import pytest
import yaml
from equality import SMALL, read_validation
from launching import SCRIPTS, assert_refused

from common.config import to_dict
from finetuning.config import FinetuneConfig
from vision.networks import VisionConfig


@pytest.mark.parametrize(("script", "options"), [
    ("fsdp/train.py", ["--fsdp.reshard_after_forward", "false"]),
    ("model_parallel/expert_parallel.py", ["--model.experts", "2"]),
    ("from_scratch/train.py", ["--strategy", "fsdp"]),
])  # fmt: skip
def test_a_run_whose_config_has_sections_of_its_own(group, tmp_path, script, options):
    """In fp64, to the last bits: the run added up the same losses in the same batches."""
    given = ["--train.steps", "2", "--train.precision", "fp64", "--seed", "7", "--runs_dir", str(tmp_path)]
    group(1)(SCRIPTS.train, script, [*SMALL, *given, "--run_name", "run", *options])
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == 7
    group(1)(SCRIPTS.train, "slurm/evaluate.py", [str(tmp_path / "run")])
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert result["val_loss"] == pytest.approx(read_validation(tmp_path / "run")[2], abs=1e-12)
    assert (result["checkpoint"], result["tokens"]) == ("step_2", 25 * 16)


@pytest.mark.parametrize(("config", "key"), [(VisionConfig, "data.augment"), (FinetuneConfig, "data.answer_length")])
def test_one_line_for_another_kind_of_run(group, tmp_path, config, key):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config())))
    answers = group(1)(SCRIPTS.ends, "slurm/evaluate.py", [str(tmp_path)])
    assert_refused(answers, f"config.yaml: {key} is no setting of a transformer that trains on text")
