"""What model_parallel/ sends in a step, message by message, and what of the state a resume needs."""

import json
from collections import Counter

import pytest
from equality import SMALL, largest_difference, read_checkpoint, read_rows
from launching import SCRIPTS, OnRanks

ON_RANKS = OnRanks("tests/model_parallel/model_parallel_on_ranks.py")
TRAFFIC = OnRanks("tests/support/traffic.py")
FOLDER = "model_parallel"
# Width 48, 12 heads, vocabulary 264, two layers: 2 divides everything, so no shard is padded.
W, V, S, LAYERS, BATCH = 48, 264, 24, 2, 48
EVEN = ["--model.heads", "12", "--model.kv_heads", "12", "--model.width", str(W), "--model.ffn_width", str(W),
        "--model.vocabulary", str(V), "--data.sequence_length", str(S)]  # fmt: skip
MATRICES, NORMS = 7 * W * W, 2 * W  # of a block: query, key, value, output, gate, up, down
LOSS = ("allreduce", 16, "float64")


def of_steps(group, folder, ranks, script, *options, layers=LAYERS):
    """Messages of the second of two steps, by rank: the first also opens connections and agrees on shapes."""
    places = ["--runs_dir", str(folder), "--run_name", "run", "--model.layers", str(layers)]
    arguments = [*SMALL, *EVEN, *places, "--train.steps", "2", "--batch.global_size", str(BATCH), *options]
    return [Counter(steps[1]) for steps in group(ranks)(TRAFFIC.of_steps, f"{FOLDER}/{script}.py", arguments)]


def only(counter, *names):
    return Counter({message: count for message, count in counter.items() if message[0] in names})


FSDP = ("allgather_base", "reduce_scatter_base", "allreduce")


