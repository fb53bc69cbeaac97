"""planner/dry_run.py: what it says of fake ranks is what real ranks measure; and it says what it cannot do."""

import json
import shutil
import sys
from functools import cache

import pytest
import torch
import torch.distributed as dist
from launching import ROOT, OnRanks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import _functional_collectives as functional
from torch.testing._internal.distributed.fake_pg import FakeStore

from common.data import TextConfig, text_datasets
from planner import dry_run
from planner.fake_ranks import DryRun, no_group_left
from planner.meter import Meter

ON_RANKS = OnRanks("tests/planner/measured_on_ranks.py")
FSDP, TENSOR = "fsdp/train.py", "model_parallel/tensor_parallel.py"
PIPELINE, HYBRID = "model_parallel/pipeline_parallel.py", "model_parallel/hybrid_parallel.py"
CONTEXT = "model_parallel/context_parallel.py"
BATCH = ["--batch.global_size", "8", "--data.validation_samples", "8"]


@cache
def dry(script, world_size, *settings, rank=0, micro_batches=None):
    """The report of a dry run in this process; made once, and not to be changed."""
    measured = DryRun(ROOT / script, world_size, rank, micro_batches).run(list(settings))
    return dry_run.report(measured, list(settings), 0.0)


def meter_of_one(operation):
    """A meter that has seen one operation on two fake ranks."""
    meter = Meter()
    with no_group_left():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        with FakeTensorMode(), meter:
            operation()
    return meter


def by_group(report):
    """(collective, ranks of its group) -> count, bytes."""
    sums = {}
    for row in report["collectives"]:
        count, nbytes = sums.get((row["kind"], row["ranks"]), (0, 0))
        sums[row["kind"], row["ranks"]] = count + row["count"], nbytes + row["bytes"]
    return sums


def row(report, kind, axis):
    (found,) = [row for row in report["collectives"] if (row["kind"], row["axis"]) == (kind, axis)]
    return found


@pytest.mark.parametrize(("script", "ranks", "options"), [
    (FSDP, 2, []),
    pytest.param(FSDP, 2, ["--fsdp.reshard_after_forward", "false"], marks=pytest.mark.slow),
    pytest.param(FSDP, 2, ["--fsdp.replicate", "2"], marks=pytest.mark.slow),
    (FSDP, 2, ["--batch.micro_size", "2"]),  # two micro-batches
    pytest.param(FSDP, 2, ["--train.precision", "bf16"], marks=pytest.mark.slow),
    pytest.param(FSDP, 2, ["--train.activation_checkpointing", "true"], marks=pytest.mark.slow),
    pytest.param(FSDP, 4, ["--fsdp.replicate", "2"], marks=pytest.mark.slow),
    pytest.param(FSDP, 4, ["--model.ffn_width", "50"], marks=pytest.mark.slow),  # rows that 4 ranks do not divide
    pytest.param(FSDP, 4, ["--fsdp.reshard_after_forward", "false"], marks=pytest.mark.slow),
    (TENSOR, 2, []),
    pytest.param(TENSOR, 2, ["--sequence_parallel", "false"], marks=pytest.mark.slow),
    pytest.param(TENSOR, 4, ["--mesh.dp", "2"], marks=pytest.mark.slow),
    pytest.param(TENSOR, 4, ["--mesh.dp", "2", "--sequence_parallel", "false"], marks=pytest.mark.slow),
    (PIPELINE, 2, ["--batch.micro_size", "2"]),
    pytest.param(PIPELINE, 2, ["--batch.micro_size", "2", "--schedule", "zero_bubble"], marks=pytest.mark.slow),
    pytest.param(PIPELINE, 4, ["--batch.micro_size", "2", "--schedule", "gpipe"], marks=pytest.mark.slow),
    pytest.param(HYBRID, 2, ["--batch.micro_size", "2", "--mesh.tp", "1"], marks=pytest.mark.slow),
    (CONTEXT, 2, []),
    pytest.param(CONTEXT, 4, ["--mesh.dp", "2"], marks=pytest.mark.slow),
    pytest.param(HYBRID, 4, ["--batch.micro_size", "2"], marks=pytest.mark.slow),
    pytest.param(HYBRID, 4, ["--batch.micro_size", "2", "--mesh.tp", "1"], marks=pytest.mark.slow),
], ids=lambda value: " ".join(value) if isinstance(value, list) else str(value).replace("/", " "))  # fmt: skip
def test_fake_ranks_hold_and_send_what_real_ones_do(group, tmp_path, script, ranks, options):
    """Byte for byte, on every rank, of a script that runs unchanged in both."""
    repeats = "--batch.micro_size" in options or "--train.activation_checkpointing" in options
    real = group(ranks)(ON_RANKS.measured, script, [*BATCH, *options, "--runs_dir", str(tmp_path)], not repeats)
    for rank in range(ranks):
        report = dry(script, ranks, *BATCH, *options, rank=rank)
        for quantity in ("parameters", "gradients", "optimizer state"):
            assert report["bytes"][quantity] == real[rank][quantity] > 0, (rank, quantity)
        assert by_group(report) == real[rank]["sent"], rank
        if repeats:
            continue
        # 64 bytes: beside what autograd saves there are scalars of the loss, beside the peak those of the log.
        assert abs(report["bytes"]["activations"] - real[rank]["saved"]) <= 64
        order = 8 * len(text_datasets(TextConfig(), 256)[0])  # the epoch's permutation, which no device holds
        assert abs(report["bytes"]["peak"] - (real[rank]["peak"] - order)) <= 64
        assert sum(report["peak"]["held"].values()) == report["bytes"]["peak"]


