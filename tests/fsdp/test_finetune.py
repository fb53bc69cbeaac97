"""Fine-tuning under FSDP: the training of one process and of a plain loop, every question answered once, exports."""

import itertools
import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from equality import STEPS, largest_difference, read_checkpoint
from launching import SCRIPTS, OnRanks
from safetensors.torch import load_file

from common.data_sharding import BatchConfig, BatchPlan
from common.optimizer import OptimizerConfig, build_optimizer, learning_rate, set_learning_rate
from finetuning.scores import f1
from finetuning.squad import normalize, read_questions
from finetuning.tokens import load_tokenizer

sys.path.append(str(Path(__file__).resolve().parent))
from finetune_on_ranks import double_norms

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "fsdp/finetune.py"
ON_RANKS = OnRanks("tests/fsdp/finetune_on_ranks.py")
TRAFFIC = OnRanks("tests/support/traffic.py")
LORA = ["--lora.rank", "3", "--lora.alpha", "6"]
OPTIMIZER = OptimizerConfig(lr=0.02, warmup_steps=3)


def questions(first: int, count: int) -> dict:
    """Questions about `count` little texts: answers of one to nine bytes, and none in every fifth."""
    names, values = ["ann", "bo", "cleo", "dee"], ["red", "a blue hat", "9", "sea", "two of it", "no"]
    paragraphs = []
    for number in range(first, first + count):
        (a, b), (x, y) = [list(itertools.permutations(z, 2))[number % 12] for z in (names, values)]
        context, asked = f"{a} has {x}, {b} has {y}.", b if number % 2 else a
        value = y if number % 2 else x
        answers = [{"text": value, "answer_start": context.index(f"{asked} has {value}") + len(asked) + 5}]
        entry = {"id": str(number), "question": f"{asked}?", "answers": answers, "is_impossible": False}
        if number % 5 == 0:
            entry |= {"question": "eve?", "answers": [], "is_impossible": True}
        paragraphs.append({"context": context, "qas": [entry]})
    return {"version": "v2.0", "data": [{"title": "test", "paragraphs": paragraphs}]}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with two small models (one has the other's shape and other weights) and two files of questions."""
    import transformers

    folder = tmp_path_factory.mktemp("finetune")
    for name, seed in (("llama", 0), ("other", 1)):
        torch.manual_seed(seed)
        shape = transformers.LlamaConfig(
            vocab_size=257, hidden_size=32, intermediate_size=50, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, eos_token_id=256,
            bos_token_id=None, initializer_range=0.2,
        )  # fmt: skip
        transformers.LlamaForCausalLM(shape).save_pretrained(folder / name)
    gpt2 = transformers.GPT2Config(vocab_size=257, n_positions=80, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0,
                                   embd_pdrop=0.0, attn_pdrop=0.0, eos_token_id=256, bos_token_id=256)  # fmt: skip
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(folder / "gpt2")
    for name in ("llama", "other", "gpt2"):
        load_tokenizer(None).save_pretrained(folder / name)
    (folder / "train.json").write_text(json.dumps(questions(0, 53)))
    (folder / "validation.json").write_text(json.dumps(questions(53, 7)))  # 2 and 3 ranks get unequal parts
    return folder


def arguments(places, folder, name, *more, model="llama"):
    return [
        "--model_path", str(places / model), "--data.train", str(places / "train.json"), "--data.validation",
        str(places / "validation.json"), "--data.sequence_length", "80", "--data.answer_length", "12",
        "--batch.global_size", "48", "--train.steps", str(STEPS), "--train.precision", "fp64", "--optimizer.lr", "0.02",
        "--optimizer.warmup_steps", "3", "--runs_dir", str(folder), "--run_name", name, *more,
    ]  # fmt: skip


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run, step=STEPS):
    found = read_checkpoint(run, step)
    return {n.removeprefix("model."): t for n, t in found.items() if n.startswith("model.") and t.is_floating_point()}


