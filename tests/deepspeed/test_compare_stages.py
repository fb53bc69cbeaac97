"""compare_stages.py: which runs it starts, what it reads of them, and the table that it prints."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from launching import ROOT, OnRanks, assert_refused
from own_folder import own_folder

SCRIPT = "deepspeed/compare_stages.py"
ON_RANKS = OnRanks("tests/deepspeed/deepspeed_on_ranks.py")
TOLERANCE = 1e-5  # fp32: sums in another order
GIB = 2**30


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def script():
    """deepspeed/compare_stages.py as a module; it imports no DeepSpeed before it makes a model."""
    spec = importlib.util.spec_from_file_location("compare_stages", ROOT / SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with own_folder(ROOT / SCRIPT):
        spec.loader.exec_module(module)
    return module


# A launcher that trains nothing: it writes what finetune.py would, and holds memory in two processes for a moment.
FAKE = """
import json, pathlib, subprocess, sys
given = dict(zip(sys.argv, sys.argv[1:]))
run = pathlib.Path(given["--runs_dir"], given["--run_name"])
run.mkdir()
(run.parent / f"{run.name}.command").write_text(json.dumps(sys.argv[1:]))
hold = "import time; held = bytearray(2**26); print('holds', flush=True); time.sleep(0.6)"
ranks = [subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) for _ in range(2)]
for rank in ranks:
    rank.stdout.readline()
speeds = [1.0, 20.0, 40.0, 30.0]
rows = [{"step": step, "loss": 5.0 - step, "samples_per_second": speeds[step]}
        for step in range(int(given["--train.steps"]))]