WIDE = ["--model.preset", "llama3_8b", "--model.layers", "3", "--data.sequence_length", "2048",
        "--batch.micro_size", "1", "--batch.global_size", "64"]  # fmt: skip


@pytest.mark.parametrize(("script", "options", "names"), [
    (FSDP, ["--fsdp.replicate", "8", "--train.precision", "bf16"],
     ["all-gather dp_shard", "reduce-scatter dp_shard", "all-reduce dp_replicate"]),
    (TENSOR, ["--mesh.tp", "8", "--mesh.dp", "8"],
     ["all-gather tp", "reduce-scatter tp", "all-gather dp", "reduce-scatter dp"]),
    (CONTEXT, ["--mesh.dp", "8"],
     ["all-gather cp", "reduce-scatter cp", "all-gather world", "reduce-scatter world"]),
    *(pytest.param(*row, marks=pytest.mark.slow) for row in [
        (FSDP, [], ["all-gather world", "reduce-scatter world"]),
        (FSDP, ["--fsdp.reshard_after_forward", "false"], ["all-gather world", "reduce-scatter world"]),
        (CONTEXT, ["--train.precision", "bf16"], ["all-gather world", "reduce-scatter world"]),
    ]),
], ids=lambda value: " ".join(value) if isinstance(value, list) else value.replace("/", " "))  # fmt: skip
def test_formulas_on_64_ranks(script, options, names):
    """What the lessons' READMEs say beforehand is what is counted afterwards; 64 ranks divide everything here."""
    report = dry(script, 64, *WIDE, *options)
    formulas = {name: entry["value"] for name, entry in report["formulas"].items()}
    for quantity in ("parameters", "gradients", "optimizer state"):
        assert report["bytes"][quantity] == formulas[quantity], quantity
    for name in names:
        found = row(report, *name.split(" "))
        assert found["count"] == formulas[f"{name} count"], name
        assert found["bytes"] == formulas[f"{name} bytes"], name


def test_fsdp_in_numbers_worked_out_by_hand():
    """Llama 3 8B with 3 layers on 64 ranks, from its shapes."""
    embedding, norm = 128256 * 4096, 4096
    block = 2 * norm + 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    whole = 2 * embedding + norm + 3 * block
    report = dry(FSDP, 64, *WIDE)
    assert report["bytes"]["parameters"] == 4 * whole // 64
    assert report["bytes"]["optimizer state"] == 8 * whole // 64
    gathers = row(report, "all-gather", "world")
    assert (gathers["count"], gathers["bytes"]) == (1 + 2 * 3, 4 * (whole + 3 * block))
    assert gathers["sent_bytes"] == 4 * (whole + 3 * block) * 63 // 64
    # Of a block with 2048 tokens backward needs at least both norms' inputs, and three results of the feed-forward.
    assert report["bytes"]["activations"] > 3 * 4 * 2048 * (2 * 4096 + 3 * 14336)