def assert_same(one, many):
    """Losses, norms, scores, parameters and AdamW's averages within 1e-12."""
    measured = ("loss", "grad_norm", "val_loss", "exact_match", "f1", "lr", "step", "samples")
    for a, b in zip(rows(one), rows(many), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() & set(measured):
            # Norms are of order 10 where losses are of order 1.
            assert abs(a[name] - b[name]) <= (1e-11 if name == "grad_norm" else 1e-12), (name, a, b)
    assert len(rows(one)) == STEPS + 1
    a, b = read_checkpoint(one, STEPS), read_checkpoint(many, STEPS)
    assert largest_difference(a, b, "model.") <= 1e-12
    assert largest_difference(a, b, "optimizer.state.") <= 1e-12


@pytest.fixture(scope="module")
def one(group, places, tmp_path_factory):
    """`one(*options)`: the folder of the script's run on one rank, made once for each."""
    made = {}

    def get(*options, model="llama"):
        if (options, model) not in made:
            folder = tmp_path_factory.mktemp("one")
            group(1)(ON_RANKS.train, arguments(places, folder, "one", *options, model=model))
            made[options, model] = folder / "one"
        return made[options, model]

    return get


def plain_loss(model, question, tokenizer):
    """Loss sum and count of one question's answer: alone, unpadded, from the definition."""
    prompt = f"{question.context}\nQuestion: {question.question}\nAnswer:"
    answer = f" {question.answers[0]}" if question.answers else ""
    ids = [tokenizer(text)["input_ids"] for text in (prompt, answer)]
    tokens = torch.tensor([*ids[0], *ids[1], tokenizer.eos_token_id])
    chances = model(tokens[None]).logits[0].log_softmax(-1)
    counted = range(len(ids[0]), len(tokens))
    return -torch.stack([chances[place - 1, tokens[place]] for place in counted]).sum(), len(counted)


@pytest.fixture(scope="module")
def reference(places):
    """`reference(lora)`: a plain training without FSDP, padding, or micro-batches: (rows, trained weights, model)."""
    import peft
    import transformers

    made = {}

    def train(lora):
        tokenizer = load_tokenizer(None)
        model = transformers.LlamaForCausalLM.from_pretrained(places / "llama")
        if lora:
            torch.manual_seed(1234)
            settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
            model = peft.get_peft_model(model, settings)
        model.double()
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer, found = build_optimizer(parameters.values(), OPTIMIZER, torch.device("cpu")), []
        data, asked = read_questions(str(places / "train.json")), read_questions(str(places / "validation.json"))
        plan = BatchPlan(BatchConfig(48), len(data), 1234)
        for step in range(STEPS):
            set_learning_rate(optimizer, learning_rate(step, STEPS, OPTIMIZER))
            losses, counts = zip(*[plain_loss(model, data[plan.sample(p)], tokenizer) for p in plan.positions(step)[0]],
                                 strict=True)  # fmt: skip
            loss = sum(losses) / sum(counts)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append({"loss": loss.item(), "grad_norm": norm.item()})
        with torch.no_grad():
            losses, counts = zip(*[plain_loss(model, question, tokenizer) for question in asked], strict=True)
        found.append({"val_loss": (sum(losses) / sum(counts)).item()})
        final = {name.removeprefix("base_model.model."): p.detach() for name, p in parameters.items()}
        return found, final, model

    def get(lora):
        if lora not in made:
            with double_norms():
                made[lora] = train(lora)
        return made[lora]

    return get


# ---------------------------------------------------------------------------------------------------- the training


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_one_rank_is_the_plain_loop(one, reference, lora):
    expected, final, _ = reference(lora)
    run = one(*(LORA if lora else []))
    for a, b in zip(rows(run), expected, strict=True):
        for name, value in b.items():
            assert abs(a[name] - value) <= (1e-11 if name == "grad_norm" else 1e-12), (name, a, b)
    assert largest_difference(weights(run), final) <= 1e-12
    assert expected[-2]["loss"] < expected[0]["loss"] - (
        1 if STEPS == 20 else 0.1
    )  # it learned something: equal is not zero


@pytest.mark.parametrize(("ranks", "accumulation", "lora"), [
    (2, 4, False),
    (3, 1, False),
    (2, 1, True),
    (3, 4, True),
    *(pytest.param(*rest, marks=pytest.mark.slow) for rest in (
        (2, 1, False), (3, 4, False), (2, 4, True), (3, 1, True),
        (4, 1, False), (4, 4, False), (4, 1, True), (4, 4, True))),
])  # fmt: skip
def test_fp64_is_the_proof(group, one, places, tmp_path, ranks, accumulation, lora):
    """3 divides neither the width nor LoRA's rank evenly among ranks: some shards are padded, some empty."""
    options = LORA if lora else []
    micro = ["--batch.micro_size", str(48 // ranks // accumulation)]
    group(ranks)(ON_RANKS.train, arguments(places, tmp_path, "many", *options, *micro))
    assert_same(one(*options), tmp_path / "many")


@pytest.mark.parametrize("options", [
    ["--train.activation_checkpointing", "true"],
    ["--fsdp.cpu_offload", "true", *LORA],
    ["--fsdp.reshard_after_forward", "false", "--fsdp.prefetch", "1", *LORA],
    pytest.param(["--fsdp.replicate", "2", *LORA], marks=pytest.mark.slow),
], ids=" ".join)  # fmt: skip
def test_every_option(group, one, places, tmp_path, options):
    ranks = 4 if "--fsdp.replicate" in options else 2
    group(ranks)(ON_RANKS.train, arguments(places, tmp_path, "many", *options))
    assert_same(one(*(LORA if LORA[0] in options else [])), tmp_path / "many")


@pytest.mark.parametrize("options", [
    [],
    pytest.param(["--lora.rank", "2", "--lora.targets", "[c_attn]"], marks=pytest.mark.slow),
], ids=["full", "lora"])  # fmt: skip
def test_another_architecture(group, one, places, tmp_path, options):
    """GPT-2: other names, learned positions, a beginning token, dropout at 0.

    With SGD: attention does not depend on the keys' biases, so their gradients are rounding and nothing else,
    of which AdamW's division would make some 1e-12.
    """
    options = [*options, "--optimizer.name", "sgd"]
    group(3)(ON_RANKS.train, arguments(places, tmp_path, "many", *options, model="gpt2"))
    assert_same(one(*options, model="gpt2"), tmp_path / "many")


def test_an_evaluation_leaves_training_as_it_was(group, places, tmp_path):
    """With dropout: what follows an evaluation would be another training if dropout stayed off."""
    config = json.loads((places / "gpt2" / "config.json").read_text())
    shutil.copytree(places / "gpt2", tmp_path / "dropout")
    (tmp_path / "dropout" / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.5}))
    for every in ("0", "1"):
        options = ["--train.steps", "3", "--train.eval_every", every, "--export", "false"]
        given = arguments(places, tmp_path, every, *options, "--model_path", str(tmp_path / "dropout"))
        group(2)(ON_RANKS.train, given)
    losses = [[row["loss"] for row in rows(tmp_path / every) if "loss" in row] for every in ("0", "1")]
    assert losses[0] == losses[1]
    group(2)(ON_RANKS.train, arguments(places, tmp_path, "without", *options, model="gpt2"))
    assert losses[0] != [row["loss"] for row in rows(tmp_path / "without") if "loss" in row]


@pytest.mark.parametrize(("lora", "reductions"), [(False, 3), (True, 2)], ids=["full", "lora"])
def test_messages_of_a_step(group, places, tmp_path, lora, reductions):
    """Gradients are reduced in the last of four micro-batches alone; with LoRA the root unit has none."""
    options = ["--batch.micro_size", "6", "--train.steps", "2", *(LORA if lora else [])]
    given = arguments(places, tmp_path, "run", *options, "--train.precision", "bf16")
    for steps in group(2)(TRAFFIC.of_steps, SCRIPT, given):
        for messages in steps[:1]:  # the second holds the evaluation, too
            sent = Counter((name, dtype) for name, _, dtype, _ in messages)
            assert sent["allgather_base", "bfloat16"] == 4 * (1 + 2 * 2)
            assert sent["reduce_scatter_base", "float32"] == reductions
            assert sent["reduce_scatter_base", "bfloat16"] == 0
            assert sent["allreduce", "int64"] == 1  # the tokens that count
            assert sent["allreduce", "float64"] == 1  # the loss


def test_fp16_goes_on_with_its_scale(group, places, tmp_path):
    """The scaler's factor and its count of good steps are state: without them this resume would differ, bit by bit."""
    options = ["--train.steps", "4", "--train.precision", "fp16", "--export", "false", *LORA]
    whole, cut = (arguments(places, tmp_path, name, *options) for name in ("whole", "cut"))
    group(2)(ON_RANKS.train, whole)
    group(2)(ON_RANKS.train_until, cut, 2)
    group(2)(ON_RANKS.train, cut)
    manifests = [tmp_path / name / "checkpoints" / "step_4" / "manifest.json" for name in ("whole", "cut")]
    scalers = [json.loads(path.read_text())["extra"]["scaler"] for path in manifests]
    assert scalers[0] == scalers[1]
    assert scalers[0]["_growth_tracker"] > 2 or scalers[0]["scale"] < 65536, "the start's state would pass as well"
    assert largest_difference(*(read_checkpoint(tmp_path / name, 4) for name in ("whole", "cut"))) == 0


def test_the_random_model_is_the_same_on_any_ranks(group, places, tmp_path):
    options = [*arguments(places, tmp_path, "NAME", "--train.steps", "2")[2:], "--export", "false", *LORA]
    for ranks in (1, 3):
        group(ranks)(ON_RANKS.train, [*options, "--run_name", f"on{ranks}"])
    assert abs(rows(tmp_path / "on1")[0]["loss"] - rows(tmp_path / "on3")[0]["loss"]) <= 1e-12
    assert largest_difference(weights(tmp_path / "on1", 2), weights(tmp_path / "on3", 2)) <= 1e-12


def test_bf16_trains(group, one, places, tmp_path):
    """The policy computes in bf16: 3e-2 is some twenty roundings of 2^-9 of a loss of 5; weights stay in fp32."""
    options = ["--train.precision", "bf16", "--train.activation_checkpointing", "true", "--train.steps", "20"]
    group(2)(ON_RANKS.train, arguments(places, tmp_path, "low", *options))
    low, exact = rows(tmp_path / "low"), rows(one())
    assert 0 < abs(low[0]["loss"] - exact[0]["loss"]) < 3e-2
    assert low[-2]["loss"] < low[0]["loss"] - 1
    assert {tensor.dtype for tensor in weights(tmp_path / "low", 20).values()} == {torch.float32}


def test_frozen_weights_stay_and_are_not_saved(one):
    found = weights(one(*LORA))
    assert len(found) == 2 * 2 * 4
    assert all(".lora_" in name for name in found)
    assert all(tensor.abs().max() > 0 for tensor in found.values())  # B is 0 at first: it has moved


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_what_is_printed(group, places, tmp_path, lora):
    """Parameters and bytes, against counts from the files."""
    options = ["--train.precision", "fp32", "--train.steps", "1", *(LORA if lora else [])]
    printed = group(2)(ON_RANKS.printed, arguments(places, tmp_path, "run", *options))[0]
    base = load_file(places / "llama" / "model.safetensors")
    added = {n: t for n, t in weights(tmp_path / "run", 1).items() if "lora" in n}
    trained = added if lora else base
    total = sum(t.numel() for t in (*base.values(), *added.values()))
    mine = sum(4 * -(-t.shape[0] // 2) * t[0].numel() for t in trained.values())
    count = sum(t.numel() for t in trained.values())
    assert f"training {count:,} of {total:,} parameters" in printed
    assert f"gradients {mine:,} bytes, AdamW's averages {2 * mine:,} bytes on this rank" in printed
    assert "3 FSDP units in float32" in printed
    by_answer = re.findall(r"  where (.+) is right: (\d+) of (\d+)", printed)
    assert sum(int(total) for _, _, total in by_answer) == 7  # all validation questions, each in one row
    exact = sum(int(given) for _, given, _ in by_answer) / 7
    assert f"exact match {100 * exact:.4f}" in printed
    assert re.search(r"after 1 steps  validation loss [\d.]+  exact match [\d.]+  f1 [\d.]+", printed)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "fsdp" / "configs").glob("finetune_*.yaml")), ids=lambda path: path.stem
)
def test_configs(group, places, tmp_path, path):
    """Each trains, with a small model, shorter sequences, and one step."""
    given = ["--config", str(path), *arguments(places, tmp_path, "run", "--train.steps", "1")]
    printed = group(2)(ON_RANKS.printed, given)[0]
    assert "finished after 1 of 1 steps" in printed
    assert ("(100.00%)" in printed) == ("full" in path.stem)


