"""The run record: what is counted, when it is read, and what the folder is called."""

import json
import shlex
import signal
import statistics
import subprocess
import sys

import pytest
import yaml
from launching import ROOT, OnRanks, assert_refused

from common.runs import manifest, records

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


def begin_or_go_on(group, folder, *arguments, size=2, environment=None, fingerprint="fingerprint", **more):
    """What one rank says: [first step, folder's name], or [exit code, message]; all must say the same."""
    options = environment, fingerprint, more.get("optimizer", "SGD"), more.get("norms")
    answers = group(size)(ON_RANKS.begin_or_go_on, str(folder), list(arguments), *options)
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


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("file", ["shards-*/__0_0.distcp", "manifest.json"])
def test_a_damaged_checkpoint_names_one_that_is_whole_and_the_run_can_go_back_to_it(group, tmp_path, file):
    """The newest two have a changed byte: their sizes are right."""
    begin_or_go_on(group, tmp_path, *NAMED, "4", "--checkpoint.every", "1", "--checkpoint.keep", "3")
    checkpoints = tmp_path / "run" / "checkpoints"
    for damaged in (next((checkpoints / "step_4").glob(file)), next((checkpoints / "step_3").glob("shards-*/__0_*"))):
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    code, message = begin_or_go_on(group, tmp_path, *NAMED, "6")
    assert code == 2
    assert f"the newest other one that is whole is step_2: go on with --resume {checkpoints}/step_2" in message
    back = [*NAMED, "6", "--resume", str(checkpoints / "step_2")]
    assert begin_or_go_on(group, tmp_path, *back) == [2, "run"]
    assert [name[:16] for name in names(checkpoints)] == [
        "attempt",
        "set-aside-step_3",
        "set-aside-step_4",
        "step_2",
        "step_6",
    ]
    requeued = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "1"}
    assert begin_or_go_on(group, tmp_path, *back, environment=requeued) == [6, "run"]  # not back again
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["resume"] == "auto"


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


def test_tf32_is_what_the_setting_says(group, tmp_path):
    assert group(1)(ON_RANKS.tf32, str(tmp_path / "a"), ["--train.tf32", "true"]) == [("high", True)]
    assert group(1)(ON_RANKS.tf32, str(tmp_path / "b"), []) == [("highest", False)]


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


@pytest.mark.parametrize(("step", "newest"), [(2, "step_2"), (3, "step_2"), (4, "step_4")])
def test_a_gradient_norm_that_is_not_finite_is_never_saved(group, tmp_path, step, newest):
    """Clipped by inf, the weights are nan: also in the last step before a checkpoint, and of all."""
    saving = [*NAMED, "5", "--checkpoint.every", "2"]
    code, message = begin_or_go_on(group, tmp_path, *saving, norms={step: float("inf")})
    assert code == 2
    assert f"the gradient norm is inf at step {step};" in message
    assert manifest.latest(tmp_path / "run" / "checkpoints").name == newest
    assert "status" not in json.loads((tmp_path / "run" / "run.json").read_text())
    assert begin_or_go_on(group, tmp_path, *saving) == [int(newest[-1]), "run"]


def test_a_step_that_the_scaler_skips_ends_no_run(group, tmp_path):
    assert begin_or_go_on(group, tmp_path, *NAMED, "3", "--train.precision", "fp16", norms={2: float("inf")}) == [
        0,
        "run",
    ]


def test_a_validation_loss_that_is_no_number_is_no_success(group, tmp_path):
    """Not in the last evaluation either; started again, the run evaluates again."""
    for _ in range(2):
        assert_refused(
            group(2)(ON_RANKS.evaluate_to, str(tmp_path), float("nan")), "the validation loss is nan after 3 steps"
        )
    assert "status" not in json.loads((tmp_path / "run" / "run.json").read_text())


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("more", "optimizer", "words"), [
    (["--wandb", "true"], "SGD", "wandb = true needs the package wandb"),
    ([], "AdamW", "is of SGD, this run uses AdamW"),
    (["--seed", "5"], "SGD", "other settings of seed"),
])  # fmt: skip
def test_a_start_that_fails_leaves_the_run_as_it_was(group, tmp_path, more, optimizer, words):
    """Another one may be running: it must not lose its right to commit, nor its rows."""
    begin_or_go_on(group, tmp_path, *NAMED, "4", "--checkpoint.every", "3")
    (tmp_path / "run" / "stop").touch()  # for the one that runs
    before = content(tmp_path / "run")
    code, message = begin_or_go_on(group, tmp_path, *NAMED, "6", *more, optimizer=optimizer)
    assert code == 2 and words in message
    assert content(tmp_path / "run") == before