rows.append({"step": len(rows), "val_loss": 1.0})
(run / "run.json").write_text(json.dumps({"device": "CPU", "peak_memory_bytes": [7]}))
(run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
for rank in ranks:
    rank.wait()
"""


def test_runs_and_results(group, tmp_path):
    """All rows in each round, with the same arguments but for DeepSpeed's file; medians without the first step."""
    (tmp_path / "fake.py").write_text(FAKE)
    launch = f"{sys.executable} {tmp_path / 'fake.py'} {{ranks}} {{nodes}}"
    given = ["--ranks", "4", "--ranks-per-node", "2", "--rounds", "2", "--steps", "4", "--launch", launch,
             "--rows", "DDP", "1Z", "--output", str(tmp_path / "all"), "--", "--model_path", "m"]  # fmt: skip
    (printed,) = group(1)(ON_RANKS.printed, SCRIPT, given)
    runs = json.loads((tmp_path / "all" / "results.json").read_text())["runs"]
    assert [(run["run"], run["round"]) for run in runs] == [
        ("DDP-2G2N", 1), ("1Z-2G2N", 1), ("DDP-2G2N", 2), ("1Z-2G2N", 2),
    ]  # fmt: skip
    for run in runs:
        assert (run["loss_at_first"], run["loss_at_last"], run["samples_per_second"]) == (5.0, 2.0, 30.0)
        assert run["gpu_peak_bytes"] is None and run["cpu_peak_bytes"] >= max(run["cpu_average_bytes"], 2 * 2**26)
        command = json.loads((tmp_path / "all" / f"{run['run']}-round{run['round']}.command").read_text())
        assert command[:3] == ["4", "2", str(ROOT / "deepspeed" / "finetune.py")]
        assert command[command.index("--model_path") + 1] == "m"
        config = command[command.index("--deepspeed_config") + 1] if "--deepspeed_config" in command else None
        assert config == run["config"] == (None if run["name"] == "DDP" else str(tmp_path / "all" / "1Z.json"))
    assert (tmp_path / "all" / "table.md").read_text() in printed


def test_each_row_differs_in_one_thing(script, tmp_path):
    """From the row that it is compared with: DeepSpeed, the stage, what is offloaded, or whether memory is pinned."""
    made = {row["name"]: row for row in script.standard_rows(list(script.ROWS), tmp_path)}
    assert [row["config"] for row in made.values()].count(None) == 1
    zero = {name: json.loads(Path(row["config"]).read_text())["zero_optimization"] if row["config"] else None
            for name, row in made.items()}  # fmt: skip
    for name, row in made.items():
        if name == "DDP":
            continue
        settings = zero[name]
        assert settings["stage"] == int(name[0])
        sections = {key for key in settings if key.startswith("offload")}
        expected = {"offload_optimizer"} if "offload" in name else set()
        expected |= {"offload_param"} if "parameters" in name else set()
        assert sections == expected
        for section in sections:
            assert settings[section] == {"device": "cpu", "pin_memory": "pinned" in name}
        other = row["differs_from"]
        if other == "DDP":
            continue
        by = {
            "stage": int(name[0]) != int(other[0]),
            "sections": sections != {key for key in zero[other] if key.startswith("offload")},
            "pinned": ("pinned" in name) != ("pinned" in other),
        }
        assert sum(by.values()) == 1, (name, other, by)


def test_own_files_get_rows(script, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text("{}")
    made = script.own_rows([tmp_path / "a.json", tmp_path / "b.json"])
    assert [(row["name"], row["config"]) for row in made] == [
        ("DDP", None), ("a", str(tmp_path / "a.json")), ("b", str(tmp_path / "b.json")),
    ]  # fmt: skip
    (tmp_path / "DDP.json").write_text("{}")
    for files in ([tmp_path / "DDP.json"], [tmp_path / "a.json", tmp_path / "a.json"]):
        with pytest.raises(SystemExit):
            script.own_rows(files)


@pytest.mark.parametrize(("given", "value"), [
    (["--x", "1", "--train.precision", "bf16"], "bf16"), (["--train.precision=bf16"], "bf16"), (["--x", "1"], None),
])  # fmt: skip
def test_settings_are_found_in_the_arguments(script, given, value):
    assert script.value_of("--train.precision", given) == value


def run_of(name, number, first, last, speed, gpu, cpu):
    return {
        "name": name, "run": f"{name}-2G1N", "round": number, "differs_from": None, "by": "x", "config": None,
        "loss_at_first": first, "loss_at_last": last, "samples_per_second": speed, "device": "d",
        "gpu_peak_bytes": gpu, "gpu_average_bytes": gpu, "cpu_peak_bytes": cpu, "cpu_average_bytes": cpu // 2,
    }  # fmt: skip


def test_the_table_of_given_results(group, tmp_path):
    """Medians over the rounds of a row, GiB of bytes, and the largest distance of losses."""
    runs = [run_of("DDP", n, 5.0, 4.0, speed, 2 * GIB, n * GIB) for n, speed in ((1, 10.0), (2, 90.0), (3, 20.0))]
    runs += [run_of("0Z", n, 5.0, 4.25, 7.0, None, 8 * GIB) for n in (1, 2, 3)]
    results = {"ranks": 2, "nodes": 1, "started": "2026-01-02T03:04:05", "runs": runs}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (printed,) = group(1)(ON_RANKS.printed, SCRIPT, ["--table", str(tmp_path / "results.json")])
    assert "| `DDP-2G1N` | – | x | 5.0000 → 4.0000 | 20.0 | 2.00 / 2.00 | 2.00 / 1.00 |" in printed
    assert "| `0Z-2G1N` | – | x | 5.0000 → 4.2500 | 7.0 | – / – | 8.00 / 4.00 |" in printed
    assert "2 ranks on 1 node(s), d; 3 round(s), 2026-01-02. Losses of all rows within 2.5e-01 of each" in printed


@pytest.mark.parametrize(("given", "words"), [
    (["--launch", "no-such-launcher {ranks}"], "no-such-launcher is no program here"),
    (["--launch", "false {mine}", "--rows", "DDP", "--width", "64"], "DDP-2G1N-round1 ended with 1"),  # its braces
    (["--rows", "4Z"], "--rows 4Z: there is no such row; allowed: DDP, 0Z"),
    (["--ranks", "3", "--ranks-per-node", "2"], "as many ranks on each node"),
    (["--rounds", "0"], "numbers from 1 on"),
    (["--steps", "2"], "expected at least 3"),
    (["--configs", "missing.json"], "--configs missing.json: no such file"),
    (["--table", "missing.json"], "--table missing.json: not a results.json"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)  # fmt: skip
def test_bad_comparisons(group, tmp_path, given, words):
    place = {"RUNS_DIR": str(tmp_path / "runs")}
    assert_refused(group(1)(ON_RANKS.ends, SCRIPT, given, place), words)


def test_without_zero_there_is_no_bf16(group, tmp_path):
    """Stage 0 is left out; the other rows go on. The precision may be given with `=`, too."""
    (tmp_path / "fake.py").write_text(FAKE)
    given = ["--steps", "3", "--launch", f"{sys.executable} {tmp_path / 'fake.py'}", "--rows", "DDP", "0Z",
             "--output", str(tmp_path / "low"), "--", "--train.precision=bf16", "--model_path=m"]  # fmt: skip
    (printed,) = group(1)(ON_RANKS.printed, SCRIPT, given)
    assert "0Z is left out: without ZeRO DeepSpeed has another optimizer in bf16" in printed
    assert "a random model" not in printed
    runs = json.loads((tmp_path / "low" / "results.json").read_text())["runs"]
    assert [run["run"] for run in runs] == ["DDP-2G1N"]


@pytest.mark.slow
def test_the_table_of_stages(launch, tmp_path):
    """Each row is one run; what it shows is what the runs recorded; learners' own files get rows, too."""
    place = ["--steps", "3", "--width", "64", "--layers", "1", "--output", str(tmp_path / "all")]
    done = launch("deepspeed/compare_stages.py", *place, "--rows", "DDP", "2Z-offload-pinned", nproc=0, timeout=300)
    runs = json.loads((tmp_path / "all" / "results.json").read_text())["runs"]
    assert [run["run"] for run in runs] == ["DDP-2G1N", "2Z-offload-pinned-2G1N"]
    for run in runs:
        recorded = [row for row in rows(tmp_path / "all" / f"{run['run']}-round1") if "loss" in row]
        assert len(recorded) == 3
        assert (run["loss_at_first"], run["loss_at_last"]) == (recorded[0]["loss"], recorded[-1]["loss"])
        assert run["cpu_peak_bytes"] >= run["cpu_average_bytes"] > 2 * 2**27  # two ranks, each with torch inside
        assert run["gpu_peak_bytes"] is None
        assert f"| `{run['run']}` |" in done.stdout
    assert abs(runs[0]["loss_at_last"] - runs[1]["loss_at_last"]) <= TOLERANCE
    zero = json.loads(Path(runs[1]["config"]).read_text())["zero_optimization"]
    assert zero == {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    again = launch("deepspeed/compare_stages.py", "--table", str(tmp_path / "all" / "results.json"), nproc=0)
    assert again.stdout.strip() in done.stdout
