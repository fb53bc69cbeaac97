"""The settings files, the launchers, and what each strategy holds on a rank."""

import json

import pytest
import torch
import yaml
from equality import SMALL, assert_same_rows, read_rows
from launching import ROOT, OnRanks

SCRIPT = "lightning/train.py"
ON_RANKS = OnRanks("tests/lightning/lightning_on_ranks.py")
CONFIGS = ROOT / "lightning" / "configs"
QUICK = [*SMALL, "--train.steps", "3"]
slow, slurm = pytest.mark.slow, pytest.mark.slurm


def flat(file):
    tree = yaml.safe_load(file.read_text())
    return {f"{section}.{key}": value for section, entry in tree.items()
            for key, value in (entry.items() if isinstance(entry, dict) else [("", entry)])}  # fmt: skip


def test_configs_differ_only_in_what_they_are_about():
    ddp = flat(CONFIGS / "ddp.json")
    about = {
        "single_device": {"strategy."}, "mixed_precision": {"strategy.", "train.precision"}, "ddp": set(),
        "fsdp": {"strategy."}, "tensor_parallel": {"strategy.", "tp_dimensions."}, "deepspeed": {"strategy."},
    }  # fmt: skip
    assert {file.stem for file in CONFIGS.glob("*.json")} == set(about)
    for name, keys in about.items():
        config = flat(CONFIGS / f"{name}.json")
        assert {key for key in config if config[key] != ddp.get(key)} == keys, name
    assert flat(CONFIGS / "mixed_precision.json") == flat(CONFIGS / "single_device.json") | {"train.precision": "bf16"}


def test_the_124m_model_is_that_of_ddp():
    """What the YAML file leaves out has the value of ddp/'s by default."""
    theirs = flat(ROOT / "ddp" / "configs" / "gpt_124m.yaml")
    mine = flat(CONFIGS / "gpt_124m.yaml")
    assert mine.pop("strategy.") == "ddp"
    assert {key: theirs[key] for key in mine} == mine


def only_run(folder):
    (run,) = (folder / "runs").iterdir()
    return run


def test_lightnings_own_launcher(launch, tmp_path):
    """Plain python starts the second process itself; the file comes from CONFIG_FILE; nothing lies about afterwards."""
    before = set(ROOT.iterdir())
    result = launch(SCRIPT, *QUICK, "--devices", "2", nproc=0, env={"CONFIG_FILE": str(CONFIGS / "fsdp.json")})
    record = json.loads((only_run(tmp_path) / "run.json").read_text())
    assert (record["framework"], record["strategy"], record["launcher"]) == ("lightning", "fsdp", "lightning")
    assert (record["world_size"], record["mesh"]) == (
        2,
        {"dp_replicate": 1, "dp_shard": 2, "tp": 1, "pp": 1, "cp": 1, "ep": 1},
    )
    assert "lightning" in record["versions"]
    assert result.stdout.count("finished after 3 of 3 steps") == 1  # rank 0 speaks for all
    assert set(ROOT.iterdir()) == before  # no lightning_logs, no checkpoints
    names = {path.name for path in only_run(tmp_path).iterdir()}
    assert {"config.yaml", "run.json", "metrics.jsonl", "checkpoints", "loss.png"} <= names


@slow  # test_bad_input.py has the settings without the training
def test_torchrun_and_which_settings_win(launch, tmp_path):
    """--config beats CONFIG_FILE, and the command line beats both."""
    more = ["--config", "lightning/configs/tensor_parallel.json", "--tp_dimensions", "[2, 1, 1]"]
    launch(SCRIPT, *QUICK, *more, env={"CONFIG_FILE": str(CONFIGS / "single_device.json")})
    record = json.loads((only_run(tmp_path) / "run.json").read_text())
    assert (record["strategy"], record["launcher"]) == ("tensor", "torchrun")
    assert record["mesh"] == {"dp_replicate": 1, "dp_shard": 1, "tp": 2, "pp": 1, "cp": 1, "ep": 1}


@pytest.mark.parametrize(("strategy", "ranks", "dimensions", "part", "placements"), [
    ("ddp", 2, None, 1, None), ("fsdp", 2, None, 1 / 2, ["S(0)"]),
    ("tensor_parallel", 2, None, 1 / 2, ["_S(0, 2)", "S(0)"]),
    pytest.param("tensor_parallel", 4, "[2, 1, 2]", 1 / 4, ["_S(0, 2)", "S(0)"], marks=slow),
])  # fmt: skip
def test_what_a_rank_holds(group, tmp_path, strategy, ranks, dimensions, part, placements):
    """Its part of a matrix, and of the optimizer's averages; one FSDP unit a block, and the root."""
    options = ["--strategy", strategy, "--runs_dir", str(tmp_path)]
    options += ["--tp_dimensions", dimensions] if dimensions else []
    for held in group(ranks)(ON_RANKS.held, [*QUICK, *options]):
        assert held["query"] == held["averages"] == 32 * 32 * part
        assert held["units"] == (0 if strategy == "ddp" else 1 + 2)
        # Norms are cut by FSDP alone: every tensor rank has them whole.
        assert held["norm"] == 32 * (part if strategy == "fsdp" else 1 / 2 if dimensions else 1)
        assert held["placements"] == placements


@pytest.mark.parametrize(("strategy", "hold_back", "a_step"), [
    # DDP has one bucket for so small a model; FSDP one reduce-scatter a unit.
    ("ddp", True, 1), ("fsdp", True, 3), pytest.param("fsdp", False, 3 * 4, marks=slow),
])  # fmt: skip
def test_gradients_travel_once_a_step(group, tmp_path, strategy, hold_back, a_step):
    """With four micro-batches a step: held back by Lightning for DDP, by the module for FSDP, or by nobody."""
    options = ["--strategy", strategy, "--runs_dir", str(tmp_path), "--batch.micro_size", "3"]
    for counts in group(2)(ON_RANKS.communication, [*QUICK, *options], hold_back):
        assert counts["gradients"] == 3 * a_step, counts
        # What Lightning adds: before each micro-batch all ranks ask rank 0 whether it was told to end.
        assert counts["broadcasts"] == 3 * 4, counts


