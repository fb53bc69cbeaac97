"""Whatever fails in the evaluation after the last step: the training is saved, and a new start evaluates alone."""

import pytest
from equality import SMALL, read_rows, read_validation
from launching import SCRIPTS, OnRanks, assert_refused

DEEPSPEED = OnRanks("tests/deepspeed/deepspeed_on_ranks.py")
DIGITS = ["--model.name", "small_cnn", "--batch.global_size", "8"]
QUESTIONS = ["--data.validation_samples", "4", "--data.answer_length", "4", "--export", "false"]
QUESTIONS += ["--batch.global_size", "4"]

LESSONS = [
    ("ddp/train.py", 2, SMALL),
    ("ddp/single_device.py", 1, SMALL),
    ("fsdp/train.py", 2, SMALL),
    ("model_parallel/pipeline_parallel.py", 2, [*SMALL, "--batch.micro_size", "6"]),
    ("lightning/train.py", 2, SMALL),
    *(pytest.param(*lesson, marks=pytest.mark.slow) for lesson in (
        ("ddp/train_vision.py", 2, DIGITS),
        ("from_scratch/train.py", 2, SMALL),
        ("from_scratch/train.py", 2, [*SMALL, "--strategy", "pipeline", "--batch.micro_size", "6"]),
        ("model_parallel/tensor_parallel.py", 2, SMALL),
        ("model_parallel/context_parallel.py", 2, SMALL),
        ("model_parallel/expert_parallel.py", 2, SMALL),
        ("model_parallel/hybrid_parallel.py", 4, [*SMALL, "--mesh.dp", "1", "--batch.micro_size", "6"]),
        ("lightning/train_vision.py", 2, DIGITS),
        ("lightning/fabric_loop.py", 2, SMALL),
        ("deepspeed/train.py", 2, SMALL),
        ("fsdp/finetune.py", 2, QUESTIONS),
        ("deepspeed/finetune.py", 2, QUESTIONS),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("script", "ranks", "options"), LESSONS)
def test_every_lesson(group, tmp_path, script, ranks, options):
    """The first attempt ends in its last evaluation; the second makes no step, and records what the first should."""
    run = DEEPSPEED if script == "deepspeed/train.py" else SCRIPTS
    given = [*options, "--train.steps", "2", "--runs_dir", str(tmp_path), "--run_name"]
    assert_refused(group(ranks)(run.fails_in_evaluation, script, [*given, "run"]), "the evaluation failed")
    assert read_validation(tmp_path / "run") == {}
    whole = "checkpoint-2/complete.json" if script == "deepspeed/finetune.py" else "step_2/manifest.json"
    assert (tmp_path / "run" / "checkpoints" / whole).is_file()
    printed = group(ranks)(run.printed, script, [*given, "run"])[0]
    assert "resumed from" in printed and "nothing to do" not in printed and "finished after 2 of 2" in printed
    group(ranks)(run.train, script, [*given, "whole"])
    assert read_validation(tmp_path / "run") == pytest.approx(read_validation(tmp_path / "whole"), rel=1e-5)
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [0, 1]
