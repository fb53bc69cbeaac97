"""The scaling driver: its arithmetic on invented numbers, then real runs from the command line to the plot."""

import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import frameworks  # noqa: E402  (needs the path above)
import head_loss  # noqa: E402
import kill_and_resume  # noqa: E402
import lesson_runs  # noqa: E402
import loop_overhead  # noqa: E402
import report  # noqa: E402
import saving  # noqa: E402
import scaling  # noqa: E402
import scaling_arithmetic  # noqa: E402
import scaling_report  # noqa: E402

from common.flops import flops_per_token  # noqa: E402
from common.transformer import ModelConfig, Transformer  # noqa: E402

ONE = "fsdp/configs/weak_scaling_1.yaml"
TINY = ["--model.width=32", "--model.ffn_width=48", "--model.layers=1", "--data.sequence_length=16"]

# Writes a run folder as our scripts do, in no time: 0.1 s a step on one rank, 0.125 s on two. Its weak scaling is
# right unless it is told to ignore the batch size.
STAND_IN = """
import json, os, sys
given = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
batch = int(given.get("batch.global_size", 6))
if "--print_config" in sys.argv:
    print(json.dumps({"batch": {"global_size": batch}}))
    sys.exit()
if "--wants-torchrun" in sys.argv and "RANK" not in os.environ:
    sys.exit("error: no RANK in the environment; start me with torchrun")
if os.environ.get("RANK", "0") != "0":
    sys.exit()
if "--fails" in sys.argv:
    print("\\n".join(f"line {n}" for n in range(20)) + "\\n[rank 0] error: the batch does not divide\\nafter it")
    sys.exit(3)
world = int(os.environ.get("WORLD_SIZE", os.environ.get("FAKE_WORLD", 1)))
batch = 6 if "--ignore-batch" in sys.argv else batch
folder = os.path.join(given["runs_dir"], given["run_name"])
os.makedirs(os.path.join(folder, "checkpoints"))
record = {"world_size": world, "units_per_step": 10 * batch, "unit": "tokens", "device": "x86_64 CPU, 2 cores"}
record |= {"peak_memory_bytes": [7, 9][:world], "git_commit": "abc"}
record["versions"] = {"torch": os.environ["OMP_NUM_THREADS"]}
json.dump(record, open(os.path.join(folder, "run.json"), "w"))
with open(os.path.join(folder, "metrics.jsonl"), "w") as file:
    for step in range(int(given["train.steps"])):
        seconds = 5.0 if step < 3 else 0.1 if world == 1 else 0.125
        row = {"step": step, "loss": 3.0, "step_seconds": seconds, "peak_memory_bytes": 1000 + step}
        file.write(json.dumps(row) + "\\n")
    file.write(json.dumps({"step": step + 1, "val_loss": 2.0}) + "\\n")
"""


def measured(ranks: int, units: int, seconds: float, flops: float = 0.0, parameters: int = 0) -> lesson_runs.Measured:
    record = {"flops_per_unit": flops}
    return lesson_runs.Measured(ranks, units, seconds, [ranks], last_loss=1.0, record=record, parameters=parameters)