# ------------------------------------------------------------------------------------------------------ the tokens


def expected_count(places, part):
    data = read_questions(str(places / "train.json"))
    plan = BatchPlan(BatchConfig(48), len(data), 1234)
    samples = [data[plan.sample(position)] for position in plan.positions(0)[0][part]]
    return [len(f" {q.answers[0]}") + 1 if q.answers else 1 for q in samples]


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_tokens_of_all_ranks_are_counted(group, places, ranks):
    path, size = str(places / "train.json"), 48 // ranks
    by_hand = [sum(expected_count(places, slice(r * size, (r + 1) * size))) for r in range(ranks)]
    assert len(set(by_hand)) == ranks  # the ranks' counts differ: else a mean of means would pass every test
    results = group(ranks)(ON_RANKS.counted, path)
    assert [mine for mine, _ in results] == by_hand
    assert {everyone for _, everyone in results} == {sum(by_hand)}


def test_a_mean_of_means_is_another_loss(places, one):
    """What this data would show if each rank divided by its own tokens: not the loss of the global batch."""
    import transformers

    data, tokenizer = read_questions(str(places / "train.json")), load_tokenizer(None)
    plan = BatchPlan(BatchConfig(48), len(data), 1234)
    with double_norms(), torch.no_grad():
        model = transformers.LlamaForCausalLM.from_pretrained(places / "llama").double()
        pairs = [plain_loss(model, data[plan.sample(p)], tokenizer) for p in plan.positions(0)[0]]
    means = [sum(loss for loss, _ in part) / sum(n for _, n in part) for part in (pairs[:24], pairs[24:])]
    assert abs(float(sum(means)) / 2 - rows(one())[0]["loss"]) > 1e-4
    assert abs(float(sum(loss for loss, _ in pairs) / sum(n for _, n in pairs)) - rows(one())[0]["loss"]) <= 1e-12