@pytest.mark.parametrize(("checkpointing", "times"), [("true", 2), pytest.param("false", 1, marks=slow)])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_activation_checkpointing_computes_again(group, tmp_path, strategy, checkpointing, times):
    """Each of the two blocks is computed in the forward, and in the backward again: the losses do not show it."""
    options = ["--strategy", strategy, "--train.activation_checkpointing", checkpointing, "--train.steps", "1"]
    calls = group(2)(ON_RANKS.attention_calls, [*SMALL, *options, "--runs_dir", str(tmp_path)])
    assert calls == [2 * times] * 2


def test_fsdp_sends_gradients_in_fp32_where_it_computes_in_bf16(group, tmp_path):
    """Sums of many ranks in bf16 would lose what is small."""
    options = ["--strategy", "fsdp", "--train.precision", "bf16", "--train.steps", "1", "--runs_dir", str(tmp_path)]
    assert group(2)(ON_RANKS.reduced_in, [*SMALL, *options]) == [{torch.float32}] * 2


WITHOUT_THE_GUARD = """
import argparse, runpy, sys
import deepspeed
import lightning.pytorch.strategies.deepspeed as strategy
from lightning.pytorch.accelerators import CPUAccelerator
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else minutes of compilation
strategy.CUDAAccelerator, strategy._validate_device_index_selection = CPUAccelerator, lambda devices: None
initialize = deepspeed.initialize
deepspeed.initialize = lambda args, **more: initialize(args=argparse.Namespace(device_rank=-1), **more)
sys.path.insert(0, sys.argv[1])
import launch
shape = launch.mesh_shape
launch.mesh_shape = lambda config, launch: shape(config, launch._replace(device_type="cuda"))
sys.argv[:2] = [sys.argv[1] + "/train.py"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@slow
def test_deepspeed_where_lightning_lets_it_run(launch, single_device, tmp_path):
    """Lightning's DeepSpeedStrategy wants GPUs, DeepSpeed does not: with Lightning's look at the accelerator, and ours,
    taken out, this is its training on CPUs. Everything else is as a GPU would have it."""
    (tmp_path / "unguarded.py").write_text(WITHOUT_THE_GUARD)
    options = ["--train.steps", "6", "--train.eval_every", "4"]
    more = ["--strategy", "deepspeed", "--run_name", "many"]
    command = [tmp_path / "unguarded.py", ROOT / "lightning", *SMALL, *options, *more]
    launch(*command, env={"DS_ACCELERATOR": "cpu"})
    assert_same_rows(single_device(*SMALL, *options), tmp_path / "runs" / "many", 1e-5)  # fp32, as everywhere
    assert (tmp_path / "runs" / "many" / "checkpoints" / "deepspeed" / "latest").is_file()
    # Nothing can go on from it: a second run of this name (a requeued job) would begin anew, and empty the record.
    again = launch(*command, env={"DS_ACCELERATOR": "cpu"}, check=False)
    assert "exists already, and resume = never; choose another run_name" in again.stderr
    assert again.stderr.count("error: ") >= 1 and len(read_rows(tmp_path / "runs" / "many")) == 6


@slow
@slurm
@pytest.mark.parametrize(("config", "sbatch", "world_size", "hosts"), [
    ("fsdp", ["lightning/multi_node.sbatch"], 4, ["node1", "node2"]),
    ("single_device", ["--ntasks-per-node=1", "lightning/single_node.sbatch"], 1, ["node1"]),
    ("mixed_precision", ["--ntasks-per-node=1", "lightning/single_node.sbatch"], 1, ["node1"]),
    ("ddp", ["lightning/single_node.sbatch"], 2, ["node1"]),
    ("tensor_parallel", ["--ntasks-per-node=4", "lightning/single_node.sbatch"], 4, ["node1"]),
])  # fmt: skip
def test_sbatch(cluster, config, sbatch, world_size, hosts):
    """One file of settings for each way to train, given by CONFIG_FILE; Lightning finds the tasks of srun."""
    job = cluster.submit(*sbatch, *QUICK, CONFIG_FILE=f"lightning/configs/{config}.json")
    cluster.completed(job, timeout=200)
    folder = cluster.run_folder(job)
    record = json.loads((folder / "run.json").read_text())
    launcher = "srun"
    assert (record["launcher"], record["world_size"], record["hosts"]) == (launcher, world_size, hosts)
    assert len(read_rows(folder)) == 3


@slurm
@slow
@pytest.mark.parametrize(("sbatch", "arguments", "words"), [
    (["--ntasks-per-node=2", "lightning/single_node.sbatch"], ["--strategy", "single_device"], "identical runs"),
    (["--ntasks-per-node=2", "lightning/single_node.sbatch"], ["--devices", "4"], "devices = 4, but srun started 2"),
    (["--ntasks-per-node=2", "lightning/single_node.sbatch"],
     ["--config", "lightning/configs/tensor_parallel.json"], "tp_dimensions = [4, 1, 1] with 2 rank(s)"),
])  # fmt: skip
def test_sbatch_with_a_mistake(cluster, sbatch, arguments, words):
    job = cluster.submit(*sbatch, *arguments)
    assert cluster.end_of(job) == "FAILED"
    output = cluster.output(job)
    assert words in output
    assert "Traceback" not in output
