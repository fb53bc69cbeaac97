"""The run record: what is counted, when it is read, and what the folder is called."""

import json
import statistics

import pytest
from launching import OnRanks

ON_RANKS = OnRanks("tests/common/run_on_ranks.py")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_logged_loss_is_the_sum_over_ranks_divided_by_the_units(group, tmp_path, size):
    group(size)(ON_RANKS.log_five_steps, str(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # Rank r contributes (r + 1) x (step + 1); there are 10 units in a step.
    assert [row["loss"] for row in rows] == [sum(range(1, size + 1)) * (step + 1) / 10 for step in range(5)]
    assert [row["tokens"] for row in rows] == [10, 20, 30, 40, 50]


def test_one_collective_a_step_read_one_step_late(group, tmp_path):
    calls, rows_seen = group(2)(ON_RANKS.count_collectives, str(tmp_path))[0]
    assert calls == [1] * 5  # all-reduces that Run itself starts in each step
    assert rows_seen == [0, 1, 2, 3, 4]  # rows known when step k has been logged: those before it


@pytest.mark.parametrize("who", [0, 1, 2])
def test_a_wish_to_stop_on_one_rank_stops_all_at_the_same_step(group, tmp_path, who):
    assert group(3)(ON_RANKS.steps_until_stopped, str(tmp_path), who, 4) == [6, 6, 6]  # asked in step 4, read in step 5


def test_names_are_unique_and_hold_the_job(group, tmp_path):
    names = {group(2)(ON_RANKS.folder_name, str(tmp_path), {})[0] for _ in range(3)}
    assert len(names) == 3
    a, b = group(2)(ON_RANKS.folder_name, str(tmp_path), {"SLURM_JOB_ID": "17"})
    assert a == b
    assert a.endswith("-job17")  # a requeued job finds its run again


def begin_or_go_on(group, folder, *arguments, size=2, environment=None, fingerprint="fingerprint"):
    """What one rank says: [first step, folder's name], or [exit code, message]; all must say the same."""
    answers = group(size)(ON_RANKS.begin_or_go_on, str(folder), list(arguments), environment, fingerprint)
    assert all(answer[0] == answers[0][0] for answer in answers)
    return answers[0]


NAMED = ["--run_name", "run", "--train.steps"]


def test_a_run_from_a_checkpoint_of_another_goes_on_with_its_own(group, tmp_path):
    """A job with resume = PATH starts there; requeued with the same command, it goes on from where it was."""
    assert begin_or_go_on(group, tmp_path, *NAMED, "2") == [0, "run"]
    branch = ["--run_name", "branch", "--resume", str(tmp_path / "run")]
    assert begin_or_go_on(group, tmp_path, *branch, "--train.steps", "4") == [2, "branch"]
    assert begin_or_go_on(group, tmp_path, *branch, "--train.steps", "6") == [4, "branch"]
    code, message = begin_or_go_on(group, tmp_path, *branch, "--train.steps", "8", fingerprint="another")
    assert code == 2
    assert "was made with other data" in message


def test_a_run_cannot_begin_in_its_own_past(group, tmp_path):
    begin_or_go_on(group, tmp_path, *NAMED, "4", "--checkpoint.every", "2")
    code, message = begin_or_go_on(group, tmp_path, *NAMED, "6", "--resume", str(tmp_path / "run/checkpoints/step_2"))
    assert code == 2
    assert "lies in the folder of this very run" in message
    assert begin_or_go_on(group, tmp_path, *NAMED, "6") == [4, "run"]  # what it had is still there


def test_other_data_are_refused_and_other_ways_to_read_them_are_not(group, tmp_path):
    begin_or_go_on(group, tmp_path, *NAMED, "2")
    code, message = begin_or_go_on(group, tmp_path, *NAMED, "4", fingerprint="another")
    assert code == 2
    assert "was made with other data (fingerprint fingerprint, now another)" in message
    code, message = begin_or_go_on(group, tmp_path, *NAMED, "4", "--data.sequence_length", "64")
    assert code == 2
    assert "was made with other settings of data;" in message
    assert begin_or_go_on(group, tmp_path, *NAMED, "4", "--data.validation_samples", "9") == [2, "run"]


def test_a_second_run_in_a_slurm_job_needs_a_name(group, tmp_path):
    job = {"SLURM_JOB_ID": "17"}
    first, name = begin_or_go_on(group, tmp_path, "--train.steps", "2", environment=job)
    code, message = begin_or_go_on(group, tmp_path, "--train.steps", "2", environment=job)
    assert (first, code) == (0, 2)
    assert f"has a run {tmp_path / name} already; name the second with --run_name" in message
    requeued = job | {"SLURM_RESTART_COUNT": "1"}
    assert begin_or_go_on(group, tmp_path, "--train.steps", "4", environment=requeued) == [2, name]


def test_without_git(group, tmp_path):
    assert begin_or_go_on(group, tmp_path, *NAMED, "2", environment={"PATH": str(tmp_path)}) == [0, "run"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["git_commit"] is None


def test_the_speed_is_that_of_the_ranks_now(group, tmp_path):
    """The steps of an attempt on more ranks do not count in that of the next on fewer."""
    begin_or_go_on(group, tmp_path, *NAMED, "3", size=2)
    begin_or_go_on(group, tmp_path, *NAMED, "6", size=1)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert record["tokens_per_second"] == statistics.median(row["tokens_per_second"] for row in rows[4:])


def test_the_record_says_what_ran(group, tmp_path):
    group(2)(ON_RANKS.log_five_steps, str(tmp_path))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["framework"], record["strategy"], record["world_size"], record["mesh"]) == (
        "torch",
        "test",
        2,
        {"dp_replicate": 2, "dp_shard": 1, "tp": 1, "pp": 1, "cp": 1, "ep": 1},
    )
    assert record["data_fingerprint"] == "fingerprint"
    assert (record["status"], record["steps_done"]) == ("finished", 5)
    assert record["versions"].keys() == {"python", "torch", "numpy"}


@pytest.mark.parametrize(("flops", "peak"), [(None, None), (6e6, None), (6e6, 1e12)])
def test_utilisation_in_the_record(group, tmp_path, flops, peak):
    """Speed without the first step; the model's FLOP/s on each of two ranks, and what part of the peak that is."""
    group(2)(ON_RANKS.log_five_steps, str(tmp_path), flops, peak)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rate = statistics.median(row["tokens_per_second"] for row in rows[1:] if "loss" in row)
    assert record["tokens_per_second"] == rate
    each = flops and rate * flops / 2
    assert record["model_flops_per_second_per_rank"] == each
    assert record["mfu"] == (pytest.approx(each / peak) if peak else None)


def test_tensorboard_gets_the_curve(group, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    group(1)(ON_RANKS.log_five_steps, str(tmp_path), None, None, ["--tensorboard", "true"])
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [0, 4]  # the steps that are printed


def test_a_loss_that_is_not_a_number_ends_all_ranks(group, tmp_path):
    for code, line in group(2)(ON_RANKS.log_nan, str(tmp_path)):
        assert code == 2
        assert "the loss is nan at step 2" in line
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3


@pytest.mark.parametrize(("how", "who"), [("SIGINT", 0), ("SIGTERM", 1), ("SIGUSR1", 1), ("stop", 0)])
def test_signals_and_the_stop_file_stop_all_at_the_same_step(group, tmp_path, how, who):
    """A signal in step 2 on any rank is read in step 3; the file is seen in step 0. The old handlers come back."""
    expected = 2 if how == "stop" else 4
    assert group(2)(ON_RANKS.steps_until_told, str(tmp_path), how, who) == [(expected, True)] * 2
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record["steps_done"]) == ("stopped", expected)


def test_what_a_step_draws_depends_on_seed_step_and_rank_alone(group, tmp_path):
    """Dropout differs by rank and by step, and goes on after a resume with what it would have drawn."""
    whole = group(3)(ON_RANKS.what_is_drawn, str(tmp_path / "whole"), 4)
    drawn = [number for by_step in whole for number in by_step.values()]
    assert len(set(drawn)) == 3 * 4
    group(3)(ON_RANKS.what_is_drawn, str(tmp_path / "cut"), 2)
    after = group(3)(ON_RANKS.what_is_drawn, str(tmp_path / "cut"), 4)
    assert after == [{step: by_step[step] for step in (2, 3)} for by_step in whole]


def test_every_piece_of_state_is_there_after_a_resume(group, tmp_path):
    """Weights, both moments and step count of AdamW, scale and growth of the scaler, steps done."""
    [whole] = group(1)(ON_RANKS.state_after, str(tmp_path), 4, "whole")
    [cut] = group(1)(ON_RANKS.state_after, str(tmp_path), 2, "cut")
    [resumed] = group(1)(ON_RANKS.state_after, str(tmp_path), 4, "resumed", str(tmp_path / "cut"))
    assert (cut[:2], resumed[:2]) == ((0, 2), (2, 4))
    assert cut[2]["_growth_tracker"] == 2  # the third step of a run doubles the scale
    assert whole[2]["scale"] == 16.0
    assert whole[3]["weight.step"] == 4.0
    assert resumed[2:] == whole[2:]
    rows = [json.loads(line) for line in (tmp_path / "resumed" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3]


def test_a_resumed_record_holds_each_step_once(group, tmp_path):
    """Rows after the checkpoint are of an attempt that died; what it evaluated after the last step saved stays."""
    begin_or_go_on(group, tmp_path, *NAMED, "2")
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    more = [{"step": 2, "val_loss": 5.0}, {"step": 2, "loss": 4.0}, {"step": 3, "val_loss": 4.0}]
    torn = '{"step": 3, "los'
    metrics.write_text("\n".join([*lines, *map(json.dumps, more), torn]))
    assert begin_or_go_on(group, tmp_path, *NAMED, "4") == [2, "run"]
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [(row["step"], "loss" in row) for row in rows] == [(0, True), (1, True), (2, False), (2, True), (3, True)]
    assert rows[3]["loss"] != 4.0


@pytest.mark.parametrize(("every", "expected"), [(2, [2, 4, 5]), (5, [5]), (0, [])])
def test_replicas_are_checked_as_often_as_asked_and_at_the_end(group, tmp_path, every, expected):
    """The last check alone sees what went wrong after the one before it."""
    assert group(2)(ON_RANKS.when_replicas_are_checked, str(tmp_path), every) == [expected] * 2


def test_the_file_that_a_job_names_stops_the_run(group, tmp_path):
    """STOP_FILE, made by the job when Slurm takes the nodes away; the run does not remove it."""
    (tmp_path / "taken").touch()
    assert group(2)(ON_RANKS.steps_with_stop_file, str(tmp_path), str(tmp_path / "taken")) == [2, 2]
    assert (tmp_path / "taken").exists()


@pytest.mark.parametrize(("key", "value", "section"), [
    ("seed", "5", "seed"), ("model.layers", "1", "model"), ("batch.global_size", "12", "batch.global_size"),
])  # fmt: skip
def test_settings_that_must_match(group, tmp_path, key, value, section):
    """With another seed a run would go on with other data."""
    begin_or_go_on(group, tmp_path, *NAMED, "2")
    code, message = begin_or_go_on(group, tmp_path, *NAMED, "4", f"--{key}", value)
    assert code == 2
    assert f"was made with other settings of {section};" in message
