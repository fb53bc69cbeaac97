"""The saving benchmark: every way writes the state of the moment of asking, and one that does not is found out."""

import json
import sys
from pathlib import Path

import pytest
import torch
from launching import SCRIPTS, assert_refused

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import saving  # noqa: E402  (needs the path above)

FEW = ["synchronous", "fresh-copy", "thread"]
TENSORS = 1 + 9 * 2 + 2  # of the mini model: embedding, two blocks, norm and head


@pytest.mark.parametrize(
    ("nproc", "ways"),
    [(2, FEW), pytest.param(3, list(saving.WAYS), marks=pytest.mark.slow)],  # a process to write starts slowly
)
def test_every_way_writes_the_state_of_the_moment_of_asking(group, launch, tmp_path, nproc, ways) -> None:
    file, folder = tmp_path / "result.json", tmp_path / "disk"
    options = ["--size=mini", "--rounds=1", f"--folder={folder}", f"--output={file}", "--ways", *ways]
    if nproc == 2:
        printed = "".join(group(2)(SCRIPTS.printed, "benchmarks/saving.py", options))
    else:  # daemonic processes, as those of a group are, may not start the process that writes
        printed = launch("benchmarks/saving.py", *options, nproc=nproc).stdout
    result = json.loads(file.read_text())
    assert [row["way"] for row in result["rows"]] == ways and result["world_size"] == nproc
    assert result["saves"] == 2 * len(ways)  # the first round is to warm up; each save was compared, or we are not here
    # Weights and two moments of 4 bytes, and for each parameter AdamW's count of steps, on every rank.
    assert sum(result["shard_bytes"]) == 12 * result["parameters"] + 4 * TENSORS * nproc
    for row in result["rows"]:
        asynchronous = row["way"] != "synchronous"
        # Each rank its shards, and what describes them; the counts of steps, equal on all ranks, are written by one.
        sizes = zip(row["bytes_by_rank"], result["shard_bytes"], strict=True)
        assert all(size > tensors - 4 * TENSORS for size, tensors in sizes)
        assert (row["steps_meanwhile"] >= 1) == asynchronous == (row["step_meanwhile_seconds"] is not None)
        assert (row["copied_after_seconds"] is not None) == (row["way"] in ("thread", "process"))
        parts = [row[f"{part}_seconds"]["median"] for part in ("collecting", "calling", "before_step")]
        assert row["waiting_seconds"]["median"] <= sum(parts) + 1e-9  # by rank the sum, of each part the greatest
        assert row["waiting_seconds"]["median"] >= max(parts)
    assert result["rows"][0]["of_synchronous"]["median"] == 1.0
    assert not list(folder.iterdir())
    assert printed.count("| way |") == 1  # rank 0 alone prints
    assert f"all {2 * len(ways)} saves were read again" in printed
    assert str(tmp_path) not in json.dumps(result)


# A stager that copies late: forward and backward are over by then, and the optimizer step must not be. And one that
# copies all but one bit.
STAGERS = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
sys.path.insert(0, {benchmarks!r})
sys.modules.pop("saving", None)  # that of the test before has another stager
import torch
import saving
pool = ThreadPoolExecutor(1)
class Late(saving.DefaultStager):
    def stage(self, state):
        def copy():
            time.sleep(1.0)
            return super(Late, self).stage(state).result()
        return pool.submit(copy)
class Wrong(saving.DefaultStager):
    def stage(self, state):
        copy = super().stage(state)
        moment = saving.leaves(copy)[".optimizer.state.norm.weight.exp_avg"]
        moment[0] = torch.nextafter(moment[0], torch.tensor(9.0))
        return copy
