"""Expert parallelism must give the training of one process, whatever the router does, and send what it says."""

import re

import pytest
import torch
from equality import (
    SMALL,
    STEPS,
    assert_same_first_gradients,
    assert_same_rows,
    assert_same_training,
    assert_trains_in_low_precision,
    largest_difference,
    read_checkpoint,
    read_rows,
)
from launching import SCRIPTS, OnRanks, assert_refused

from common.config import Config, parse
from common.data import text_datasets
from common.data_sharding import BatchPlan, Loader
from common.transformer import Transformer, load_balancing_loss

ON_RANKS = OnRanks("tests/model_parallel/context_expert_on_ranks.py")
SCRIPT = "model_parallel/expert_parallel.py"
BASE = [*SMALL, "--model.preset", "tiny_moe", "--train.steps", str(STEPS), "--batch.global_size", "24"]
FEW = min(STEPS, 6)
FP64 = ["--train.precision", "fp64"]
SIX, ONE = ["--model.experts", "6"], ["--model.experts_per_token", "1"]


def arguments(folder, name, *more):
    return [*BASE, "--runs_dir", str(folder), "--run_name", name, *more]


@pytest.mark.parametrize(("ranks", "model", "accumulation"), [
    (2, [], 4),
    (3, [*SIX, *ONE], 1),
    *(pytest.param(*rest, marks=pytest.mark.slow) for rest in (
        (2, [], 1), (3, [*SIX, *ONE], 4), (2, ONE, 1), (2, ONE, 4), (3, SIX, 1), (3, SIX, 4),
        (4, [], 1), (4, [], 4))),  # one expert a rank
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)  # fmt: skip
def test_fp64_is_the_proof(group, single_device, tmp_path, ranks, model, accumulation):
    options = ["--batch.micro_size", str(24 // ranks // accumulation)]
    group(ranks)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *FP64, *model, *options))
    assert_same_training(single_device(*BASE, *FP64, *model), tmp_path / "many")


@pytest.mark.parametrize(("ranks", "options"), [
    (2, ["--train.activation_checkpointing", "true"]),  # tokens travel again in backward
    (2, ["--mesh.dp", "2", "--model.tied", "true"]),  # groups of one rank, which share each expert
    pytest.param(4, ["--mesh.dp", "2", "--batch.micro_size", "3"], marks=pytest.mark.slow),
    pytest.param(4, ["--mesh.dp", "2", "--mesh.ep", "2", "--model.experts", "2"], marks=pytest.mark.slow),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)  # fmt: skip
def test_on_a_mesh(group, single_device, tmp_path, ranks, options):
    pairs = zip(options[::2], options[1::2], strict=True)
    model = [word for pair in pairs if pair[0].startswith("--model") for word in pair]
    group(ranks)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *FP64, *options))
    assert_same_training(single_device(*BASE, *FP64, *model), tmp_path / "many")


def test_evaluation_during_training(group, single_device, tmp_path):
    options = ["--train.steps", "4", "--train.eval_every", "2"]
    group(2)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *FP64, *options))
    assert_same_training(single_device(*BASE, *FP64, *options), tmp_path / "many")


