"""What fsdp/ sends in a step, message by message: nothing is missing, doubled, too wide or in another dtype."""

import math
from collections import Counter

import pytest
import torch
from equality import SMALL
from launching import OnRanks

from common.transformer import ModelConfig, Transformer

ON_RANKS = OnRanks("tests/fsdp/fsdp_on_ranks.py")
TRAFFIC = OnRanks("tests/support/traffic.py")
LAYERS = 2


def shards(ranks: int, tied: bool) -> tuple[int, int]:
    """Numbers in a rank's shard of a block, and of the root unit, padding included."""
    with torch.device("meta"):
        model = Transformer(ModelConfig(width=32, ffn_width=48, layers=LAYERS, tied=tied))

    def rounded(parameters):
        return sum(-(-p.shape[0] // ranks) * math.prod(p.shape[1:]) for p in parameters)

    block = rounded(model.blocks["0"].parameters())
    return block, rounded(model.parameters()) - LAYERS * block


@pytest.mark.parametrize(("ranks", "options"), [
    (2, ["--batch.micro_size", "6", "--model.tied", "true"]),  # four micro-batches
    (3, ["--train.precision", "bf16"]),
    (2, ["--fsdp.reshard_after_forward", "false", "--batch.micro_size", "12"]),
    (4, ["--fsdp.replicate", "2", "--batch.micro_size", "6"]),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)  # fmt: skip
def test_messages_of_a_step(group, tmp_path, ranks, options):
    """Gathers in each micro-batch, reductions in the last one alone and in fp32, the norm and the loss once."""
    chosen = dict(zip(options[::2], options[1::2], strict=True))
    copies, tied = int(chosen.get("--fsdp.replicate", 1)), "--model.tied" in chosen
    micro_batches = 48 // ranks // int(chosen.get("--batch.micro_size", 48 // ranks))
    passes = 1 if "--fsdp.reshard_after_forward" in chosen else 2
    width, dtype = (2, "bfloat16") if "--train.precision" in chosen else (4, "float32")
    n = ranks // copies
    block, root = shards(n, tied)
    parameters = 9 * LAYERS + (2 if tied else 3)
    expected = Counter({
        ("allgather_base", width * block, dtype, n): micro_batches * passes * LAYERS,
        ("allgather_base", width * root, dtype, n): micro_batches,
        ("reduce_scatter_base", 4 * n * block, "float32", n): LAYERS,
        ("reduce_scatter_base", 4 * n * root, "float32", n): 1,
        ("all_reduce", 4 * parameters, "float32", n): 1,  # the norms of all parameters, to be added
        ("allreduce", 16, "float64", ranks): 1,  # the loss, and the wish to stop
    })  # fmt: skip
    if copies > 1:
        expected[("allreduce", 4 * block, "float32", copies)] = LAYERS
        expected[("allreduce", 4 * root, "float32", copies)] = 1
    places = ["--runs_dir", str(tmp_path), "--run_name", "run"]
    arguments = [*SMALL, "--train.steps", "2", "--batch.global_size", "48", *options, *places]
    for steps in group(ranks)(TRAFFIC.of_steps, "fsdp/train.py", arguments):
        assert [Counter(messages) for messages in steps] == [expected] * 2


@pytest.mark.parametrize("checkpointing", [True, False])
def test_activation_checkpointing_computes_twice(group, tmp_path, checkpointing):
    """In two steps of two micro-batches; torch checkpoints without a graph first, and with one in backward."""
    options = ["--batch.micro_size", "12", "--train.activation_checkpointing", str(checkpointing).lower()]
    arguments = [*SMALL, "--train.steps", "2", "--batch.global_size", "48", *options, "--runs_dir", str(tmp_path)]
    count = 2 * 2 * LAYERS * (2 if checkpointing else 1)
    assert group(2)(TRAFFIC.attentions, "fsdp/train.py", [*arguments, "--run_name", "run"]) == [count] * 2


def test_what_is_gathered_ahead(group):
    """Blocks are told of the next ones, the nearest first, in the order in which they will be needed."""
    forward = {0: [1, 2], 1: [2, 3], 2: [3], 3: []}
    backward = {0: [], 1: [0], 2: [1, 0], 3: [2, 1]}
    assert group(1)(ON_RANKS.prefetched, 4, 2) == [(forward, backward)]
    assert group(1)(ON_RANKS.prefetched, 4, 0) == [({}, {})]


@pytest.mark.parametrize(("precision", "gathered", "summed"), [
    ("fp32", None, None), ("fp64", None, None), ("bf16", "bfloat16", "float32"), ("fp16", "float16", "float32"),
])  # fmt: skip
def test_policies(group, tmp_path, precision, gathered, summed):
    """All units have the same. Inputs are never cast: rotary angles would lose their precision."""
    offload, kind = ("true", "CPUOffloadPolicy") if precision in ("fp64", "bf16") else ("false", "OffloadPolicy")
    options = ["--runs_dir", str(tmp_path), "--run_name", "run", "--train.steps", "1"]
    options += ["--train.precision", precision, "--fsdp.cpu_offload", offload]
    assert group(2)(TRAFFIC.units, "fsdp/train.py", [*SMALL, *options]) == [{(gathered, summed, False, kind)}] * 2