def fsdp_messages(block, root, ranks, micro_batches, low=False, passes=2):
    """FSDP's, for units of so many numbers, all together: gathers in each micro-batch, reductions in the last alone."""
    width, dtype = (2, "bfloat16") if low else (4, "float32")
    return Counter({
        ("allgather_base", width * block // ranks, dtype, ranks): micro_batches * passes * LAYERS,
        ("allgather_base", width * root // ranks, dtype, ranks): micro_batches,
        ("reduce_scatter_base", 4 * block, "float32", ranks): LAYERS,
        ("reduce_scatter_base", 4 * root, "float32", ranks): 1,
    })  # fmt: skip


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
def test_tensor(group, tmp_path, low):
    """2 × 2 ranks, two micro-batches: FSDP moves slices among data-parallel ranks, activations stay among the others.

    The gradients of norms are partial sums over the tensor ranks: each norm's is added once, in every micro-batch.
    """
    precision = ["--train.precision", "bf16"] if low else []
    each = of_steps(group, tmp_path, 4, "tensor_parallel", "--mesh.dp", "2", "--batch.micro_size", "12", *precision)
    block, root = MATRICES // 2 + NORMS, 2 * V * W // 2 + W
    for messages in each:
        expected = fsdp_messages(block, root, 2, 2, low) + Counter({(*LOSS, 4): 1})
        assert only(messages, *FSDP) == expected
        activations = 12 * S * W * (2 if low else 4)
        kind = "bfloat16" if low else "float32"
        pairs = 2 * (2 + 4 * LAYERS)  # in each micro-batch; see test_collectives_are_those_of_the_plan
        assert messages["all_gather_into_tensor", activations // 2, kind, 2] == pairs
        assert messages["reduce_scatter_tensor", activations, kind, 2] == pairs
        assert messages["all_reduce", 4 * (2 + 9 * LAYERS + 1), "float32", 4] == 1  # the norm of all gradients


def test_context(group, tmp_path):
    """Two micro-batches on 2 ranks: keys and values of each layer, and FSDP over all ranks."""
    each = of_steps(group, tmp_path, 2, "context_parallel", "--batch.micro_size", "24")
    mine = 4 * 2 * 24 * S * W // 2  # keys and values of half of the tokens
    expected = fsdp_messages(MATRICES + NORMS, 2 * V * W + W, 2, 2) + Counter({
        ("all_gather_into_tensor", mine, "float32", 2): 2 * LAYERS,
        ("reduce_scatter_tensor", 2 * mine, "float32", 2): 2 * LAYERS,
        ("all_reduce", 4 * (2 + 9 * LAYERS + 1), "float32", 2): 1,
        (*LOSS, 2): 1,
    })  # fmt: skip
    assert each == [expected] * 2


def test_context_in_bf16(group, tmp_path):
    """Gradients are added in fp32, whatever the context group's messages are in."""
    each = of_steps(group, tmp_path, 2, "context_parallel", "--train.precision", "bf16")
    expected = fsdp_messages(MATRICES + NORMS, 2 * V * W + W, 2, 1, low=True) + Counter({(*LOSS, 2): 1})
    assert [only(messages, *FSDP) for messages in each] == [expected] * 2


def test_expert(group, tmp_path):
    """Experts are cut once, among 2 ranks, and not gathered; routers and all else are shared by both."""
    each = of_steps(group, tmp_path, 2, "expert_parallel", "--batch.micro_size", "12", "--model.preset", "tiny_moe")
    dense = 4 * W * W + NORMS
    expected = fsdp_messages(dense, 2 * V * W + W, 2, 2) + fsdp_messages(4 * W, 0, 2, 2)  # and the routers
    expected = Counter({message: count for message, count in expected.items() if message[1]})
    assert [only(messages, *FSDP) for messages in each] == [expected + Counter({(*LOSS, 2): 1})] * 2
    for messages in each:
        assert sum(only(messages, "alltoall_base").values()) == 2 * LAYERS  # counts
        assert sum(only(messages, "all_to_all_single").values()) == 2 * 4 * LAYERS  # there and back, twice
        assert sum(only(messages, "all_reduce").values()) == 2  # norms, of experts and of all else


def test_pipeline(group, tmp_path):
    """Four micro-batches of 12 samples through two stages; the tied weight's gradient is added once."""
    options = ["--batch.micro_size", "12", "--model.tied", "true"]
    hidden = 4 * 12 * S * W
    expected = Counter({
        ("send", hidden, "float32", 2): 4, ("recv", hidden, "float32", 2): 4,
        ("allreduce", 4 * V * W, "float32", 2): 1, ("allreduce", 4, "float32", 2): 1, (*LOSS, 2): 1,
    })  # fmt: skip
    assert of_steps(group, tmp_path, 2, "pipeline_parallel", *options) == [expected] * 2


def test_hybrid(group, tmp_path):
    """2 stages × 2 data-parallel ranks, two micro-batches: blocks stay whole between them, and are reduced once."""
    options = ["--mesh.pp", "2", "--mesh.dp", "2", "--mesh.tp", "1", "--batch.micro_size", "12", "--model.tied", "true"]
    each = of_steps(group, tmp_path, 4, "hybrid_parallel", *options)
    for rank, messages in enumerate(each):
        block, root = MATRICES + NORMS, V * W + (W if rank > 1 else 0)
        hidden = 4 * 12 * S * W
        assert messages["send", hidden, "float32", 2] == messages["recv", hidden, "float32", 2] == 2
        assert messages["allreduce", 4 * V * W // 2, "float32", 2] == 1  # the tied weight's, a shard of it
        assert messages["allreduce", 4, "float32", 2] == 1  # the norm, over the stages
        assert messages[(*LOSS, 4)] == 1
        assert messages["reduce_scatter_base", 4 * block, "float32", 2] == 1
        assert messages["reduce_scatter_base", 4 * root, "float32", 2] == 1
        assert messages["allgather_base", 4 * block // 2, "float32", 2] == 1
        assert messages["allgather_base", 4 * root // 2, "float32", 2] == 1


@pytest.mark.parametrize("script", ["tensor_parallel", "context_parallel", "expert_parallel"])
def test_fp16_goes_on_with_its_scale(group, tmp_path, script):
    """The scaler's factor and its count of good steps are state: without them this resume would differ, bit by bit."""
    preset = ["--model.preset", "tiny_moe"] if script == "expert_parallel" else []
    options = [*SMALL, *EVEN, *preset, "--batch.global_size", "24", "--train.precision", "fp16"]
    whole, cut = (
        [*options, "--train.steps", "4", "--runs_dir", str(tmp_path), "--run_name", n] for n in ("all", "cut")
    )
    group(2)(SCRIPTS.train, f"{FOLDER}/{script}.py", whole)
    group(2)(SCRIPTS.train_until, f"{FOLDER}/{script}.py", cut, 2)
    group(2)(SCRIPTS.train, f"{FOLDER}/{script}.py", cut)
    manifests = [tmp_path / name / "checkpoints" / "step_4" / "manifest.json" for name in ("all", "cut")]
    scalers = [json.loads(path.read_text())["extra"]["scaler"] for path in manifests]
    assert scalers[0] == scalers[1]
    assert scalers[0]["_growth_tracker"] > 2 or scalers[0]["scale"] < 65536, "the start's state would pass as well"
    assert largest_difference(*(read_checkpoint(tmp_path / name, 4) for name in ("all", "cut"))) == 0
    assert [row["loss"] for row in read_rows(tmp_path / "all")] == [row["loss"] for row in read_rows(tmp_path / "cut")]


@pytest.mark.parametrize(("script", "options", "more"), [
    ("tensor_parallel", ["--batch.micro_size", "24"], [4, 4]),
    ("context_parallel", ["--batch.micro_size", "24"], [4, 4]),
    ("expert_parallel", ["--batch.micro_size", "12", "--model.preset", "tiny_moe"], [4, 4]),
    ("pipeline_parallel", ["--batch.micro_size", "24"], [2, 3]),
    ("hybrid_parallel", ["--batch.micro_size", "24", "--mesh.tp", "1"], [2, 3]),
], ids=lambda value: value if isinstance(value, str) else None)  # fmt: skip
def test_activation_checkpointing_computes_twice(group, tmp_path, script, options, more):
    """Each attention of two micro-batches again in backward; a pipeline's last stage is tried once before the first."""
    given = [*SMALL, *EVEN, "--train.steps", "1", "--batch.global_size", str(BATCH), *options]
    counts = []
    for name, value in ("off", "false"), ("on", "true"):
        places = ["--runs_dir", str(tmp_path), "--run_name", name, "--train.activation_checkpointing", value]
        counts.append(group(2)(TRAFFIC.attentions, f"{FOLDER}/{script}.py", [*given, *places]))
    assert [twice - once for once, twice in zip(*counts, strict=True)] == more


@pytest.mark.parametrize(("script", "options", "gathered", "summed"), [
    ("tensor_parallel", ["--train.precision", "fp16"], "float16", "float32"),
    ("tensor_parallel", ["--train.precision", "fp64"], None, None),
    ("tensor_parallel", ["--train.precision", "bf16"], "bfloat16", "float32"),
    ("context_parallel", ["--train.precision", "bf16"], "bfloat16", "float32"),
    ("expert_parallel", ["--train.precision", "bf16", "--model.experts", "4"], "bfloat16", "float32"),
    ("hybrid_parallel", ["--train.precision", "bf16", "--mesh.tp", "1", "--batch.micro_size", "24"], "bfloat16",
     "float32"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else value)  # fmt: skip
def test_policies(group, tmp_path, script, options, gathered, summed):
    """All units have the same. Inputs are never cast: rotary angles would lose their precision."""
    places = ["--runs_dir", str(tmp_path), "--run_name", "run", "--train.steps", "1"]
    arguments = [*SMALL, *EVEN, *places, "--batch.global_size", str(BATCH), *options]
    found = group(2)(TRAFFIC.units, f"{FOLDER}/{script}.py", arguments)
    assert found == [{(gathered, summed, False, "OffloadPolicy")}] * 2


def test_those_who_talk_most_are_neighbors(group):
    """Ranks of one tensor, context or expert group follow each other, so that they share a node."""
    square, line = [[0, 1], [2, 3]], [[[0, 1]], [[2, 3]]]
    assert group(4)(ON_RANKS.meshes) == [{"tensor": square, "context": square, "expert": square, "hybrid": line}] * 4