@pytest.mark.parametrize("damaged", ["config.yaml", "run.json", "metrics.jsonl"])
@pytest.mark.parametrize("by", [b"", b"\0" * 300])
def test_a_run_goes_on_after_a_crash_that_damaged_its_records(group, tmp_path, damaged, by):
    begin_or_go_on(group, tmp_path, *NAMED, "2")
    (tmp_path / "run" / damaged).write_bytes(by)
    assert begin_or_go_on(group, tmp_path, *NAMED, "4", "--seed", "5")[0] == 2  # is refused: the checkpoint knows
    assert begin_or_go_on(group, tmp_path, *NAMED, "4") == [2, "run"]
    assert [row["step"] for row in records.read_rows(tmp_path / "run")] == (
        [2, 3] if damaged[0] == "m" else [0, 1, 2, 3]
    )
    assert records.read_settings(tmp_path / "run")["seed"] == 1234
    assert records.read_record(tmp_path / "run")["status"] == "finished"


def test_without_room_for_a_row_all_stop(group, tmp_path):
    """One line on all ranks, and no torn row."""
    answers = group(2)(ON_RANKS.no_room_from, str(tmp_path), 5)
    assert_refused([ended for ended, _ in answers], "metrics.jsonl cannot be written: ")
    assert [done for _, done in answers] == [7, 7]  # step 4's row is read in 5, the wish to stop in 6
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(4))


def test_changed_settings_of_the_optimizer_are_taken_over_and_said(group, tmp_path):
    options = [*NAMED, "2", "--optimizer.betas", "[0.8, 0.9]"]
    group(1)(ON_RANKS.settings_after_resume, str(tmp_path), options)
    changed = [*NAMED, "4", "--optimizer.betas", "[0.7, 0.6]", "--optimizer.weight_decay", "0.3"]
    [(groups, printed)] = group(1)(ON_RANKS.settings_after_resume, str(tmp_path), changed)
    assert groups == [(0.7, 0.6, 0.3), (0.7, 0.6, 0.0)]
    made = f"changed since {tmp_path}/run/checkpoints/step_2 was made: "
    assert made + "optimizer.betas was [0.8, 0.9], is [0.7, 0.6]; optimizer.weight_decay was 0.1, is 0.3" in printed
    assert records.read_settings(tmp_path / "run")["optimizer"]["betas"] == [0.7, 0.6]


def test_doubles_do_not_become_singles(group, tmp_path):
    begin_or_go_on(group, tmp_path, *NAMED, "2", "--train.precision", "fp64")
    code, message = begin_or_go_on(group, tmp_path, *NAMED, "4")
    assert code == 2 and "was made with other settings of train.precision;" in message


def test_a_branch_with_another_seed_says_so(group, tmp_path):
    begin_or_go_on(group, tmp_path, *NAMED, "2")
    branch = ["--run_name", "branch", "--resume", str(tmp_path / "run"), "--train.steps", "4", "--seed", "5"]
    [(_, printed)] = group(1)(ON_RANKS.printed_of, str(tmp_path), branch, "another")
    assert "seed was 1234, is 5; the data's fingerprint was fingerprint, is another" in printed


def test_the_line_to_go_on_can_be_copied(group, tmp_path):
    runs, named = tmp_path / "a b;c", ["--run_name", "run", "--train.steps", "2"]
    [(_, printed)] = group(1)(ON_RANKS.printed_of, str(runs), named)
    words = shlex.split(next(line for line in printed.splitlines() if line.startswith("  to go on")))[3:]
    assert words[words.index("--config") + 1] == f"{runs}/run/config.yaml"
    [(_, printed)] = group(1)(ON_RANKS.printed_of, str(tmp_path), [*named, "--resume", "never"])
    assert "finished after 2" in printed and "to go on" not in printed


def test_a_link_to_a_folder_that_is_gone(group, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "gone")
    code, message = begin_or_go_on(group, tmp_path, *NAMED, "2")
    assert code == 2 and f"checkpoints is a link to {tmp_path}/gone, which is gone;" in message


@pytest.mark.parametrize(("alone", "times", "code"), [(True, 1, 0), (True, 2, -signal.SIGINT), (False, 2, 0)])
def test_the_first_ctrl_c_says_what_it_does_and_the_second_ends(tmp_path, alone, times, code):
    """In one process; under a launcher, which passes each on to its ranks a second time, it does not."""
    program = (
        "import os, pathlib, signal\n"
        "from common.runs.stopping import StopRequest\n"
        f"wish = StopRequest(pathlib.Path({str(tmp_path)!r}), True, alone={alone})\n"
        f"for _ in range({times}): os.kill(os.getpid(), signal.SIGINT)\n"
        "assert wish.is_set()\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == code
    assert ended.stderr.count("SIGINT: this run saves a checkpoint and ends") == 1
    assert ("once more: it ends at once" in ended.stderr) == alone


def test_what_the_attempt_before_commits_at_the_last_moment_counts(group, tmp_path):
    """Its checkpoint is loaded instead, once it can commit no more: no step is done twice."""
    begin_or_go_on(group, tmp_path, *NAMED, "2")
    assert group(2)(ON_RANKS.committed_meanwhile, str(tmp_path)) == [([4, 5], 7.0)] * 2