@pytest.mark.parametrize(("ranks", "options"), [
    (2, []),
    pytest.param(2, ["--train.activation_checkpointing", "true", "--batch.micro_size", "4"], marks=pytest.mark.slow),
    (3, [*SIX, "--batch.micro_size", "8"]),
    pytest.param(4, ["--mesh.dp", "2"], marks=pytest.mark.slow),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)  # fmt: skip
def test_everything_to_a_few_ranks(group, tmp_path, ranks, options):
    """The routers choose the first half of the experts for all tokens: nothing is lost, and who has none keeps up."""
    model = SIX if ranks == 3 else []
    group(1)(ON_RANKS.train_lopsided, "ddp/single_device.py", arguments(tmp_path, "one", *FP64, *model))
    many = arguments(tmp_path, "many", *FP64, *options)
    arrivals = group(ranks)(ON_RANKS.train_lopsided, SCRIPT, many)
    assert_same_training(tmp_path / "one", tmp_path / "many")
    assert arrivals[-1] == {0}
    if ranks == 2:
        tokens = 16 * 24 // (3 if options else 1)  # of a micro-batch of both ranks
        assert arrivals[0] == {2 * tokens}


def reference(ranks, accumulation, balance, *more):
    """Gradients of one step in one process, by name, and how many tokens layer 0 sent to each expert at last.

    The load-balancing loss is that of all tokens of a micro-batch of all ranks.
    """
    config = parse(Config, [*BASE, *more])
    train_set, _ = text_datasets(config.data, config.model.vocabulary)
    loaders = [
        Loader(train_set, BatchPlan(config.batch, len(train_set), config.seed, rank, ranks), torch.device("cpu"))
        for rank in range(ranks)
    ]
    model = Transformer(config.model, config.seed).double()
    scores = []
    for block in model.blocks.values():
        block.ffn.router.register_forward_hook(lambda module, inputs, output: scores.append(output))
    micro_batches = list(zip(*(loader.micro_batches(0) for loader in loaders), strict=True))
    assert len(micro_batches) == accumulation
    for parts in micro_batches:
        tokens, targets = (torch.cat([batch[which] for batch, _ in parts]) for which in (0, 1))
        scores.clear()
        loss = model(tokens, targets)
        for each in scores:
            loss = loss + balance * tokens.numel() * load_balancing_loss(each, config.model.experts_per_token)
        (loss / (config.batch.global_size * config.data.sequence_length)).backward()
    chosen = scores[0].topk(config.model.experts_per_token, dim=-1).indices
    return {name: p.grad for name, p in model.named_parameters()}, chosen.flatten().bincount(minlength=4).tolist()


@pytest.mark.parametrize(("accumulation", "more"), [
    (1, []),
    pytest.param(1, ["--train.activation_checkpointing", "true"], marks=pytest.mark.slow),  # as configs/expert.yaml
    (3, []),
])  # fmt: skip
def test_balance(group, tmp_path, accumulation, more):
    """Its gradient is that of the definition; a weight of 0.5 outweighs the routers' other gradients."""
    options = [*FP64, "--batch.micro_size", str(12 // accumulation), "--train.steps", "1", "--optimizer.clip", "1000"]
    many = arguments(tmp_path, "many", *options)
    printed = group(2)(SCRIPTS.printed, SCRIPT, [*many, *more, "--balance", "0.5"])[0]
    expected, load = reference(2, accumulation, 0.5, *options)
    without, _ = reference(2, accumulation, 0.0, *options)
    saved = read_checkpoint(tmp_path / "many", 1)
    for name, gradient in expected.items():
        # AdamW's exp_avg is now 0.1 times the gradient.
        assert (saved[f"optimizer.state.{name}.exp_avg"] / 0.1 - gradient).abs().max() <= 1e-12, name
        if name.endswith("router.weight"):
            assert (gradient - without[name]).norm() > without[name].norm()
    assert f"tokens in layer 0: {' '.join(map(str, load))}" in printed
    busiest = max(load) / (sum(load) / 4), max(load[0] + load[1], load[2] + load[3]) / (sum(load) / 2)
    assert re.search(rf"experts {busiest[0]:.2f} \S+, ranks {busiest[1]:.2f} \S+;", printed)


def test_balance_balances(group, tmp_path):
    """The busiest expert gets less, after a few steps at a large weight."""
    spread = []
    for balance in ("0", "0.1"):
        folder = arguments(tmp_path, f"with {balance}".replace(" ", "_"), "--balance", balance, "--train.steps", "20")
        loads = group(2)(ON_RANKS.train_and_count, SCRIPT, folder)
        total = torch.tensor(loads).sum(0).double()  # (layers, experts), of all ranks
        spread.append((total.amax(-1) / total.mean(-1)).max().item())
    assert spread[1] < spread[0] and spread[1] < 1.5, spread


@pytest.mark.parametrize(("ranks", "layers"), [(2, 1), (3, 3)])
def test_messages(group, ranks, layers):
    """Each rank has 72 tokens, of which two experts each take one: rows of width 48 in fp32."""
    results = group(ranks)(ON_RANKS.expert_work, layers)
    for rank, (messages, load) in enumerate(results):
        expected = []
        by_rank = torch.tensor([load for _, load in results]).view(ranks, layers, ranks, -1).sum(-1)  # from, layer, to
        assert (by_rank.sum(-1) == 2 * 72).all()
        row, counts = 48 * 4, ("alltoall_base_", 12 * 8)
        for layer in range(layers):
            gone = ("all_to_all_single", 2 * 72 * row)
            come = ("all_to_all_single", int(by_rank[:, layer, rank].sum()) * row)
            expected.append((counts, gone, come))
        # Backward the gradient of what came back leaves first, and is as much as what was sent.
        assert messages[: 3 * layers] == [message for layer in expected for message in layer]
        assert messages[3 * layers :] == [message for layer in reversed(expected) for message in layer[1:]]


@pytest.mark.parametrize(
    ("name", "lr", "parameters"),  # AdamW's division by small roots amplifies the last bits of fp32
    [("adamw", "0.003", 1e-4), pytest.param("sgd", "0.01", 1e-6, marks=pytest.mark.slow)],
)
def test_fp32(group, single_device, tmp_path, name, lr, parameters):
    """Few steps: a token between two experts may choose the other one for a last bit, and then losses part."""
    options = ["--optimizer.name", name, "--optimizer.lr", lr, "--train.steps", str(FEW)]
    one = single_device(*BASE, *options)
    group(2)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *options))
    assert_same_rows(one, tmp_path / "many", 1e-5)
    a, b = read_checkpoint(one, FEW), read_checkpoint(tmp_path / "many", FEW)
    assert largest_difference(a, b, "model.") <= parameters


@pytest.mark.parametrize(("ranks", "options"), [
    (2, []),
    pytest.param(4, ["--mesh.dp", "2"], marks=pytest.mark.slow),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)  # fmt: skip
def test_first_gradients_in_fp32(group, single_device, tmp_path, ranks, options):
    steps = ["--train.steps", "1", "--optimizer.clip", "1000"]
    one = single_device(*BASE, *steps)
    group(ranks)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "many", *steps, *options))
    assert_same_first_gradients(one, tmp_path / "many", 2 + 2 * 10 + 1)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_low_precision_trains(group, single_device, tmp_path, precision):
    group(2)(SCRIPTS.train, SCRIPT, arguments(tmp_path, "low", "--train.steps", "20", "--train.precision", precision))
    assert_trains_in_low_precision(single_device(*BASE), tmp_path / "low")


