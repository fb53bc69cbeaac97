"""Mistakes of a user: one line, a non-zero exit on every rank, in seconds; before Lightning misreads them."""

import gc
import importlib
import json
import os
import runpy
from types import SimpleNamespace

import pytest
from equality import SMALL
from launching import ROOT, SCRIPTS, OnRanks, assert_refused, clean_environment, whose_rank_1_dies
from own_folder import own_folder

from common import config

SCRIPT = "lightning/train.py"
ON_RANKS = OnRanks("tests/lightning/lightning_on_ranks.py")


@pytest.mark.parametrize(("arguments", "words"), [
    (["--tp_dimension", "[2, 1, 1]"], ["unknown key tp_dimension", "did you mean tp_dimensions?"]),
    (["--strategy", "fsdp2"], ["strategy = fsdp2", "tensor_parallel"]),
    (["--strategy", "single_device"], ["strategy = single_device, and 2 processes", "set strategy to ddp"]),
    (["--strategy", "deepspeed"], ["DeepSpeedStrategy wants GPUs", "deepspeed/train.py"]),
    (["--devices", "3"], ["devices = 3", "started 2 process(es) on each node"]),
    (["--devices", "0"], ["devices = 0 cannot work"]),
    (["--strategy", "tensor_parallel", "--tp_dimensions", "[4, 1, 1]"], ["[4, 1, 1] with 2 rank(s)", "product of 2"]),
    (["--strategy", "tensor_parallel", "--tp_dimensions", "[1, 2, 1]"], ["cuts weights both ways"]),
    (["--strategy", "tensor_parallel", "--tp_dimensions", "[2, 1]"], ["[2, 1] cannot work", "rows, columns, depth"]),
    (["--strategy", "fsdp", "--tp_dimensions", "[2, 1, 1]"], ["with strategy = fsdp"]),
    (["--strategy", "tensor_parallel", "--model.kv_heads", "1"], ["model.kv_heads = 1", "2 tensor ranks"]),
    (["--strategy", "tensor_parallel", "--model.experts", "4"], ["model.experts = 4"]),
    (["--strategy", "fsdp", "--train.precision", "fp16"], ["fp16 with strategy = fsdp", "use bf16"]),
    (["--batch.global_size", "25"], ["global_size = 25", "2 data-parallel ranks"]),
    (["--batch.micro_size", "5"], ["micro_size = 5", "[1, 2, 3, 4, 6, 12]"]),
    (["--resume", "nowhere"], ["nowhere", "no manifest.json"]),
    (["--network_profile", "token-ring"], ["token-ring", "infiniband"]),
    (["--device", "cuda"], ["no GPU"]),
], ids=lambda value: " ".join(value) if value[0].startswith("--") else "")  # fmt: skip
def test_one_line_on_every_rank(group, tmp_path, arguments, words):
    answers = group(2)(ON_RANKS.ends, [*SMALL, "--runs_dir", str(tmp_path), *arguments], timeout=60)
    for code, text in answers:
        lines = [line for line in text.splitlines() if "error: " in line]
        assert code == 2
        assert len(lines) == 1, text
        assert all(word in lines[0] for word in words), lines
        assert "Traceback" not in text


def test_config_file_that_does_not_exist(group):
    changes = {"CONFIG_FILE": "lightning/configs/dpp.json"}
    ((code, text),) = group(1)(ON_RANKS.ends, [], SCRIPT, changes)
    assert code == 2 and "Traceback" not in text
    (line,) = [line for line in text.splitlines() if "error: " in line]
    assert "CONFIG_FILE=lightning/configs/dpp.json: there is no such file" in line
    assert "ddp.json" in line


@pytest.fixture
def launches(monkeypatch):
    """lightning/launch.py, in an environment without any launcher."""
    for name in set(os.environ) - clean_environment().keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("DEVICE", "cpu")
    with own_folder(ROOT / "lightning" / "launch.py"):
        yield importlib.import_module("launch")


JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "lightning", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2"}
STEP = JOB | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
              "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}  # fmt: skip
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a",
            "MASTER_PORT": "1"}  # fmt: skip