def test_recomputation_keeps_less_and_sends_the_same():
    kept = dry(FSDP, 64, *WIDE)
    again = dry(FSDP, 64, *WIDE, "--train.activation_checkpointing", "true")
    of_the_head = 4 * 128256 * 4096  # its gradient is there when the forward ends; see common/loss.py
    assert again["bytes"]["activations"] - of_the_head < (kept["bytes"]["activations"] - of_the_head) / 3
    assert again["collectives"] == kept["collectives"]
    assert again["peak"]["when"].startswith("backward")


@pytest.mark.parametrize(("schedule", "in_flight"), [("gpipe", 8), ("1f1b", 3)])
def test_micro_batches_in_flight(schedule, in_flight):
    """Rank 1 of 4: GPipe keeps all of 8, 1F1B min(m, p - s); another micro-batch is the same again."""
    options = ["--batch.global_size", "16", "--batch.micro_size", "2", "--schedule", schedule]
    several = dry(PIPELINE, 4, *options, rank=1)["bytes"]["activations"]
    alone = dry(PIPELINE, 4, "--batch.global_size", "2", "--batch.micro_size", "2", "--schedule", "gpipe", rank=1)
    # 5 %: the schedule's own small tensors, and the gradient that has arrived when the first backward begins
    assert several / in_flight == pytest.approx(alone["bytes"]["activations"], rel=0.05)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_formulas_of_stages(rank):
    """Four layers on three ranks: 2, 1 and 1; the first stage has the embedding, the last norm and head."""
    report = dry(PIPELINE, 3, "--batch.micro_size", "3", rank=rank)
    for quantity in ("parameters", "gradients", "optimizer state"):
        assert report["bytes"][quantity] == report["formulas"][quantity]["value"], quantity
    assert row(report, "send", "world")["bytes"] == report["formulas"]["send world bytes"]["value"]


def test_stages_differ():
    reports = [dry(PIPELINE, 4, *BATCH, "--batch.micro_size", "2", rank=rank) for rank in range(4)]
    assert [row(report, "send", "world")["count"] for report in reports] == [4, 8, 8, 4]
    first, second, _, last = (report["bytes"]["parameters"] for report in reports)
    assert first - second == 4 * 256 * 128 and last - second == 4 * (256 * 128 + 128)  # embedding; head and norm


def test_the_mesh_is_seen_from_the_asked_rank():
    """The second of two stages has the last norm, of 128 numbers; embedding and head are of equal size."""
    options = ["--batch.micro_size", "2", "--mesh.pp", "2", "--mesh.tp", "1"]
    first, second = (dry(HYBRID, 2, *BATCH, *options, rank=rank)["bytes"]["parameters"] for rank in (0, 1))
    assert second - first == 4 * 128


def test_the_first_stage_has_the_embedding():
    """What it gives is an activation; in the third stage it would be a message."""
    options = ["--batch.global_size", "2", "--batch.micro_size", "2", "--schedule", "gpipe"]
    first, third = (dry(PIPELINE, 4, *options, rank=rank)["bytes"]["activations"] for rank in (0, 2))
    assert first - third >= 4 * 2 * 128 * 128


def test_a_stage_is_whole_during_a_step():
    """2 x 2 x 2 ranks: the slices of the first stage, its embedding included, and at most as many gradients."""
    report = dry(HYBRID, 8, *BATCH, "--batch.micro_size", "1", "--schedule", "gpipe")
    assert report["peak"]["held"]["whole parameters"] == 2 * report["bytes"]["parameters"]
    assert report["peak"]["held"]["whole gradients"] <= 2 * report["bytes"]["gradients"]


def test_at_most_so_many_micro_batches():
    options = ["--batch.global_size", "64", "--batch.micro_size", "4"]  # 8 micro-batches on 2 ranks
    report = dry(FSDP, 2, *options, micro_batches=2)
    assert report["micro_batches"] == 2
    assert any(note.startswith("2 of 8 micro-batches") for note in report["notes"])
    assert row(report, "all-gather", "world")["count"] == 2 * 9
    three = dry(FSDP, 2, *options, micro_batches=3)
    assert three["bytes"] == report["bytes"]  # two show all there is to see


