"""What lies where is as the papers say, byte by byte where nothing is padded; offload does not change the training."""

import fcntl
import json
import re
import sys
from pathlib import Path

import pytest
from launching import ROOT, OnRanks, assert_refused, run_command

SCRIPT = "deepspeed/zero_offload.py"
ON_RANKS = OnRanks("tests/deepspeed/deepspeed_on_ranks.py")
# Each group of the optimizer has a number of elements that ranks and alignment divide: no padding in any stage.
SMALL = ["--model.width", "64", "--model.ffn_width", "128", "--model.layers", "1", "--steps", "1"]


def number(text: str) -> int:
    return int(text.replace(",", ""))


def tables(printed: str) -> dict[str, dict[tuple[str, str], list[int]]]:
    """By the title of a case: (place, role) -> bytes before the step, after backward and after the step."""
    found = {}
    for part in printed.split("\n\nZeRO")[1:]:
        rows = re.findall(r"^  (device|host|pinned|disk) +([a-z]+) +([\d,]+) +([\d,]+) +([\d,]+)", part, re.MULTILINE)
        found["ZeRO" + part.splitlines()[0]] = {(r[0], r[1]): [number(value) for value in r[2:]] for r in rows}
    return found


def parameter_count(printed: str) -> int:
    return number(re.search(r"Ψ = ([\d,]+) parameters", printed)[1])