@pytest.mark.parametrize(
    ("mode", "base", "base_seconds", "ranks", "seconds", "speed_up", "efficiency"),
    [
        ("strong", 1, 8.0, 4, 2.0, 4.0, 1.0),  # ideal: a quarter of the time
        ("strong", 1, 8.0, 4, 4.0, 2.0, 0.5),
        ("strong", 2, 8.0, 8, 4.0, 2.0, 0.5),  # relative to 2 ranks: four times the ranks, half the time
        ("strong", 1, 8.0, 2, 8.0, 1.0, 0.5),  # a second rank that helps nothing
        ("weak", 1, 8.0, 4, 8.0, 4.0, 1.0),  # ideal: the time stays, four times the work is done
        ("weak", 1, 8.0, 4, 10.0, 3.2, 0.8),
        ("weak", 2, 8.0, 8, 16.0, 2.0, 0.5),
    ],
)
def test_formulas(mode, base, base_seconds, ranks, seconds, speed_up, efficiency) -> None:
    arguments = (mode, base, base_seconds, ranks, seconds)
    assert scaling_arithmetic.speed_up(*arguments) == pytest.approx(speed_up, rel=1e-12)
    assert scaling_arithmetic.efficiency(*arguments) == pytest.approx(efficiency, rel=1e-12)
    # In both modes efficiency is throughput over ideal throughput: the formulas are the right way up.
    units = {"strong": (60, 60), "weak": (60 * base, 60 * ranks)}[mode]
    ideal = units[0] / base_seconds * ranks / base
    assert units[1] / seconds / ideal == pytest.approx(efficiency, rel=1e-12)


@pytest.mark.parametrize(
    ("base", "base_seconds", "ranks", "seconds", "work", "speed_up", "efficiency"),
    [
        (1, 8.0, 4, 8.0, 4.0, 4.0, 1.0),  # ideal: four times the FLOPs in the same time
        (1, 8.0, 4, 8.0, 3.0, 3.0, 0.75),  # a model that grew by three only: T(1) / T(4) would call this 1.0
        (1, 8.0, 4, 6.0, 3.0, 4.0, 1.0),  # and this 1.33, though no rank computes faster than one alone
        (2, 8.0, 8, 10.0, 4.0, 3.2, 0.8),
    ],
)
def test_formulas_of_a_growing_model(base, base_seconds, ranks, seconds, work, speed_up, efficiency) -> None:
    arguments = ("model", base, base_seconds, ranks, seconds, work)
    assert scaling_arithmetic.speed_up(*arguments) == pytest.approx(speed_up, rel=1e-12)
    assert scaling_arithmetic.efficiency(*arguments) == pytest.approx(efficiency, rel=1e-12)
    # FLOP/s of a rank over FLOP/s of a rank: the right way up.
    first = 60.0
    per_rank = first * work / seconds / ranks, first / base_seconds / base
    assert per_rank[0] / per_rank[1] == pytest.approx(efficiency, rel=1e-12)


def test_the_stated_formulas_are_those_computed() -> None:
    for mode in scaling_arithmetic.MODES:
        for base in (1, 2):
            for name, text in scaling_arithmetic.formulas(mode, base).items():
                expression = text.replace("·", "*").replace(f"T({base})", "8.0").replace("T(N)", "5.0")
                expression = expression.replace(f"W({base})", "2.0").replace("W(N)", "7.0")
                value = eval(expression.replace("N", "6"))
                assert value == pytest.approx(
                    getattr(scaling_arithmetic, name)(mode, base, 8.0, 6, 5.0, 3.5), rel=1e-12
                )


