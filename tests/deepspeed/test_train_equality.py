"""Every stage of ZeRO must give the training of one process, keep the bytes it promises, and go on from any other."""

import json
import math
import re

import pytest
from equality import (
    SMALL,
    STEPS,
    assert_same_first_gradients,
    assert_same_rows,
    assert_trains_in_low_precision,
    largest_difference,
    read_checkpoint,
    read_rows,
)
from launching import ROOT, OnRanks, assert_refused

from common.transformer import ModelConfig, Transformer

SCRIPT = "deepspeed/train.py"
ON_RANKS = OnRanks("tests/deepspeed/deepspeed_on_ranks.py")
slow = pytest.mark.slow
BASE = [*SMALL, "--train.steps", str(STEPS), "--batch.global_size", "48"]
LONG = ["--train.steps", "20"]  # where the loss must have fallen by 0.5
STAGES = ["zero0", "zero1", "zero2", "zero3"]
OFFLOAD = ["zero1_cpu_offload", "zero2_cpu_offload", "zero2_cpu_offload_pinned_memory", "zero3_cpu_offload"]


def arguments(folder, config, *more):
    places = ["--runs_dir", str(folder), "--run_name", "many"]
    return [*BASE, *places, "--deepspeed_config", f"deepspeed/configs/{config}.json", *more]