@pytest.mark.parametrize(("schedule", "enough", "each"), [
    ("1f1b", 3, 2 * 2 * 128 * 8),  # tokens and targets, of which the schedule has a copy
    pytest.param("interleaved", 6, 2 * 2 * 128 * 8 + 128 * 128 * 4, marks=pytest.mark.slow),  # and what stage 2 is sent
    pytest.param("zero_bubble", 6, 2 * 2 * 128 * 8 + 128 * 128 * 4, marks=pytest.mark.slow),
])  # fmt: skip
def test_fewer_micro_batches_show_all_but_their_messages(schedule, enough, each):
    options = ["--batch.global_size", "20", "--batch.micro_size", "1", "--schedule", schedule]
    some, more = (dry(PIPELINE, 2, *options, micro_batches=number)["bytes"] for number in (enough, 2 * enough))
    assert more == some | {"peak": some["peak"] + enough * each}


def test_collectives_without_a_name_here_count():
    meter = meter_of_one(lambda: functional.all_to_all_single(torch.empty(8), None, None, dist.group.WORLD))
    assert meter.collectives == {("_c10d_functional::all_to_all_single", "world", 2): 1}
    assert sum(meter.collective_bytes.values()) == 32


def test_it_is_the_script_that_is_counted(tmp_path):
    """A copy of the lesson that forgets its blocks: one unit, gathered once, and all of it whole at once."""
    shutil.copy(ROOT / "fsdp" / "settings.py", tmp_path)
    text = (ROOT / FSDP).read_text()
    forgotten = "(*model.blocks.values(), model)"
    assert text.count(forgotten) == 1
    text = text.replace(forgotten, "(model,)").replace("set_prefetch(list", "(lambda *_: None)(list")
    (tmp_path / "train.py").write_text(text)
    report = dry_run.report(DryRun(tmp_path / "train.py", 2, 0, None).run(BATCH), BATCH, 0.0)
    assert row(report, "all-gather", "world")["count"] == 1
    assert row(report, "all-gather", "world")["bytes"] == 4 * 853120
    assert report["formulas"]["all-gather world count"]["value"] == 9
    assert report["peak"]["held"]["whole parameters"] == 4 * 853120


def test_nothing_is_left_behind():
    before = set(sys.modules)
    dry(TENSOR, 2, *BATCH)
    assert not dist.is_initialized()
    assert not any("mesh_settings" in name for name in set(sys.modules) - before)
    with pytest.raises(SystemExit):  # after the ranks have joined
        dry(TENSOR, 2, *BATCH, "--batch.micro_size", "5")
    assert not dist.is_initialized()
    assert "common.run" in sys.modules and sys.modules["common.run"].Run.__module__ == "common.run"


def test_what_a_user_sees(monkeypatch, capsys, tmp_path):
    file = tmp_path / "report.json"
    options = ["--world_size", "64", "--device_memory_gib", "4", "--json", str(file), "--", *WIDE]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["planner/dry_run.py", FSDP, *options])
    dry_run.main()
    output, report = capsys.readouterr().out, json.loads(file.read_text())
    assert f"{report['bytes']['peak']:,}" in output
    assert "fsdp/train.py on 64 fake ranks, seen from rank 0; a step of 1 micro-batch of 1 × 2048 tokens" in output
    assert "exceeds the device's 4 GiB" in output
    assert "4 FSDP units in float32: this rank keeps" in output
    assert report["bytes"]["peak"] > 4 * 2**30
    rows = {line.split("  ")[0]: line.split() for line in output.splitlines()}
    gathers, formula = row(report, "all-gather", "world"), report["formulas"]
    assert rows["all-gather"][1:] == ["world", "64", "7", "7"] + [
        f"{value:,.0f}"
        for value in (gathers["bytes"], formula["all-gather world bytes"]["value"], gathers["sent_bytes"])
    ]
    assert rows["parameters"][1] == f"{report['bytes']['parameters']:,}"


@pytest.mark.slow
def test_under_plain_python(launch):
    output = launch("planner/dry_run.py", FSDP, "--world_size", "2", nproc=0).stdout
    assert "fsdp/train.py on 2 fake ranks, seen from rank 0" in output and "without a single real tensor" in output


@pytest.mark.parametrize(("kind", "sent"), [
    ("all-gather", 3 / 4), ("reduce-scatter", 3 / 4), ("all-reduce", 3 / 2), ("send", 1), ("receive", 0),
])  # fmt: skip
def test_bytes_in_a_ring_of_four(kind, sent):
    """Each of the n - 1 steps passes 1 / n of the whole on; an all-reduce is both."""
    assert dry_run.SENT[kind](4) == sent