CHILD = {"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "20001"}


def asked(devices):
    """Of the settings, those that a launch depends on."""
    return SimpleNamespace(device="auto", devices=devices, network_profile="default", timeout_s=60.0)


@pytest.mark.parametrize(("environment", "devices", "strategy", "words"), [
    (JOB, None, "ddp", "plain python in Slurm job 7"),
    (STEP, 4, "ddp", "devices = 4, but srun started 2 process(es) on each node; make --ntasks-per-node equal"),
    (STEP, None, "single_device", "strategy = single_device, and 4 processes: as many identical runs"),
    (STEP | {"SLURM_NTASKS_PER_NODE": "4"}, None, "ddp", "--ntasks-per-node=4, but this step has 2 task(s) on a node"),
    (STEP | {"SLURM_JOB_NAME": "interactive"}, None, "ddp", "in a job named interactive"),
    ({k: v for k, v in STEP.items() if k != "SLURM_NTASKS_PER_NODE"}, None, "ddp", "4 tasks by --ntasks"),
    (JOB | {"SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 2,
     "ddp", "devices = 2, but srun started 1 process(es)"),
    ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
      "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, None, "ddp", "started by mpirun; expected torchrun, srun"),
    ({"LOCAL_RANK": "0"}, None, "ddp", "half-set torchrun environment"),
    (TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}, None, "ddp",
     "torchrun has restarted the ranks (restart 1)"),
])  # fmt: skip
def test_launcher_and_settings_contradict(launches, monkeypatch, capsys, environment, devices, strategy, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        launches.read_launch(asked(devices), strategy)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("environment", "devices", "expected"), [
    ({}, None, (1, 1, "lightning", "cpu")),
    ({}, 3, (3, 1, "lightning", "cpu")),
    (CHILD, None, (3, 1, "lightning", "cpu")),
    (STEP, None, (2, 2, "srun", "cpu")),
    (STEP, 2, (2, 2, "srun", "cpu")),
    (TORCHRUN, None, (2, 2, "torchrun", "cpu")),
    (JOB | {"SLURM_JOB_NAME": "bash"}, 2, (2, 1, "lightning", "cpu")),  # as Lightning has it
])  # fmt: skip
def test_launchers_are_understood(launches, monkeypatch, environment, devices, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    at_the_end = []
    monkeypatch.setattr("atexit.register", at_the_end.append)
    config = asked(devices)
    assert launches.read_launch(config, "ddp") == expected
    assert gc.collect in at_the_end  # circles around the process group are freed before Python ends


@pytest.mark.parametrize(("environment", "devices", "gpus", "words"), [
    (STEP, None, 4, "2 process(es) on this node, and each sees 4 GPU(s); make --ntasks-per-node and --gpus-per-node"),
    (STEP, None, 1, "each sees 1 GPU(s); make --ntasks-per-node and --gpus-per-node equal (not --gpus-per-task"),
    (STEP, None, 2, None),
    ({}, 2, 1, "2 process(es) on this node, and each sees 1 GPU(s); start one process per GPU, or use --device cpu"),
    ({}, 1, 4, None),
    (TORCHRUN, None, 4, None),
])  # fmt: skip
def test_as_many_processes_as_gpus(launches, monkeypatch, capsys, environment, devices, gpus, words):
    """With fewer tasks than GPUs under srun some would idle; elsewhere the user has chosen how many."""
    for name, value in (environment | {"DEVICE": "cuda"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launches.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launches.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(launches.torch.cuda, "set_device", lambda index: None)
    config = asked(devices)
    if words is None:
        assert launches.read_launch(config, "ddp").device_type == "cuda"
        return
    with pytest.raises(SystemExit) as ended:
        launches.read_launch(config, "ddp")
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "words"), [
    (["--checkpoint.every", "10"], "checkpoint.every = 10 with strategy = deepspeed: only the end is saved"),
    (["--resume", "runs/other"], "resume = runs/other"),
    (["--train.precision", "fp64"], "train.precision = fp64"),
    (["--batch.micro_size", "3"], "batch.micro_size = 3"),
    (["--resume", "never"], None),
])  # fmt: skip
def test_what_does_not_go_with_deepspeed(launches, capsys, arguments, words):
    parsed = config.parse(launches.LightningConfig, ["--strategy", "deepspeed", *arguments])
    launch = launches.Launch(2, 1, "torchrun", "cuda")
    if words is None:
        assert launches.mesh_shape(parsed, launch) == (2, 1)
        return
    with pytest.raises(SystemExit) as ended:
        launches.mesh_shape(parsed, launch)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


ALL_SCRIPTS = [SCRIPT, "lightning/fabric_loop.py", "lightning/train_vision.py"]


@pytest.mark.parametrize("script", ALL_SCRIPTS)
@pytest.mark.parametrize(("arguments", "seed"), [
    ([], 1), (["--config", "other.json"], 2), (["--seed", "3"], 3), (["--config=other.json", "--seed=3"], 3),
])  # fmt: skip
def test_which_settings_win(monkeypatch, tmp_path, script, arguments, seed):
    """--config beats CONFIG_FILE, which need not even be there then; the command line beats both."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("file.json", 1), ("other.json", 2)):
        (tmp_path / name).write_text(json.dumps({"seed": value}))
    monkeypatch.setenv("CONFIG_FILE", "gone.json" if "--config" in " ".join(arguments) else "file.json")
    monkeypatch.setattr("sys.argv", [script, *arguments])
    found, parse = [], config.parse

    def parse_and_end(*inputs):
        found.append(parse(*inputs))
        raise SystemExit

    monkeypatch.setattr(config, "parse", parse_and_end)
    with own_folder(ROOT / script), pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert [settings.seed for settings in found] == [seed]


@pytest.mark.parametrize("script", ALL_SCRIPTS)
def test_without_the_package_one_line_says_what_to_install(group, script):
    """The folder lightning/ would be imported in its place, as an empty package."""
    words = "error: this lesson needs the package lightning; install the core environment: make venv"
    ((code, text),) = group(1)(ON_RANKS.ends_without_the_package, script)
    assert code == 2
    (line,) = text.strip().splitlines()
    assert line.startswith(words)


@pytest.mark.slow  # what torchrun does then is tested in tests/ddp/
def test_a_rank_that_dies_takes_the_others_with_it(launch, tmp_path):
    """Under torchrun; test_resume.py has Lightning's own launcher."""
    script = whose_rank_1_dies(SCRIPT, tmp_path)
    result = launch(script, *SMALL, "--train.steps", "4000", check=False, timeout=100)
    assert result.returncode != 0
    assert "SIGKILL" in result.stderr.split("Root Cause")[1]


@pytest.mark.parametrize(("script", "odd", "value"), [
    ("lightning/train.py", ["--model.layers", "2"], "2"), ("lightning/fabric_loop.py", ["--model.layers", "2"], "2"),
    ("lightning/train_vision.py", ["--seed", "7"], "7"),
])  # fmt: skip
def test_ranks_that_were_started_differently(group, tmp_path, script, odd, value):
    """Before Lightning wraps models of two shapes, which raises."""
    arguments = ["--train.steps", "2", "--runs_dir", str(tmp_path / "runs")]
    answers = group(2)(SCRIPTS.ends_unlike, script, [arguments, [*arguments, *odd]])
    assert_refused(answers, f"; {value} on rank 1 (")
    assert not (tmp_path / "runs").exists(), "it began"