@pytest.mark.parametrize(("ranks", "options"), [(2, []), pytest.param(4, ["--mesh.dp", "2"], marks=pytest.mark.slow)])
def test_bytes_per_rank(group, tmp_path, ranks, options):
    """1/n of everything: of experts by number, then by rows; of all else by rows."""
    printed = group(ranks)(SCRIPTS.printed, SCRIPT, arguments(tmp_path, "many", "--train.steps", "2", *options))[0]
    mine, whole = re.search(r"this rank keeps ([\d,]+) of ([\d,]+) bytes", printed).groups()
    weights = [t for n, t in read_checkpoint(tmp_path / "many", 2).items() if n.startswith("model.")]
    assert int(mine.replace(",", "")) == sum(4 * t.numel() // ranks for t in weights)
    assert int(whole.replace(",", "")) == 4 * sum(t.numel() for t in weights)


@pytest.mark.parametrize(("ranks", "options", "words"), [
    (3, [], "model.experts = 4, which does not divide among the 3 ranks of mesh.ep"),
    (2, ["--model.preset", "tiny"], "model.experts = 0 in preset tiny"),
    (2, ["--mesh.dp", "2", "--model.ffn_width", "49"], "model.ffn_width = 49, which does not divide among the 2 ranks"),
    (2, ["--mesh.dp", "3"], "mesh.dp = 3, mesh.ep = None with 2 ranks"),
    (2, ["--mesh.ep", "3"], "expected a product of 2"),
    (2, ["--mesh.ep", "0"], "mesh.ep = 0"),
    (2, ["--balance", "-1"], "balance = -1.0 cannot work"),
    (2, ["--batch.global_size", "23"], "does not divide among 2 data-parallel ranks"),
    (2, ["--mesh.tp", "2"], "unknown key mesh.tp"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)  # fmt: skip
def test_bad_input(group, tmp_path, ranks, options, words):
    assert_refused(group(ranks)(SCRIPTS.ends, SCRIPT, arguments(tmp_path, "bad", *options)), words)


@pytest.mark.parametrize(("first", "then"), [
    ((SCRIPT, 3), (SCRIPT, 2, "--mesh.dp", "2")),
    pytest.param((SCRIPT, 2), ("ddp/train.py", 3), marks=pytest.mark.slow),
    pytest.param(("ddp/train.py", 2), (SCRIPT, 3), marks=pytest.mark.slow),
    pytest.param((SCRIPT, 4, "--mesh.dp", "2"), ("fsdp/train.py", 3), marks=pytest.mark.slow),
], ids=lambda value: " ".join(map(str, value)).replace("/", " "))  # fmt: skip
def test_resume_elsewhere(group, single_device, tmp_path, first, then):
    """Half of the steps on some ranks, the others on other ranks, or under another strategy: those of one process."""
    (script, ranks, *more), (next_script, next_ranks, *next_more) = first, then
    group(ranks)(SCRIPTS.train_until, script, arguments(tmp_path, "many", *FP64, *SIX, *more), STEPS // 2)
    assert len(read_rows(tmp_path / "many")) == STEPS // 2
    group(next_ranks)(SCRIPTS.train, next_script, arguments(tmp_path, "many", *FP64, *SIX, *next_more))
    assert_same_training(single_device(*BASE, *FP64, *SIX), tmp_path / "many")