@pytest.mark.slow
def test_llama_70b_on_64_ranks():
    """Parameters 70.55e9 x 4 / 64; with recomputed activations it fits into 40 GiB."""
    options = ["--model.preset", "llama3_70b", "--data.sequence_length", "4096", "--batch.global_size", "64",
               "--train.precision", "bf16", "--train.activation_checkpointing", "true"]  # fmt: skip
    report = dry(FSDP, 64, *options)
    assert report["bytes"]["parameters"] == 70553706496 * 4 // 64
    assert (row(report, "all-gather", "world")["count"], row(report, "reduce-scatter", "world")["count"]) == (161, 81)
    assert 16 * 70553706496 // 64 < report["bytes"]["peak"] < 40 * 2**30


@pytest.mark.parametrize(("arguments", "words"), [
    (["fsdp/trian.py", "--world_size", "2"], "fsdp/trian.py: no such script"),
    (["fsdp/settings.py", "--world_size", "2"], "no main(config) that trains the transformer"),
    (["fsdp/basics.py", "--world_size", "2"], "no main(config) that trains the transformer"),
    (["ddp/train.py", "--world_size", "2"], "DistributedDataParallel fills its buckets from C++"),
    (["fsdp/README.md", "--world_size", "2"], "no such script"),
    ([FSDP, "--world_size", "0"], "--rank 0 with --world_size 0"),
    ([FSDP, "--world_size", "2", "--rank", "2"], "--rank 2 with --world_size 2"),
    ([FSDP, "--world_size", "2", "--rank", "-1"], "--rank -1"),
    ([FSDP, "--world_size", "two"], "invalid int value: 'two'"),
    ([FSDP], "the following arguments are required: --world_size"),
    ([FSDP, "--world_size", "2", "--ranks", "1"], "unrecognized arguments: --ranks 1"),
    ([FSDP, "--world_size", "2", "--micro_batches", "0"], "--micro_batches 0"),
    (["ddp/single_device.py", "--world_size", "4"], "a script for one process; expected --world_size 1"),
    (["model_parallel/schedule_timeline.py", "--world_size", "2"], "no main(config) that trains the transformer"),
    ([PIPELINE, "--world_size", "4", "--micro_batches", "2", "--", "--batch.micro_size", "3"],
     "--micro_batches 2 of 8 with schedule = 1f1b on 4 stages; expected 5 or more"),
    ([PIPELINE, "--world_size", "2", "--micro_batches", "2", "--", "--batch.micro_size", "3", "--schedule", "gpipe"],
     "schedule = gpipe; expected all of them"),
    ([PIPELINE, "--world_size", "2", "--micro_batches", "4", "--", "--batch.micro_size", "3", "--schedule",
      "interleaved"], "expected 6 or more"),
    ([PIPELINE, "--world_size", "2", "--micro_batches", "7", "--", "--batch.micro_size", "3", "--schedule",
      "interleaved"], "expected a multiple of 2"),
    ([FSDP, "--world_size", "2", "--", "--fsdp.replicat", "2"], "did you mean fsdp.replicate?"),
    ([FSDP, "--world_size", "2", "--", "--model.preset", "llama3_71b"], "did you mean llama3_70b"),
    ([FSDP, "--world_size", "4", "--", "--fsdp.replicate", "3"], "fsdp.replicate = 3 with 4 ranks"),
    ([FSDP, "--world_size", "64"], "batch.global_size = 24 does not divide among 64"),
    ([TENSOR, "--world_size", "4", "--", "--mesh.dp", "3"], "mesh.dp = 3, mesh.tp = None with 4 ranks"),
    ([PIPELINE, "--world_size", "8", "--", "--batch.micro_size", "3"], "model.layers = 4 for 8 stages"),
    ([FSDP, "--world_size", "2", "--", "--train.precision", "fp16"], "train.precision = fp16"),
    ([FSDP, "--world_size", "2", "--", "--model.preset", "tiny_moe"], "model.experts = 4"),
], ids=lambda value: " ".join(value).replace("/", " ") if isinstance(value, list) else None)  # fmt: skip
def test_mistakes_end_in_one_line(monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["planner/dry_run.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        dry_run.main()
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1 and words in lines[0], lines
    assert not dist.is_initialized()