def accumulate(ranks, accumulation):
    return ["--batch.micro_size", str(48 // ranks // accumulation)]


def steps_of_the_optimizer(run, steps):
    """What AdamW itself counted, for every parameter."""
    return {int(t) for name, t in read_checkpoint(run, steps).items() if name.endswith(".step")}


FIRST = [("zero0", 4), ("zero1", 1), ("zero2", 1), ("zero3", 4)]


@pytest.mark.parametrize(("config", "accumulation"), [
    pytest.param(config, count, marks=[] if (config, count) in FIRST else slow)
    for config in [*STAGES, *OFFLOAD] for count in (1, 4)
])  # fmt: skip
def test_first_gradients(group, single_device, tmp_path, config, accumulation):
    """DeepSpeed has no fp64 to prove it with: the first step's gradients are, parameter by parameter.

    Weight decay is in the parameters, and comes out wrong when a matrix is taken for a vector.
    """
    options = ["--train.steps", "1", "--optimizer.clip", "1000", "--optimizer.weight_decay", "10"]
    one = single_device(*BASE, *options)
    group(2)(ON_RANKS.train, SCRIPT, arguments(tmp_path, config, *options, *accumulate(2, accumulation)))
    assert_same_first_gradients(one, tmp_path / "many", 2 + 2 * 9 + 1)
    assert_same_rows(one, tmp_path / "many", 1e-5)
    a, b = read_checkpoint(one, 1), read_checkpoint(tmp_path / "many", 1)
    assert largest_difference(a, b, "model.") <= 1e-6  # one step of 3e-4 to 1e-3: a lost decay would be 3e-4


@pytest.mark.parametrize(("ranks", "config", "accumulation"), [
    (2, "zero1", 4), (2, "zero3_cpu_offload", 1), (2, "zero2_cpu_offload", 4), (3, "zero2", 4), (3, "zero3", 1),
    *(pytest.param(2, name, 4, marks=slow) for name in ("zero2", "zero3")),
    *(pytest.param(3, name, 1, marks=slow) for name in ("zero2",)),
    *(pytest.param(4, name, count, marks=slow) for name in [*STAGES, *OFFLOAD] for count in (1, 4)),
])  # fmt: skip
def test_training(group, single_device, tmp_path, ranks, config, accumulation):
    """At 3 ranks partitions end in padding. AdamW's division by small roots amplifies the last bits of fp32."""
    one, many = single_device(*BASE), tmp_path / "many"
    group(ranks)(ON_RANKS.train, SCRIPT, arguments(tmp_path, config, *accumulate(ranks, accumulation)))
    assert_same_rows(one, many, 1e-5)
    a, b = read_checkpoint(one, STEPS), read_checkpoint(many, STEPS)
    assert largest_difference(a, b, "model.") <= 1e-4
    assert steps_of_the_optimizer(many, STEPS) == {STEPS}  # one for each global batch, not for each micro-batch


@pytest.mark.parametrize("config", ["zero3", *(pytest.param(n, marks=slow) for n in STAGES[1:3])])
def test_bf16_trains(group, single_device, tmp_path, config):
    """DeepSpeed computes with bf16 weights, where autocast casts operations: losses are close, not equal."""
    group(2)(ON_RANKS.train, SCRIPT, arguments(tmp_path, config, "--train.precision", "bf16", *LONG))
    assert_trains_in_low_precision(single_device(*BASE, *LONG), tmp_path / "many")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_file_leaves_out_comes_from_the_settings(group, single_device, tmp_path, precision):
    """DeepSpeed's defaults would be another training: no accumulation, fp32, gradients clipped at 1."""
    file = tmp_path / "short.json"
    file.write_text('{"zero_optimization": {"stage": 2}}')
    options = ["--optimizer.clip", "0.5"]
    more = [*accumulate(2, 4), "--deepspeed_config", str(file), "--train.precision", precision]
    options += LONG if precision == "bf16" else []
    group(2)(ON_RANKS.train, SCRIPT, arguments(tmp_path, "zero2", *options, *more))
    one, many = single_device(*BASE, *options), tmp_path / "many"
    if precision == "bf16":
        assert_trains_in_low_precision(one, many)
    else:
        assert_same_rows(one, many, 1e-5)
        a, b = read_checkpoint(one, STEPS), read_checkpoint(many, STEPS)
        assert largest_difference(a, b, "model.") <= 1e-4


def test_sections_that_change_no_training(group, single_device, tmp_path):
    """What stands in many files: how to read from disk, what to print and to record."""
    settings = json.loads((ROOT / "deepspeed" / "configs" / "zero2.json").read_text())
    settings |= {
        "aio": {"block_size": 1048576}, "activation_checkpointing": {"partition_activations": False},
        "flops_profiler": {"enabled": False}, "tensorboard": {"enabled": False}, "csv_monitor": {"enabled": False},
        "comms_logger": {"enabled": False}, "compile": {}, "data_efficiency": {"enabled": False}, "pipeline": {},
        "steps_per_print": 100,
    }  # fmt: skip
    settings["zero_optimization"]["offload_param"] = None
    (tmp_path / "long.json").write_text(json.dumps(settings))
    more = ["--train.steps", "3", "--deepspeed_config", str(tmp_path / "long.json")]
    group(2)(ON_RANKS.train, SCRIPT, arguments(tmp_path, "zero2", *more))
    assert_same_rows(single_device(*BASE, "--train.steps", "3"), tmp_path / "many", 1e-5)


@pytest.mark.parametrize("options", [
    ["--model.tied", "true"], ["--train.activation_checkpointing", "true"], ["--optimizer.name", "sgd"],
], ids=lambda options: " ".join(options))  # fmt: skip
def test_options_of_stage_3(group, single_device, tmp_path, options):
    options = [*options, *(["--optimizer.lr", "0.01"] if "sgd" in options else [])]
    group(2)(ON_RANKS.train, SCRIPT, arguments(tmp_path, "zero3", *options))
    assert_same_rows(single_device(*BASE, *options), tmp_path / "many", 1e-5)


# ------------------------------------------------------------------------------------------------------- bytes


SHAPES = [p.shape for p in Transformer(ModelConfig(width=32, ffn_width=48, layers=2)).parameters()]  # those of SMALL
WHOLE = sum(map(math.prod, SHAPES))


def partition(ranks, stage):
    """Elements of a rank's part, and of the gradients that it keeps between micro-batches.

    Stage 3 cuts every parameter. 1 and 2 cut the optimizer's groups (matrices, vectors), each filled up to a multiple
    of two elements a rank; of a parameter that the cut goes through, stage 2 keeps the gradient whole.
    """
    if stage == 3:
        part = sum(-(-math.prod(shape) // ranks) for shape in SHAPES)
        return part, part
    part = gradients = 0
    for group in ([s for s in SHAPES if len(s) >= 2], [s for s in SHAPES if len(s) < 2]):
        sizes = [math.prod(shape) for shape in group]
        mine = -(-sum(sizes) // (2 * ranks)) * 2
        part += mine
        gradients += sum(size for number, size in enumerate(sizes) if sum(sizes[:number]) < mine)
    return part, gradients


@pytest.mark.parametrize(("ranks", "stage"), [
    (2, 0), (2, 1), (2, 2), (3, 3), *(pytest.param(*case, marks=slow) for case in [(2, 3), (3, 1), (3, 2), (4, 3)]),
])  # fmt: skip
def test_bytes_per_rank(group, tmp_path, ranks, stage):
    """Weights, gradients, the fp32 copy and AdamW's two averages, against the formula (arXiv 1910.02054, figure 1)."""
    options = ["--train.steps", "2", *accumulate(ranks, 2)]
    printed = group(ranks)(ON_RANKS.printed, SCRIPT, arguments(tmp_path, f"zero{stage}", *options))[0]
    found = re.search(r"ZeRO stage (\d): this rank keeps (.*) \(bytes\)", printed)
    part, gradients = partition(ranks, stage)
    assert int(found[1]) == stage
    assert {kind: int(n.replace(",", "")) for n, kind in re.findall(r"([\d,]+) of (\w+)", found[2])} == {
        "weights": 4 * (part if stage == 3 else WHOLE),
        "gradients": 4 * (gradients if stage >= 2 else WHOLE),
        "master": 4 * part if stage else 0,
        "moments": 8 * (part if stage else WHOLE),
    }


LARGE = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}


@pytest.mark.parametrize(("config", "zero", "expected"), [
    ("zero0", {}, {"allreduce": (1, 1)}),
    ("zero1", {}, {"allreduce": (1, 1), "allgather_base": (1, 1)}),
    ("zero2", {}, {"allreduce": (1, 2), "allgather_base": (1, 1)}),
    ("zero3", {}, {"reduce_scatter_base": (1, 2), "allgather_base": (1, 2)}),
    # As for a model of more parameters than may stay whole: gathered for the forward, and for the backward again.
    ("zero3", LARGE, {"reduce_scatter_base": (1, 2), "allgather_base": (2, 4)}),
], ids=["0", "1", "2", "3", "3-large"])  # fmt: skip
def test_what_a_step_sends(group, tmp_path, config, zero, expected):
    """How often all parameters (or gradients) go through a collective, with one micro-batch and with two."""
    settings = json.loads((ROOT / "deepspeed" / "configs" / f"{config}.json").read_text())
    settings["zero_optimization"] |= zero
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(settings))
    more = ["--train.steps", "3", "--train.check_replicas_every", "0", "--deepspeed_config", str(file)]
    for accumulation in (1, 2):
        options = [*more, *accumulate(2, accumulation), "--run_name", f"accumulation-{accumulation}"]
        for steps in group(2)(ON_RANKS.sent, SCRIPT, arguments(tmp_path, config, *options)):
            found = {kind: count for kind, count in steps[2].items() if count > 100}  # not norm, loss, stop flag
            assert found.keys() == expected.keys()
            for kind, times in expected.items():
                assert 0 <= found[kind] - times[accumulation - 1] * WHOLE <= 100, (kind, found[kind] / WHOLE)


def test_an_evaluation_of_unequal_parts(group, single_device, tmp_path):
    """25 samples on 3 ranks are 2, 1 and 1 batches of 8; where every forward gathers, a rank may not be missing."""
    settings = json.loads((ROOT / "deepspeed" / "configs" / "zero3.json").read_text())
    settings["zero_optimization"] |= LARGE
    (tmp_path / "zero.json").write_text(json.dumps(settings))
    more = ["--train.steps", "1", *accumulate(3, 2), "--deepspeed_config", str(tmp_path / "zero.json")]
    group(3)(ON_RANKS.train, SCRIPT, arguments(tmp_path, "zero3", *more))
    assert_same_rows(single_device(*BASE, "--train.steps", "1"), tmp_path / "many", 1e-5)


# ------------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize(("first", "then"), [
    (("zero2", 2), ("zero2", 2)),
    (("zero3", 2), ("zero1", 3)),
    (("zero3", 2), ("ddp", 2)),
    (("ddp", 2), ("zero3", 3)),
    pytest.param(("zero1", 2), ("ddp", 2), marks=slow),
    pytest.param(("zero3", 4), ("zero3", 2), marks=slow),
    pytest.param(("zero2_cpu_offload", 2), ("zero3_cpu_offload", 4), marks=slow),
], ids=lambda value: f"{value[0]} on {value[1]}")  # fmt: skip
def test_resume_elsewhere(group, single_device, tmp_path, first, then):
    """Half of the steps in one stage on some ranks, half in another on others, or under DDP: those of one process."""

    def go(function, config, ranks, *more):
        script = "ddp/train.py" if config == "ddp" else SCRIPT
        given = arguments(tmp_path, config)
        given = given[: given.index("--deepspeed_config")] if config == "ddp" else given
        group(ranks)(function, script, given, *more)

    go(ON_RANKS.train_until, *first, STEPS // 2)
    assert len(read_rows(tmp_path / "many")) == STEPS // 2
    go(ON_RANKS.train, *then)
    one, many = single_device(*BASE), tmp_path / "many"
    assert_same_rows(one, many, 1e-5)
    assert largest_difference(read_checkpoint(one, STEPS), read_checkpoint(many, STEPS), "model.") <= 1e-4
    assert steps_of_the_optimizer(many, STEPS) == {STEPS}


def test_run_record(group, tmp_path):
    group(2)(ON_RANKS.train, SCRIPT, arguments(tmp_path, "zero2", "--train.steps", "2"))
    record = json.loads((tmp_path / "many" / "run.json").read_text())
    assert (record["framework"], record["strategy"], record["world_size"]) == ("deepspeed", "zero2", 2)
    assert record["versions"]["deepspeed"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("config", ["zero2_cpu_offload", "zero3_cpu_offload"])
def test_compiled_optimizer(launch, single_device, tmp_path, config):
    """DeepSpeed's AdamW for the CPU, compiled at first use, in place of torch's: the same training, also resumed."""
    settings = json.loads((ROOT / "deepspeed" / "configs" / f"{config}.json").read_text())
    del settings["zero_force_ds_cpu_optimizer"]  # then DeepSpeed insists on its own
    file = tmp_path / "compiled.json"
    file.write_text(json.dumps(settings))
    given = [*arguments(tmp_path, config), "--deepspeed_config", file]
    launch(SCRIPT, *given, "--train.steps", "1", timeout=400)
    launch(SCRIPT, *given)  # goes on from the first step
    one, many = single_device(*BASE), tmp_path / "many"
    for a, b in zip(read_rows(one), read_rows(many), strict=True):  # many was also evaluated after one step
        assert abs(a["loss"] - b["loss"]) <= 1e-5 and abs(a["grad_norm"] - b["grad_norm"]) <= 1e-4
    assert largest_difference(read_checkpoint(one, STEPS), read_checkpoint(many, STEPS), "model.") <= 1e-4
    assert steps_of_the_optimizer(many, STEPS) == {STEPS}
    # A checkpoint of theirs is one of AdamW: torch's goes on from it.
    assert "resumed from" in launch(SCRIPT, *arguments(tmp_path, config), "--train.steps", str(STEPS + 1)).stdout
    # It was theirs: nothing else could be built, and without a compiler there is none.
    refused = launch(SCRIPT, *given, "--run_name", "sgd", "--optimizer.name", "sgd", check=False)
    assert "DeepSpeed has AdamW alone for the CPU" in refused.stderr
    nowhere = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "empty"), "CXX": "/bin/false"}
    assert launch(SCRIPT, *given, "--run_name", "none", check=False, env=nowhere).returncode != 0


# ------------------------------------------------------------------------------------------------ configurations


def test_files_differ_in_zero_alone():
    """One file a lesson: what is not ZeRO is the same in all, and no file holds a batch size."""
    files = {path.stem: json.loads(path.read_text()) for path in (ROOT / "deepspeed" / "configs").glob("zero*.json")}
    assert files.keys() == {*STAGES, *OFFLOAD, "zero3_nvme_offload"}
    rest = [{k: v for k, v in settings.items() if k != "zero_optimization"} for settings in files.values()]
    assert all(each == rest[0] for each in rest)
    assert {rest[0][key] for key in rest[0] if "batch" in key or "accumulation" in key} == {"auto"}
    zero = {name: settings["zero_optimization"] for name, settings in files.items()}
    for name, settings in zero.items():
        assert settings["stage"] == int(name[4])
        plain = {k: v for k, v in settings.items() if not k.startswith("offload")}
        assert plain == zero[name[:5]]
    pinned, pageable = zero["zero2_cpu_offload_pinned_memory"], zero["zero2_cpu_offload"]
    assert pinned == pageable | {"offload_optimizer": pageable["offload_optimizer"] | {"pin_memory": True}}
    assert not pageable["offload_optimizer"]["pin_memory"]  # DeepSpeed's default is to pin


@pytest.mark.parametrize(("change", "options", "words"), [
    (None, [], "no_such.json: No such file"),
    ("text", [], "no_such.json: not valid JSON: line 1"),
    ("[]", [], "holds a list"),
    ({"zero_optimisation": {}}, [], "unknown key zero_optimisation; did you mean zero_optimization?"),
    ({"zero_optimization": {"stage": 4}}, [], "zero_optimization.stage = 4; allowed: 0, 1, 2, 3"),
    ({"zero_optimization": {"stge": 2}}, [], "unknown key zero_optimization.stge; did you mean stage?"),
    ({"zero_optimization": True}, [], "zero_optimization = true; expected an object"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, [],
     "zero_optimization.offload_optimizer: Input should be a valid dictionary"),
    ({"zero_optimization": {"stage": 3, "offload_param": {"devise": "cpu"}}}, [],
     "unknown key zero_optimization.offload_param.devise; did you mean device?"),
    ({"zero_optimization": {"stage": 3, "cpu_offload": True, "offload_optimizer": {"device": "cpu"}}}, [],
     "zero_optimization.cpu_offload is an old name; write offload_optimizer in its place"),
    ({"bf16": True}, [], "bf16 = true; expected an object"),
    ({"bf16": {"enable": True}}, [], "unknown key bf16.enable; did you mean enabled?"),
    ({"fp16": {"loss_scale": -1}}, [], "fp16.loss_scale: Value error, fp16.loss_scale must be >= 0"),
    ({"loss_scale": 0}, [], "unknown key loss_scale"),  # a key of fp16, not of the whole
    ({"optimizer": {"type": "AdamW"}}, [], "optimizer is set by optimizer.* here; take it out of the file"),
    ({"scheduler": {"type": "WarmupLR"}}, [], "scheduler is set by optimizer.* here; take it out of the file"),
    ({"train_batch_size": 32}, [], "train_batch_size = 32, but the settings give 48"),
    ({}, ["--train.precision", "fp64"], "DeepSpeed reduces no gradients in fp64"),
    ({}, ["--train.precision", "fp16"], "DeepSpeed has no fp16 on the CPU"),
    ({"zero_optimization": {"stage": 0}}, ["--train.precision", "bf16"], "DeepSpeed has another optimizer there"),
    ({}, ["--batch.micro_size", "5"], "batch.micro_size = 5 does not divide"),
    ({}, ["--zero.stage", "2"], "unknown key zero.stage"),
], ids=str)  # fmt: skip
def test_bad_input(group, tmp_path, change, options, words):
    """One line, code 2, on every rank."""
    file = tmp_path / "no_such.json"
    if change is not None:
        base = json.loads((ROOT / "deepspeed" / "configs" / "zero2.json").read_text())
        file.write_text(change if isinstance(change, str) else json.dumps(base | change))
    given = [*arguments(tmp_path, "zero2"), "--deepspeed_config", str(file), *options]
    assert_refused(group(2)(ON_RANKS.ends, SCRIPT, given), words)
    assert not (tmp_path / "many").exists()