saving.DefaultStager = {stager}
saving.main()
"""


def save_with(group, tmp_path, stager: str, way: str) -> tuple[int, str]:
    """Exit code, and what it wrote to stderr."""
    script = tmp_path / "stagers.py"
    script.write_text(STAGERS.format(benchmarks=str(ROOT / "benchmarks"), stager=stager))
    options = ["--size=mini", "--rounds=1", "--ways", way, f"--output={tmp_path}/result.json"]
    (ended,) = group(1)(SCRIPTS.ends, str(script), [*options, f"--folder={tmp_path}/runs"])
    return ended


def test_the_optimizer_step_waits_for_the_copy(group, tmp_path) -> None:
    """A copy that begins a second late still holds the state of the moment of asking: nothing has changed it before."""
    code, stderr = save_with(group, tmp_path, "Late", "thread")
    assert code == 0, stderr
    (row,) = json.loads((tmp_path / "result.json").read_text())["rows"]
    # Not a speed: the copy sleeps a second, which forward and backward of this model do not last.
    assert 0 < row["before_step_seconds"]["median"] < row["copied_after_seconds"]["median"]


def test_one_wrong_bit_is_found_out(group, tmp_path) -> None:
    ended = save_with(group, tmp_path, "Wrong", "kept-copy")
    words = "kept-copy: the files do not hold .optimizer.state.norm.weight.exp_avg as it was (1 such problem)"
    assert_refused([ended], words)
    assert not (tmp_path / "result.json").exists()
    assert not list((tmp_path / "runs").iterdir())


def test_what_differs_is_named() -> None:
    state = {"model": {"a": torch.tensor([1.0, 2.0])}, "groups": [{"lr": 0.1, "betas": (0.9, 0.95)}]}
    same = saving.copy_of(state)
    assert saving.differing(state, same) == []
    same["model"]["a"][1] = torch.nextafter(same["model"]["a"][1], torch.tensor(9.0))
    same["groups"][0]["lr"] = 0.2
    assert saving.differing(state, same) == [".groups.0.lr", ".model.a"]
    assert state["model"]["a"][1] == 2.0  # the copy has memory of its own
    assert saving.differing(state, {"model": state["model"]}) == [".groups.0.betas", ".groups.0.lr"]
    unread = saving.copy_of(state, fill=float("nan"))
    assert saving.differing(unread, saving.copy_of(unread)) == [".model.a"]  # a tensor that nothing was read into


def saved(waiting: float, steps: list[float], quiet: list[float]) -> saving.Saved:
    parts = (0.25 * waiting, 0.5 * waiting, 0.25 * waiting, waiting)
    return saving.Saved(*parts, copied_after=None, written_after=9.0, steps=steps, quiet_steps=quiet, bytes_by_rank=[7])


def test_shares_are_taken_within_a_round() -> None:
    """The third round is ten times slower, which changes no share; what is lost is the waiting and the slower steps."""
    rounds = [
        {"synchronous": saved(4.0 * k, [], [1.0 * k] * 2), "thread": saved(0.2 * k, [1.5 * k, 1.1 * k], [1.0 * k] * 2)}
        for k in (1, 1, 10)
    ]
    synchronous, thread = saving.summarize(rounds, rounds[2])
    assert thread["of_synchronous"] == pytest.approx({"median": 0.05, "lower_quartile": 0.05, "upper_quartile": 0.05})
    assert synchronous["waiting_seconds"]["median"] == 4.0 and thread["waiting_seconds"]["median"] == 0.2
    assert thread["lost_seconds"]["median"] == pytest.approx(0.2 + 0.5 + 0.1, rel=1e-12)
    assert synchronous["lost_seconds"]["median"] == 4.0 and synchronous["step_meanwhile_seconds"] is None
    assert thread["steps_meanwhile"] == 2.0 and thread["first_waiting_seconds"] == 2.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds 0 cannot work; allowed: 1 or more"),
        (["--ways", "thread", "thread"], "--ways thread thread names one twice; give each once"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        saving.parse_arguments(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error and error.count("\n") == 1


def test_a_folder_that_cannot_be_made_is_one_line(group, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    answers = group(2)(SCRIPTS.ends, "benchmarks/saving.py", ["--size=mini", f"--folder={tmp_path}/file"])
    assert_refused(answers, "choose a folder where you can write")
    assert all("error: --folder " in message for _, message in answers)