def loss_of(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"; loss ([\d.]+) in step", printed)]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_bytes_by_place(group, tmp_path, ranks):
    printed = ""
    for case in ("zero2", "zero2_cpu", "zero3_cpu"):
        printed += "\n" + group(ranks)(ON_RANKS.printed, SCRIPT, [*SMALL, "--case", case])[0]
    count, n = parameter_count(printed), ranks
    plain, optimizer_in_host, all_in_host = tables(printed).values()
    # The first step makes Adam's two averages, 8 bytes a parameter, and two step counters of 4 bytes.
    optimizer = [4 * count // n, 4 * count // n, 12 * count // n + 8]

    assert plain["device", "parameters"] == [2 * count] * 3
    before, gradients, after = plain["device", "gradients"]
    assert (before, after) == (0, 0)
    # Of the parameter that the border between two ranks cuts, both keep the whole gradient: at most the embedding's.
    assert 2 * count // n <= gradients <= 2 * count // n + 2 * 256 * 64
    assert plain["device", "optimizer"] == optimizer
    assert {place for place, _ in plain} == {"device"}

    assert optimizer_in_host["device", "parameters"] == [2 * count] * 3
    assert optimizer_in_host["host", "optimizer"] == optimizer
    # DeepSpeed keeps offloaded gradients in fp32, where the paper counts 2 bytes, and keeps them after the step.
    assert optimizer_in_host["host", "gradients"] == [4 * count // n] * 3
    assert {role for place, role in optimizer_in_host if place == "device"} == {"parameters", "buffers"}

    assert all_in_host["host", "parameters"] == [2 * count // n] * 3
    assert all_in_host["host", "optimizer"] == optimizer
    assert all_in_host["host", "gradients"] == [(4 + 2) * count // n] * 3  # and once more in bf16
    assert {role for place, role in all_in_host if place == "device"} == {"buffers"}

    # Beside the bytes stands what the papers count: their formula, and its value.
    papers = re.findall(r"^  (?:device|host) +(?:[a-z]+)(?: +[\d,]+){3} +([\d,]+)  (.+)$", printed, re.MULTILINE)
    values = {"2 Ψ": 2 * count, "2 Ψ/n": 2 * count // n, "12 Ψ/n": 12 * count // n}
    assert [words for _, words in papers] == [
        "2 Ψ", "2 Ψ/n", "12 Ψ/n", "2 Ψ", "2 Ψ/n", "12 Ψ/n", "2 Ψ/n", "2 Ψ/n", "12 Ψ/n",
    ]  # fmt: skip
    assert all(number(value) == values[words] for value, words in papers)

    first, *others = loss_of(printed)
    # bf16: gradients are summed in other buckets, and rounded to 8 bits each time; the loss is about 5.
    assert all(abs(loss - first) <= 2e-2 for loss in others)


def test_each_rank_has_its_own_text(group):
    """Equal text on all ranks would be one sample, computed twice."""
    one, two = group(2)(ON_RANKS.drawn, SCRIPT, [*SMALL, "--case", "zero2"])
    assert one != two


@pytest.mark.parametrize(("options", "words"), [
    (["--steps", "0"], "steps = 0 cannot work"),
    (["--sequence_length", "100000"], "sequence_length = 100000 cannot work"),
    (["--case", "zero4"], "case = zero4 has the wrong type or value"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)  # fmt: skip
def test_bad_input(group, options, words):
    for code, message in group(2)(ON_RANKS.ends, SCRIPT, options):
        assert code == 2
        assert words in message


@pytest.mark.parametrize("script", ["deepspeed/zero_offload.py", "deepspeed/inference.py"])
def test_plain_python(group, script):
    """One process, to which no launcher has given a rank: DeepSpeed by itself ends for want of LOCAL_RANK."""
    if script != SCRIPT:
        group.stop()  # after another engine this one may answer wrongly
    small = [*SMALL, "--case", "zero2"] if script == SCRIPT else ["--model.width", "32", "--tokens", "2"]
    (printed,) = group(1)(ON_RANKS.by_plain_python, script, small)
    assert "tokens, the same: " in printed or parameter_count(printed)


def locked_folder(root: Path) -> Path:
    """Where torch builds async_io under TORCH_EXTENSIONS_DIR, with the lock that a build leaves."""
    folder = root / "async_io"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    return folder


def nvme(tmp_path, *options, check=True, timeout=60, **environment):
    more = {"DEVICE": "cpu", "TMPDIR": str(tmp_path)} | environment
    return run_command([sys.executable, str(ROOT / SCRIPT), *options], timeout, check, **more)


def test_a_build_under_way_is_not_waited_for(group, tmp_path):
    folder = locked_folder(tmp_path)
    options = ["--case", "zero3_nvme", *SMALL]
    with (folder / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ended = group(2)(ON_RANKS.ends, SCRIPT, options, {"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    assert_refused(ended, "async_io/lock is held: another process is building this extension now")
    # The lock file of a build that was killed is held by nothing: what is missing is said instead.
    ended = group(2)(ON_RANKS.ends, SCRIPT, options, {"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    assert_refused(ended, "async_io")
    assert all("lock" not in message for _, message in ended)


@pytest.mark.slow
def test_a_build_under_way_is_named_and_not_waited_for(tmp_path):
    folder = locked_folder(tmp_path / "extensions")
    options = ["--case", "zero3_nvme", *SMALL]
    training = [sys.executable, "deepspeed/train.py", "--deepspeed_config", "deepspeed/configs/zero3_nvme_offload.json"]
    where = {"TMPDIR": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    with (folder / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = nvme(tmp_path, *options, check=False, TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
        trained = run_command(training, 60, check=False, DEVICE="cpu", **where)
    for each in (done, trained):
        assert each.returncode == 2
        assert "async_io/lock is held: another process is building this extension now" in each.stderr
    # The lock file of a build that was killed is nobody's any more: what is missing is said instead.
    done = nvme(tmp_path, *options, check=False, TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1
    assert re.search("is not built; build it once|libaio with its headers is missing|no C\\+\\+ compiler", lines[0])


@pytest.mark.slow
def test_nvme(launch, tmp_path):
    """Parameters, gradients and optimizer state that are large enough go to disk, and the training stays the same."""
    wide = ["--model.width", "1024", "--model.ffn_width", "1024", "--model.layers", "1", "--model.kv_heads", "8"]
    done = launch(SCRIPT, *wide, "--steps", "1", "--nvme_path", tmp_path / "swap", timeout=300)
    if missing := re.search(r"zero3_nvme is left out: (.*)", done.stdout):
        pytest.skip(f"NVMe offload: {missing[1]}")
    printed, swapped = done.stdout, list(tables(done.stdout).values())[-1]
    count = parameter_count(printed)
    # DeepSpeed leaves what is smaller than 1 MiB in memory: embedding, head and norms, a 20th of this model.
    for role, size in (("parameters", 2), ("gradients", 4), ("optimizer", 12)):
        assert 0.9 * size * count / 2 <= swapped["disk", role][-1] <= size * count / 2
    for role, size in (("parameters", 2), ("optimizer", 12)):
        assert swapped["host", role][-1] <= 0.1 * size * count / 2
    assert abs(loss_of(printed)[-1] - loss_of(printed)[-2]) <= 2e-2  # beside ZeRO-3 in memory, in bf16
    assert not list((tmp_path / "swap").iterdir())  # swap files are gone


@pytest.mark.slow
def test_train_with_everything_on_disk(launch, tmp_path):
    """train.py with the file for NVMe: the losses of stage 3 in memory, and a checkpoint to go on from in memory."""
    options = ["--train.steps", "3", "--runs_dir", tmp_path, "--nvme_path", tmp_path / "swap"]
    losses, last = [], []
    # DeepSpeed begins by removing what lies here, which may be another job's parameters.
    other = tmp_path / "swap" / "zero_stage_3" / "float32params" / "rank0" / "0_param.tensor.swp"
    other.parent.mkdir(parents=True)
    other.touch()
    for name in ("zero3", "zero3_nvme_offload"):
        more = ["--run_name", name, "--deepspeed_config", f"deepspeed/configs/{name}.json"]
        done = launch("deepspeed/train.py", *options, *more, timeout=250, check=False)
        if missing := re.search(r"error: \S+: (.*async_io.*)", done.stderr):
            pytest.skip(f"NVMe offload: {missing[1]}")
        assert done.returncode == 0, done.stderr[-4000:]
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert other.exists()
    assert [path.name for path in (tmp_path / "swap").iterdir()] == ["zero_stage_3"]  # our own are gone
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)  # fp32
    for name in ("zero3", "zero3_nvme_offload"):
        more = ["--run_name", name, "--deepspeed_config", "deepspeed/configs/zero3_cpu_offload.json"]
        done = launch("deepspeed/train.py", *options, *more, "--train.steps", "4", timeout=250)
        assert f"resumed from {tmp_path / name}/checkpoints/step_3: 3 steps done" in done.stdout
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        last.append(next(row["loss"] for row in rows if "loss" in row and row["step"] == 3))
    assert last[1] == pytest.approx(last[0], abs=1e-5)