def test_rounds_are_compared_within_themselves() -> None:
    """A machine that is ten times slower in the second round changes the times, but no efficiency."""
    rounds = [{1: measured(1, 60, 4.0 * slow), 2: measured(2, 60, 2.5 * slow)} for slow in (1, 10, 1)]
    one, two = scaling_arithmetic.summarize("strong", rounds)
    assert one["efficiency"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert two["efficiency"] == pytest.approx({"median": 0.8, "min": 0.8, "max": 0.8}, rel=1e-12)
    assert two["speed_up"]["median"] == pytest.approx(1.6, rel=1e-12)
    assert two["step_seconds"] == {"median": 2.5, "min": 2.5, "max": 25.0}
    assert two["units_per_second"] == {"median": 24.0, "min": 2.4, "max": 24.0}


def test_a_growing_model_is_measured_in_flops() -> None:
    """By hand: 60 units of 10 FLOPs in 2 s, of 18 FLOPs in 2.4 s on 2 ranks: 300 and 225 FLOP/s a rank."""
    rounds = [{1: measured(1, 60, 2.0 * k, 10.0, 500), 2: measured(2, 60, 2.4 * k, 18.0, 1100)} for k in (1, 10, 1)]
    one, two = scaling_arithmetic.summarize("model", rounds)
    assert (one["parameters"], two["parameters"]) == (500, 1100)
    assert (one["flops_per_step"], two["flops_per_step"]) == (600.0, 1080.0)
    assert one["flops_per_second_per_rank"]["median"] == pytest.approx(300.0, rel=1e-12)
    assert two["flops_per_second_per_rank"]["median"] == pytest.approx(225.0, rel=1e-12)
    assert two["flops_per_second"]["median"] == pytest.approx(450.0, rel=1e-12)
    assert two["efficiency"] == pytest.approx({"median": 0.75, "min": 0.75, "max": 0.75}, rel=1e-12)
    assert two["speed_up"]["median"] == pytest.approx(1.5, rel=1e-12)
    assert two["time_ratio"]["median"] == pytest.approx(2.0 / 2.4, rel=1e-12)  # which calls it 83 %
    assert scaling_report.naive_efficiency_note([one, two]).endswith(
        ": 83.3% on 2 ranks, where each has 0.900 of the FLOPs: 75.0%"
    )
    parameters, flops = scaling_arithmetic.uneven_share_warnings([one, two])
    assert parameters.startswith("parameters per rank, against 1 rank: +10.0% on 2 ranks; expected within 5%")
    assert flops.startswith("FLOPs of a step per rank, against 1 rank: -10.0% on 2 ranks; expected within 5%")
    (even,) = scaling_arithmetic.summarize("model", [{1: measured(1, 60, 2.0, 10.0, 500)}])
    assert (
        scaling_arithmetic.uneven_share_warnings(
            [even, even | {"ranks": 2, "parameters": 1040, "flops_per_step": 1150.0}]
        )
        == []
    )


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_configs_grow_as_the_ranks_do(ranks) -> None:
    """Each states its number of parameters; a rank's share, and its arithmetic, stay within 5 % of one rank's."""

    def made(count: int) -> tuple[str, int, float]:
        text = (ROOT / f"fsdp/configs/weak_scaling_{count}.yaml").read_text()
        settings = yaml.safe_load(text)
        config = ModelConfig(**settings["model"])
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in Transformer(config).parameters())
        tokens = settings["batch"]["global_size"] * settings["data"]["sequence_length"]
        return text, parameters, tokens * flops_per_token(config, settings["data"]["sequence_length"])

    (_, first, work), (text, parameters, grown) = made(1), made(ranks)
    assert f"{ranks} rank{'s' * (ranks > 1)}: {parameters:,} parameters" in text
    assert parameters / ranks == pytest.approx(first, rel=scaling_arithmetic.UNEVEN)
    assert grown / ranks == pytest.approx(work, rel=scaling_arithmetic.UNEVEN)


def test_sharing_is_said() -> None:
    says = "this measures sharing, not scaling"
    assert report.oversubscription_note(4, 1, 2, 0) == f"4 ranks share 2 cores: {says}"
    assert report.oversubscription_note(2, 2, 2, 0) == f"2 ranks of 2 threads share 2 cores: {says}"
    assert report.oversubscription_note(2, 1, 1, 0) == f"2 ranks share 1 core: {says}"
    assert report.oversubscription_note(2, 1, 2, 0) is None
    assert report.oversubscription_note(9, 1, 96, 8) == f"9 ranks share 8 GPUs: {says}"
    assert report.oversubscription_note(8, 1, 2, 8) is None  # ranks on GPUs: the cores do not count