# ----------------------------------------------------------------------------------------------------- the answers


def test_every_question_is_answered_once(group, places, tmp_path):
    """Whatever the ranks, the same answers in the same order; ranks without a question take part in the last batch."""
    found, scores = {}, {}
    for ranks, micro in ((1, 3), (2, 2), (3, 2)):
        options = ["--batch.micro_size", str(micro), "--export", "false", "--train.steps", "4"]
        results = group(ranks)(ON_RANKS.asked_and_answered, arguments(places, tmp_path, f"on{ranks}", *options))
        ids, answers, _ = results[0]
        assert ids == [str(number) for number in range(53, 60)]
        assert all(result[:2] == (ids, answers) for result in results)
        batches = [result[2] for result in results]
        mine = [len(range(rank, 7, ranks)) for rank in range(ranks)]
        assert {len(b) for b in batches} == {-(-mine[0] // micro)}
        idle = [len(b) - -(-n // micro) for b, n in zip(batches, mine, strict=True)]  # batches of one dropped answer
        assert [sum(b) - i for b, i in zip(batches, idle, strict=True)] == mine
        found[ranks] = answers
        scores[ranks] = {name: rows(tmp_path / f"on{ranks}")[-1][name] for name in ("exact_match", "f1")}
    assert idle == [0, 1, 1]  # 7 questions on 3 ranks, 2 at a time
    assert found[1] == found[2] == found[3]
    assert len(set(map(len, found[1]))) > 1  # they end at different tokens
    data = read_questions(str(places / "validation.json"))
    golds = [(q.answers or ("",))[0] for q in data]
    exact = sum(normalize(a) == normalize(g) for a, g in zip(found[1], golds, strict=True))
    assert scores[1] == scores[2] == scores[3]
    assert scores[1]["exact_match"] == pytest.approx(100 * exact / 7)
    assert scores[1]["f1"] == pytest.approx(100 * sum(map(f1, found[1], golds)) / 7)


# ----------------------------------------------------------------------------------------- checkpoints and exports


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_resume_on_other_ranks(group, one, places, tmp_path, lora):
    options = LORA if lora else []
    group(2)(ON_RANKS.train_until, arguments(places, tmp_path, "many", *options), STEPS // 2)
    assert len(rows(tmp_path / "many")) == STEPS // 2
    assert not (tmp_path / "many" / "exported").exists()  # not before all steps are done
    group(3)(ON_RANKS.train, arguments(places, tmp_path, "many", *options))
    assert_same(one(*options), tmp_path / "many")


@pytest.mark.parametrize(("model", "options", "words"), [
    ("other", LORA, "other frozen weights, or with another lora.alpha"),
    ("llama", [*LORA[:3], "7"], "other frozen weights, or with another lora.alpha"),
    ("llama", ["--lora.rank", "2", "--lora.alpha", "6"], "is of another model: model.layers"),
    ("llama", [], "is of another model: "),
    ("gpt2", [], "is of another model: "),
], ids=["another base", "another alpha", "another rank", "full", "another model"])  # fmt: skip
def test_a_checkpoint_of_something_else(group, one, places, tmp_path, model, options, words):
    given = arguments(places, tmp_path, "new", *options, "--resume", str(one(*LORA)), model=model)
    for code, text in group(2)(SCRIPTS.ends, SCRIPT, given):
        assert code == 2
        assert re.search(words, text), text
        assert text.count("error: ") == 1, text


def logits(model):
    tokens = torch.randint(256, (2, 30), generator=torch.Generator().manual_seed(3))
    with double_norms(), torch.no_grad():
        return model.double().eval()(tokens).logits


def test_transformers_reads_the_export(one, reference, places):
    import transformers

    folder = one() / "exported"
    found = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    assert type(found).__name__ == "LlamaForCausalLM"
    # Parameters agree within 1e-12; logits are of order 10, sums of a hundred such products.
    torch.testing.assert_close(logits(found), logits(reference(False)[2]), atol=1e-9, rtol=0)
    before = transformers.AutoModelForCausalLM.from_pretrained(places / "llama", dtype=torch.float64)
    assert (logits(found) - logits(before)).abs().max() > 0.1
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")  # tied: the embedding is written once
    assert load_tokenizer(str(folder))("é?")["input_ids"] == load_tokenizer(None)("é?")["input_ids"]


def test_peft_reads_the_export(one, reference, places):
    import peft
    import transformers

    folder = one(*LORA) / "exported"
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}
    assert "base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight" in load_file(
        folder / "adapter_model.safetensors"
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(places / "llama", dtype=torch.float64)
    before = logits(base)
    found = peft.PeftModel.from_pretrained(base, folder)
    torch.testing.assert_close(logits(found), logits(reference(True)[2]), atol=1e-9, rtol=0)  # as above
    assert (logits(found) - before).abs().max() > 0.1


def test_the_export_is_a_model_path(group, one, places, tmp_path):
    folder = one() / "exported"
    options = ["--train.steps", "1", "--optimizer.lr", "1e-30", "--export", "false"]
    group(2)(ON_RANKS.train, [*arguments(places, tmp_path, "again", *options), "--model_path", str(folder)])
    # The export is in fp64; it is read as fp32 before the model is made fp64: 1e-5 is a hundred roundings of 2^-24.
    assert abs(rows(tmp_path / "again")[-1]["val_loss"] - rows(one())[-1]["val_loss"]) < 1e-5


def test_a_finished_training_is_exported_later(group, places, tmp_path):
    """As after an export that failed for want of room, or a job killed in it: started again, there are no steps."""
    places_and_steps = arguments(places, tmp_path, "run", "--train.steps", "1")
    group(2)(ON_RANKS.train, [*places_and_steps, "--export", "false"])
    assert not (tmp_path / "run" / "exported").exists()
    group(2)(ON_RANKS.train, places_and_steps)
    assert len(rows(tmp_path / "run")) == 2  # the step, and the evaluation after it
    assert (tmp_path / "run" / "exported" / "model.safetensors").is_file()


# -------------------------------------------------------------------------------------------------------- mistakes


def broken(places, tmp_path, what):
    """A folder like the model's with something missing or damaged, or a file of questions likewise."""
    folder = tmp_path / "model"
    shutil.copytree(places / "llama", folder)
    if what == "cut":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    elif what == "absent weights":
        from safetensors.torch import save_file

        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    else:
        (folder / what).unlink()
    return folder


@pytest.mark.parametrize(("what", "words"), [
    ("config.json", "no config.json there"),
    ("model.safetensors", "neither model.safetensors nor model.safetensors.index.json there"),
    ("tokenizer.json", "holds no tokenizer"),
    ("cut", "the weights cannot be used"),
    ("absent weights", "model.layers.1.mlp.up_proj.weight missing"),
])  # fmt: skip
def test_bad_model(group, places, tmp_path, what, words):
    given = [*arguments(places, tmp_path, "bad"), "--model_path", str(broken(places, tmp_path, what))]
    assert_one_line(group(2)(SCRIPTS.ends, SCRIPT, given), words)


@pytest.mark.parametrize(("options", "words"), [
    (["--lora.rank", "2", "--lora.targets", "[q_proj, query]"], "no layer is called query; this model has .*k_proj"),
    (["--lora.rank", "2", "--lora.targets", "[norm]"], "choose linear layers"),
    (["--lora.rank", "-1"], "lora.rank = -1 must be 0"),
    (["--data.sequence_length", "129"], "takes 128 tokens; lower it"),
    (["--data.sequence_length", "13"], "none of 53 questions fits"),
    (["--data.answer_length", "80"], "data.answer_length = 80"),
    (["--data.train", "null"], "must be given together"),
    (["--data.train", "missing.json"], "missing.json: No such file"),
    (["--train.compile", "true"], "train.compile = true is not for this script"),
    (["--batch.global_size", "54"], "53 samples, fewer than batch.global_size = 54"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)  # fmt: skip
def test_bad_settings(group, places, tmp_path, options, words):
    assert_one_line(group(2)(SCRIPTS.ends, SCRIPT, arguments(places, tmp_path, "bad", *options)), words)


@pytest.mark.parametrize("package", ["peft", "transformers"])
def test_a_missing_package(group, places, tmp_path, package):
    given = arguments(places, tmp_path, "bad", *LORA)
    assert_one_line(group(2)(ON_RANKS.ends_without, package, given), f"needs the package {package}")


def assert_one_line(results, words):
    for code, text in results:
        assert code == 2, text
        lines = [line for line in text.splitlines() if "error: " in line]
        assert len(lines) == 1, text
        assert re.search(words, lines[0]), text
        assert "Traceback" not in text