def test_other_programs_are_noticed(monkeypatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert report.other_load_note(seconds=100.0, busy=150.0, ours=145.0) is None
    warning = "measured on a shared machine: other programs kept 0.8 of its 2 cores busy meanwhile"
    assert report.other_load_note(seconds=100.0, busy=150.0, ours=70.0) == warning


def test_our_own_work_and_that_of_our_children_is_ours() -> None:
    before = report.processor_seconds()
    subprocess.run([sys.executable, "-c", "sum(range(20_000_000))"], check=True)
    _, busy, ours = (now - then for now, then in zip(report.processor_seconds(), before, strict=True))
    assert 0.1 < ours <= 1.1 * busy + 0.1  # the machine's clock is coarse: it counts in hundredths of a second


def test_command_lines_lose_paths_outside() -> None:
    words = ["python", "x.py", f"{Path.cwd()}/ddp/train.py", "--data.path=/secret/place/text.txt", "/a/b", "1/2"]
    assert report.without_paths(words) == "python x.py ddp/train.py --data.path=text.txt b 1/2"


def test_the_readme_shows_the_kept_results() -> None:
    """Every table row of benchmarks/README.md is made from a file in benchmarks/results/, and all of them are there."""
    page = (ROOT / "benchmarks" / "README.md").read_text()
    kept = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert len(kept) >= 3
    for file in kept:
        result = json.loads(file.read_text())
        named = (scaling, head_loss, loop_overhead, saving, kill_and_resume, frameworks)
        modules = {module.__name__: module for module in named}
        table = modules[result["benchmark"]].table(result)
        rows = [line for line in table.splitlines() if line.startswith("|")]
        missing = [line for line in rows if line not in page]
        assert not missing, f"benchmarks/README.md does not show {file.name}:\n" + "\n".join(missing)
        about = f"commit {result['git_commit']}; {result['date']}"
        assert about in page, f"benchmarks/README.md does not say of {file.name}: {about}"


def results(folder: Path) -> tuple[dict, str]:
    return json.loads((folder / "scaling.json").read_text()), (folder / "scaling.md").read_text()


@pytest.mark.slow
def test_strong_scaling_of_a_lesson(launch, tmp_path) -> None:
    """ddp/train.py on 1 and 2 ranks, both on one core: every number again from the run folders."""
    steps, warmup = 5, 2
    can_pin = hasattr(os, "sched_setaffinity")
    allowed = os.sched_getaffinity(0) if can_pin else set()
    if can_pin:
        os.sched_setaffinity(0, {min(allowed)})  # inherited: there, 2 ranks share 1 core on any machine
    try:
        finished = launch(
            "benchmarks/scaling.py", "ddp/train.py", "--ranks", "2", "1", "--repeats", "1", f"--steps={steps}",
            f"--warmup={warmup}", "--", *TINY, "--data.validation_samples=4", nproc=0,
        )  # fmt: skip
    finally:
        if can_pin:
            os.sched_setaffinity(0, allowed)
    (folder,) = (tmp_path / "runs").glob("scaling-train-strong-*")
    result, page = results(folder)
    assert [row["ranks"] for row in result["rows"]] == [1, 2]
    assert result["omp_num_threads"] == 1 and "OMP_NUM_THREADS=1 for every rank count" in page

    seconds, losses = {}, {}
    for row in result["rows"]:
        run = folder / "runs" / f"strong-{row['ranks']}-ranks-round-1"
        record = json.loads((run / "run.json").read_text())
        assert record["world_size"] == row["ranks"]
        assert record["launcher"] == ("python" if row["ranks"] == 1 else "torchrun")
        assert not (run / "checkpoints").exists()
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps_made = [line for line in lines if "step_seconds" in line]
        assert len(steps_made) == steps
        seconds[row["ranks"]] = statistics.median(line["step_seconds"] for line in steps_made[warmup:])
        losses[row["ranks"]] = steps_made[-1]["loss"]
        assert row["units_per_step"] == 24 * 16
        assert row["units_per_second"]["median"] == pytest.approx(24 * 16 / seconds[row["ranks"]], rel=1e-12)
        of_rank_0 = [max(line["peak_memory_bytes"] for line in steps_made)]
        assert row["peak_memory_bytes"] == record.get("peak_memory_bytes", of_rank_0)
    one, two = result["rows"]
    assert two["efficiency"]["median"] == pytest.approx(seconds[1] / (2 * seconds[2]), rel=1e-12)
    assert two["speed_up"]["median"] == pytest.approx(seconds[1] / seconds[2], rel=1e-12)
    assert one["efficiency"]["median"] == one["speed_up"]["median"] == 1.0
    # The same batch, so the same training: fp32 sums in another order, as everywhere in this project.
    assert losses[1] == pytest.approx(losses[2], abs=1e-5)
    assert one["last_loss"] == losses[1] and two["last_loss"] == losses[2]

    if can_pin:
        warning = "2 ranks share 1 core: this measures sharing, not scaling"
        assert warning in result["notes"] and f"note: {warning}" in finished.stdout and f"* {warning}" in page
        assert [row["shared"] for row in result["rows"]] == [False, True]
        assert result["hardware"]["cores"] == 1
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1 and len(table) == 2 + 2
    assert page.strip() in finished.stdout
    everything = json.dumps(result)
    assert str(tmp_path) not in everything and str(ROOT) not in everything
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", everything)
    assert {"hardware", "versions", "git_commit", "date", "command", "formulas"} <= result.keys()
    assert (folder / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_weak_scaling_by_model_size(launch, tmp_path) -> None:
    """fsdp/train.py on 1 and 2 ranks, the second model wider: parameters, FLOPs and efficiency again from the runs."""
    models = {1: dict(width=32, layers=1, ffn_width=48), 2: dict(width=48, layers=1, ffn_width=64)}
    for ranks, model in models.items():
        (tmp_path / f"{ranks}.yaml").write_text(yaml.safe_dump({"model": {"preset": "tiny"} | model}))
    configs = [tmp_path / "2.yaml", tmp_path / "1.yaml"]  # in the order of --ranks
    finished = launch(
        "benchmarks/scaling.py", "fsdp/train.py", "--mode=model", "--ranks", "2", "1", "--configs", *configs,
        "--repeats=1", "--steps=4", "--warmup=1", "--", "--data.sequence_length=16", "--data.validation_samples=4",
        nproc=0,
    )  # fmt: skip
    (folder,) = (tmp_path / "runs").glob("scaling-train-model-*")
    result, page = results(folder)
    rates, seconds = {}, {}
    for row in result["rows"]:
        ranks = row["ranks"]
        config = ModelConfig(**models[ranks])
        whole = sum(parameter.numel() for parameter in Transformer(config).parameters())
        assert row["parameters"] == whole and f"| {whole:,} | {whole / ranks:,.0f} |" in page
        assert row["units_per_step"] == 24 * 16  # the global batch stays
        assert row["flops_per_step"] == 24 * 16 * flops_per_token(config, 16)
        lines = (folder / "runs" / f"model-{ranks}-ranks-round-1" / "metrics.jsonl").read_text().splitlines()
        steps = [line["step_seconds"] for line in map(json.loads, lines) if "step_seconds" in line]
        seconds[ranks] = statistics.median(steps[1:])
        rates[ranks] = row["flops_per_step"] / seconds[ranks] / ranks
        assert row["flops_per_second_per_rank"]["median"] == pytest.approx(rates[ranks], rel=1e-12)
    two = result["rows"][1]
    assert two["efficiency"]["median"] == pytest.approx(rates[2] / rates[1], rel=1e-12)
    assert two["time_ratio"]["median"] == pytest.approx(seconds[1] / seconds[2], rel=1e-12)
    assert any(note.startswith("parameters per rank, against 1 rank: ") for note in result["notes"])
    assert "weak scaling by model size (the model grows with the ranks, the global batch stays)" in finished.stdout
    assert "not T(1) / T(N), which leaves out how much the model grew: " in page
    assert len({line.count("|") for line in page.splitlines() if line.startswith("|")}) == 1
    assert str(tmp_path) not in json.dumps(result)
    assert (folder / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def scale(tmp_path, monkeypatch):
    """The driver, in this process, on the stand-in script; its first 3 steps of 5 are slow; gives the results."""
    script, output = tmp_path / "stand_in.py", tmp_path / "result"
    script.write_text(STAND_IN)
    before = signal.getsignal(signal.SIGTERM)

    def run(*options: str, script_arguments: list[str]) -> Path:
        words = ["scaling.py", str(script), "--steps=5", "--warmup=3", f"--output={output}", *options, "--"]
        monkeypatch.setattr(sys, "argv", words + script_arguments)
        scaling.main()
        return output

    yield run
    signal.signal(signal.SIGTERM, before)


# Starts the stand-in instead of torchrun: it believes in any number of ranks.
TEMPLATE = f"env FAKE_WORLD={{ranks}} FAKE_NODES={{nodes}} {sys.executable}"


def test_weak_scaling_multiplies_the_batch(scale) -> None:
    options = ["--mode=weak", "--ranks", "1", "2", "--repeats=2", "--threads=3", "--launch", TEMPLATE]
    output = scale(*options, script_arguments=["--batch.global_size=8"])
    result, _ = results(output)
    assert [row["units_per_step"] for row in result["rows"]] == [80, 160]
    two = result["rows"][1]
    assert two["efficiency"]["median"] == pytest.approx(0.1 / 0.125, rel=1e-12)  # time per step, warm-up left out
    assert two["speed_up"]["median"] == pytest.approx(2 * 0.1 / 0.125, rel=1e-12)  # throughput grows
    assert two["peak_memory_bytes"] == [7, 9] and "the fullest rank" in result["memory"]
    runs = sorted(path.name for path in (output / "runs").iterdir())
    assert runs == [f"weak-{ranks}-ranks-round-{number}" for ranks in (1, 2) for number in (1, 2)]
    assert result["versions"]["torch"] == "3"  # what the runs saw as OMP_NUM_THREADS
    assert result["omp_num_threads"] == 3


def test_weak_scaling_that_is_none_is_refused(scale, capsys) -> None:
    options = ["--mode=weak", "--ranks", "1", "2", "--repeats=1", "--launch", TEMPLATE]
    with pytest.raises(SystemExit) as ended:
        scale(*options, script_arguments=["--ignore-batch"])
    assert ended.value.code == 2
    assert "this is no weak scaling" in capsys.readouterr().err.splitlines()[-1]


def test_a_growing_model_needs_parameters_and_flops(scale, tmp_path, capsys) -> None:
    (tmp_path / "one.yaml").write_text("")
    options = ["--mode=model", "--ranks=1", f"--configs={tmp_path}/one.yaml", "--repeats=1"]
    with pytest.raises(SystemExit) as ended:
        scale(*options, script_arguments=[])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert "--mode model counts the parameters in the run's checkpoint, and" in error.splitlines()[-1]


def test_a_script_that_refuses_plain_python_gets_torchrun(scale) -> None:
    result, _ = results(scale("--ranks=1", "--repeats=1", script_arguments=["--wants-torchrun"]))
    assert any("torchrun starts 1 rank too" in note for note in result["notes"])
    assert result["rows"][0]["ranks"] == 1


def test_strong_scaling_keeps_the_batch(scale, capsys) -> None:
    """Half the time would be ideal on two ranks; the machine has cores for one, and the page says so."""
    output = scale("--ranks", "2", "1", "--repeats=1", "--launch", TEMPLATE, script_arguments=[])
    result, page = results(output)
    one, two = result["rows"]
    assert [row["ranks"] for row in (one, two)] == [1, 2]
    assert [row["units_per_step"] for row in (one, two)] == [60, 60]
    assert two["speed_up"]["median"] == pytest.approx(0.1 / 0.125, rel=1e-12)
    assert two["efficiency"]["median"] == pytest.approx(0.1 / (2 * 0.125), rel=1e-12)
    assert one["peak_memory_bytes"] == [7] and not (output / "runs" / "strong-1-ranks-round-1" / "checkpoints").exists()
    assert page.strip() in capsys.readouterr().out
    assert str(output.parent) not in json.dumps(result) and str(ROOT) not in json.dumps(result)
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", json.dumps(result))
    assert (output / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_number_of_ranks_is_refused(scale, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        scale("--ranks=2", "--repeats=1", "--launch", f"env FAKE_WORLD=1 {sys.executable}", script_arguments=[])
    assert ended.value.code == 2
    assert "asked for 2 ranks, but the run says 1; check --launch" in capsys.readouterr().err.splitlines()[-1]


def test_a_failed_run_is_shown_with_its_cause(scale, tmp_path) -> None:
    with pytest.raises(SystemExit) as ended:
        scale("--ranks=2", "--repeats=1", "--launch", TEMPLATE, script_arguments=["--fails"])
    first, *rest = ended.value.code.splitlines()
    assert "stand_in.py failed (on 2 ranks, round 1, exit code 3): [rank 0] error: the batch does not divide" in first
    assert len([line for line in rest if line.startswith("  | ")]) == 15 and rest[-1] == "  | after it"
    assert not (tmp_path / "result" / "scaling.json").exists()


def test_the_template_starts_ranks_on_nodes() -> None:
    template = "srun --nodes={nodes} --ntasks={ranks} python"
    command = lesson_runs.launch_command("x.py", 17, template, 8, plain=False)
    assert command == ["srun", "--nodes=3", "--ntasks=17", "python", "x.py"]


@pytest.mark.slow
def test_a_failing_run_is_one_clear_line_and_the_end_of_its_output(launch, tmp_path) -> None:
    output = tmp_path / "result"
    finished = launch(
        "benchmarks/scaling.py", "ddp/train.py", "--ranks", "2", "--repeats", "1", f"--output={output}", "--",
        "--batch.global_size=5", nproc=0, check=False,
    )  # fmt: skip
    assert finished.returncode == 1
    errors = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "ddp/train.py failed (on 2 ranks, round 1, exit code 1)" in errors[0]
    assert "batch.global_size = 5 does not divide among 2 data-parallel ranks" in errors[0]
    assert len([line for line in finished.stderr.splitlines() if line.startswith("  | ")]) >= 5
    assert "Traceback" not in finished.stderr.split("  | ")[0]
    assert not (output / "scaling.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ddp/missing.py"], "there is no script ddp/missing.py"),
        (["ddp/train.py", "--steps", "5", "--warmup", "5"], "--warmup 5 leaves no step of --steps 5"),
        (["ddp/train.py", "--ranks", "2", "2"], "--ranks 2 2 cannot work"),
        (["ddp/train.py", "--", "--train.steps", "9"], "give --steps"),
        (["ddp/train.py", "--launch", "no-such-launcher {ranks}"], "there is no program no-such-launcher"),
        (
            ["ddp/train.py", "--mode", "model", "--ranks", "1", "2"],
            "got 0 files after --configs; expected one for each",
        ),
        (
            ["ddp/train.py", "--mode=model", "--ranks", "1", "2", "--configs", ONE],
            "got 1 file after --configs; expected",
        ),
        (["ddp/train.py", "--mode=model", "--ranks=1", "--configs", "no.yaml"], "--configs: there is no file no.yaml"),
        (["ddp/train.py", "--mode=weak", "--configs", ONE], "--configs belongs to --mode model, not weak"),
        (
            ["ddp/train.py", "--mode=model", "--ranks=1", "--configs", ONE, "--", "--config=x"],
            "--config is set by this",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        scaling.parse_arguments(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error and error.count("\n") == 1
