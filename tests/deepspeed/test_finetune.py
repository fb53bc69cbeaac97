"""Trainer alone and with DeepSpeed: the training of a plain loop, every question answered once, exports, bad input."""

import importlib.util
import itertools
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from equality import largest_difference
from launching import OnRanks
from safetensors.torch import load_file

from common.data_sharding import BatchConfig, BatchPlan
from common.optimizer import OptimizerConfig, build_optimizer, learning_rate, set_learning_rate
from common.ranks import Ranks
from finetuning.squad import read_questions
from finetuning.tokens import QuestionDataset, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
ON_RANKS = OnRanks("tests/deepspeed/finetune_on_ranks.py")
STEPS, GLOBAL = 3, 48
# Plain gradient descent at a rate of 1 and without clipping: the weights at the end are those of the beginning minus
# the gradients, so that a factor in a gradient, which AdamW would hide, is as large in them.
SGD = OptimizerConfig(
    name="sgd", lr=1.0, betas=(0.0, 0.9), weight_decay=0.0, warmup_steps=0, min_lr_ratio=1.0, clip=1e6
)
# A large decay of the matrices alone: which parameters are matrices is not to be seen in the parts of stage 3.
ADAMW = OptimizerConfig(lr=0.01, weight_decay=2.0, warmup_steps=2)
TOLERANCE = 1e-5  # fp32: sums in another order move the last bits, 6e-8 of values of order 1, through three steps


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


@pytest.fixture(scope="module", autouse=True)
def new_ranks(group):
    """Ranks that no other script used: after DeepSpeed's stage 3 in a process, `transformers` may leave what
    a checkpoint does not hold, the rotary embedding's frequencies, as they were found in memory."""
    group.stop()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with a small model and two files of questions."""
    import transformers

    folder = tmp_path_factory.mktemp("finetune")
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=50, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, eos_token_id=256,
        bos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(shape).save_pretrained(folder / "llama")
    load_tokenizer(None).save_pretrained(folder / "llama")
    (folder / "train.json").write_text(json.dumps(questions(0, 53)))
    (folder / "validation.json").write_text(json.dumps(questions(53, 7)))  # 2 ranks get unequal parts
    return folder


def arguments(places, folder, *more, optimizer=SGD):
    return [
        "--model_path", str(places / "llama"), "--data.train", str(places / "train.json"), "--data.validation",
        str(places / "validation.json"), "--data.sequence_length", "64", "--data.answer_length", "8",
        "--batch.global_size", str(GLOBAL), "--train.steps", str(STEPS), "--runs_dir", str(folder), "--run_name", "run",
        "--optimizer.name", optimizer.name, "--optimizer.lr", str(optimizer.lr), "--optimizer.betas",
        str(list(optimizer.betas)), "--optimizer.weight_decay", str(optimizer.weight_decay), "--optimizer.warmup_steps",
        str(optimizer.warmup_steps), "--optimizer.min_lr_ratio", str(optimizer.min_lr_ratio), "--optimizer.clip",
        str(optimizer.clip), *more,
    ]  # fmt: skip


def options(strategy, accumulation=1, ranks=2):
    deepspeed = ["--deepspeed_config", f"deepspeed/configs/{strategy}.json"] if strategy != "baseline" else []
    return [*deepspeed, "--batch.micro_size", str(GLOBAL // ranks // accumulation)]


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def data(places):
    """(training set, plan of one process, sample rows by step)."""
    tokenizer = load_tokenizer(None)
    train_set = QuestionDataset(read_questions(str(places / "train.json")), tokenizer, 64, training=True)
    plan = BatchPlan(BatchConfig(GLOBAL), len(train_set), 1234)
    return train_set, plan


@pytest.fixture(scope="module")
def plain(places, data):
    """`plain(optimizer)`: a plain loop over the whole global batch in one process: (losses and norms, weights)."""
    import transformers

    made, (train_set, plan) = {}, data

    def train(config):
        model = transformers.LlamaForCausalLM.from_pretrained(places / "llama")
        optimizer, found = build_optimizer(model.parameters(), config, torch.device("cpu")), []
        for step in range(STEPS):
            set_learning_rate(optimizer, learning_rate(step, STEPS, config))
            batch = [train_set[plan.sample(position)] for position in plan.positions(step)[0]]
            tokens, targets = (torch.stack(part) for part in zip(*batch, strict=True))
            loss = F.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten())  # over what counts
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad()
            found.append((loss.item(), norm.item()))
        return found, {name: p.detach() for name, p in model.named_parameters()}

    def get(config):
        if config.name not in made:
            made[config.name] = train(config)
        return made[config.name]

    return get


def assert_same(run, expected, tolerance=TOLERANCE):
    """Losses and norms of all steps, and the exported weights at the end."""
    losses, weights = expected
    found = [row for row in rows(run) if "loss" in row]
    assert len(found) == STEPS
    for row, (loss, norm) in zip(found, losses, strict=True):
        assert abs(row["loss"] - loss) <= TOLERANCE, (row, loss)
        assert abs(row["grad_norm"] - norm) <= 10 * TOLERANCE, (row, norm)  # of order 10
    assert largest_difference(load_file(run / "exported" / "model.safetensors"), weights) <= tolerance


@pytest.fixture(scope="module")
def one(group, places, tmp_path_factory):
    """What one rank saw and left behind, without DeepSpeed: (what it saw, its run folder)."""
    folder = tmp_path_factory.mktemp("one")
    seen = group(1)(ON_RANKS.train, arguments(places, folder))
    return seen[0], folder / "run"


# ---------------------------------------------------------------------------------------------------- the training


def test_one_process_is_the_plain_loop(one, plain):
    assert_same(one[1], plain(SGD))
    losses = [loss for loss, _ in plain(SGD)[0]]
    assert losses[-1] < losses[0] - 0.3  # it learned something: equal is not zero


ALL = [
    (strategy, accumulation) for strategy in ("baseline", "zero0", "zero1", "zero2", "zero3") for accumulation in (1, 4)
]
THIN = [("baseline", 4), ("zero2", 4), ("zero3", 1)]


@pytest.mark.parametrize(
    ("strategy", "accumulation"),
    [pytest.param(*case, marks=[] if case in THIN else [pytest.mark.slow]) for case in ALL],
)
def test_two_ranks_train_what_one_does(group, one, plain, data, places, tmp_path, strategy, accumulation):
    """The same loss, gradients, samples and answers, and as many optimizer steps as were asked for."""
    seen = group(2)(ON_RANKS.train, arguments(places, tmp_path, *options(strategy, accumulation)))
    assert_same(tmp_path / "run", plain(SGD))
    train_set, plan = data
    for rank, mine in enumerate(seen):
        assert mine["optimizer_steps"] == STEPS
        assert mine["micro_batches"] == [GLOBAL // 2 // accumulation] * (STEPS * accumulation)
        part = slice(rank * GLOBAL // 2, (rank + 1) * GLOBAL // 2)
        positions = [position for step in range(STEPS) for position in plan.positions(step)[0][part]]
        assert mine["samples"] == [tuple(train_set[plan.sample(position)][0].tolist()) for position in positions]
    alone, run = one
    assert seen[0]["asked"] == seen[1]["asked"] == alone["asked"]
    assert len(set(alone["asked"])) == 7
    assert seen[0]["answers"] == seen[1]["answers"] == alone["answers"]
    a, b = rows(run)[-1], rows(tmp_path / "run")[-1]
    assert (a["exact_match"], a["f1"]) == (b["exact_match"], b["f1"])
    assert abs(a["val_loss"] - b["val_loss"]) <= TOLERANCE


@pytest.mark.parametrize(
    ("ranks", "strategy"),
    [(2, "zero3"), *[pytest.param(n, s, marks=pytest.mark.slow) for n, s in
                     [(1, "zero2"), (2, "baseline"), (2, "zero0"), (2, "zero2"), (2, "zero2_cpu_offload"),
                      (2, "zero3_cpu_offload"), (3, "zero3"), (4, "zero2"), (4, "zero3")]]],
)  # fmt: skip
def test_adamw(group, plain, places, tmp_path, ranks, strategy):
    """Learning rate, decay of matrices alone, clipping. AdamW divides by small averages: 1e-4 where SGD has 1e-5."""
    given = arguments(places, tmp_path, *options(strategy, 1, ranks), optimizer=ADAMW)
    group(ranks)(ON_RANKS.train, given)
    assert_same(tmp_path / "run", plain(ADAMW), 1e-4)
    assert [row["lr"] for row in rows(tmp_path / "run") if "loss" in row] == pytest.approx(
        [learning_rate(step, STEPS, ADAMW) for step in range(STEPS)], rel=1e-12
    )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["baseline", "zero1", "zero2", "zero3"])
def test_the_random_model_is_the_same_under_all(group, places, tmp_path, strategy):
    """As the README's commands train it; and as fsdp/finetune.py's first line says."""
    given = [*arguments(places, tmp_path, *options(strategy))[2:], "--train.steps", "1"]
    group(2)(ON_RANKS.train, given)
    (tmp_path / "plain").mkdir()
    group(1)(ON_RANKS.train, [*arguments(places, tmp_path / "plain")[2:], "--train.steps", "1"])
    assert abs(rows(tmp_path / "run")[0]["loss"] - rows(tmp_path / "plain" / "run")[0]["loss"]) <= TOLERANCE


@pytest.mark.parametrize(
    "strategy", ["zero2", *[pytest.param(s, marks=pytest.mark.slow) for s in ("baseline", "zero3")]]
)
def test_bf16_trains(group, plain, places, tmp_path, strategy):
    """3e-2 is some seven roundings of 2^-8 of a loss of about 5.6; equal it must not be."""
    group(2)(ON_RANKS.train, arguments(places, tmp_path, *options(strategy), "--train.precision", "bf16"))
    low, exact = rows(tmp_path / "run"), plain(SGD)[0]
    assert 0 < abs(low[0]["loss"] - exact[0][0]) < 3e-2
    assert low[STEPS - 1]["loss"] < low[0]["loss"] - 0.3


# ------------------------------------------------------------------------------------- what it leaves, and going on


def test_the_export_loads_in_transformers(one, data):
    """Weights, tokenizer and shape, without code: safetensors alone."""
    import transformers

    folder = one[1] / "exported"
    assert not [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert model.config.use_cache
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == load_tokenizer(None).eos_token_id
    loaded = {name: p.detach() for name, p in model.named_parameters()}
    assert largest_difference(loaded, load_file(folder / "model.safetensors")) == 0


@pytest.mark.parametrize(
    "strategy", ["zero2", *[pytest.param(s, marks=pytest.mark.slow) for s in ("baseline", "zero3")]]
)
def test_going_on(group, plain, places, tmp_path, strategy):
    """Told to stop after two steps of three, then started again: the same training, and one record of it."""
    given = arguments(places, tmp_path, *options(strategy, 2), optimizer=ADAMW)
    group(2)(ON_RANKS.train_until, given, 2)
    assert len([row for row in rows(tmp_path / "run") if "loss" in row]) == 2
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-2" / "complete.json").is_file()
    seen = group(2)(ON_RANKS.train, given)
    assert [mine["optimizer_steps"] for mine in seen] == [1, 1]
    assert_same(tmp_path / "run", plain(ADAMW), 1e-4)


def test_checkpoints_that_cannot_be_used(group, places, tmp_path):
    """Another strategy, other data, a damaged file; and one that was never finished is not there at all."""
    given = arguments(places, tmp_path, *options("zero2"), "--train.steps", "2", "--checkpoint.every", "1")
    group(2)(ON_RANKS.train, given)
    folder = tmp_path / "run" / "checkpoints"
    more = [*given, "--train.steps", "3"]
    other = [*arguments(places, tmp_path, *options("zero3"))]
    assert_one_line(group(2)(ON_RANKS.ends, other), "checkpoint-2 was made with zero2 on 2 ranks, this is zero3 on 2")
    fewer = [*arguments(places, tmp_path, *options("zero2", 2, 1))]
    assert_one_line(group(1)(ON_RANKS.ends, fewer), "checkpoint-2 was made with zero2 on 2 ranks, this is zero2 on 1")
    other_model = shutil.copytree(places / "llama", tmp_path / "llama")
    other_data = shutil.copy(places / "train.json", tmp_path / "other.json")
    for name, made, now in [
        ("seed", "1234", "7"), ("batch.global_size", "48", "24"), ("data.sequence_length", "64", "72"),
        ("data.train", places / "train.json", other_data), ("model_path", places / "llama", other_model),
    ]:  # fmt: skip
        refused = group(2)(ON_RANKS.ends, [*more, "--batch.micro_size", "12", f"--{name}", str(now)])
        assert_one_line(refused, f"checkpoint-2 was made with {name} = {re.escape(str(made))}, this run has {now};")
    (folder / "checkpoint-2" / "more.pt").touch()
    assert_one_line(group(2)(ON_RANKS.ends, more), "more.pt is not among the files of complete.json")
    (folder / "checkpoint-2" / "more.pt").unlink()
    file = next((folder / "checkpoint-2").rglob("*optim_states.pt"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert_one_line(group(2)(ON_RANKS.ends, more), "is missing or changed since it was written")
    (folder / "checkpoint-2" / "complete.json").unlink()
    assert [mine["optimizer_steps"] for mine in group(2)(ON_RANKS.train, more)] == [2, 2]  # from checkpoint-1


@pytest.fixture
def settings(monkeypatch):
    """deepspeed/finetune_settings.py, which does not import DeepSpeed."""
    monkeypatch.syspath_prepend(ROOT / "deepspeed")
    monkeypatch.delitem(sys.modules, "settings", raising=False)  # other lessons have one, too
    spec = importlib.util.spec_from_file_location("finetune_settings", ROOT / "deepspeed" / "finetune_settings.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_as_many_checkpoints_are_kept_as_the_settings_say(settings, tmp_path):
    """By number, not by name: checkpoint-10 is newer than checkpoint-9. An unfinished one does not count."""
    config = settings.FinetuneConfig()
    config.checkpoint.keep = 2
    for step in (8, 9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text("w")
        if step != 9:
            settings.commit(folder, step, "ddp", config, Ranks(0, 1, 0, 1, "python", torch.device("cpu")))
    assert [path.name for path in settings.committed(tmp_path)] == ["checkpoint-8", "checkpoint-10"]
    settings.commit(tmp_path / "checkpoint-9", 9, "ddp", config, Ranks(0, 1, 0, 1, "python", torch.device("cpu")))
    assert [path.name for path in settings.committed(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert not (tmp_path / "checkpoint-8").exists()
    shutil.copytree(tmp_path / "checkpoint-9", tmp_path / "checkpoint-best")  # the user's: never chosen, nor removed
    config.checkpoint.keep = 1
    settings.commit(tmp_path / "checkpoint-10", 10, "ddp", config, Ranks(0, 1, 0, 1, "python", torch.device("cpu")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-best"]


def test_other_settings_of_the_optimizer_are_refused(settings, tmp_path):
    """Trainer would go on with those of its checkpoint, whatever config.yaml says."""
    config, ranks = settings.FinetuneConfig(), Ranks(0, 1, 0, 1, "python", torch.device("cpu"))
    (tmp_path / "checkpoint-2").mkdir()
    settings.commit(tmp_path / "checkpoint-2", 2, "ddp", config, ranks)
    assert settings.last_checkpoint(tmp_path, "ddp", config, ranks) == (tmp_path / "checkpoint-2", 2)
    config.optimizer.betas = (0.5, 0.6)
    path, _, problem = settings.check(tmp_path / "checkpoint-2", "ddp", config, 1)
    assert (
        f"{path} was made with optimizer.betas = [0.9, 0.95], this run has [0.5, 0.6]; go on as it was made" in problem
    )


# -------------------------------------------------------------------------------------------------------- bad input


def test_bad_settings(group, places, tmp_path):
    """One line on each rank, in the same words, and exit code 2."""
    good = json.loads((ROOT / "deepspeed/configs/zero2.json").read_text())
    (tmp_path / "text.json").write_text("stage: 2")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "batch.json").write_text(json.dumps(good | {"train_batch_size": 64}))
    (tmp_path / "clip.json").write_text(json.dumps(good | {"gradient_clipping": 0.5}))
    (tmp_path / "typo.json").write_text(json.dumps(good | {"zero_optimisation": {}}))
    for given, words in [
        (["--deepspeed_config", "missing.json"], "missing.json: No such file"),
        (["--deepspeed_config", str(tmp_path / "text.json")], "text.json: not valid JSON"),
        (["--deepspeed_config", str(tmp_path / "list.json")], "list.json holds a list"),
        (["--deepspeed_config", str(tmp_path / "batch.json")], "train_batch_size = 64, but the settings give 48"),
        (["--deepspeed_config", str(tmp_path / "clip.json")], "gradient_clipping = 0.5, but the settings give"),
        (["--deepspeed_config", str(tmp_path / "typo.json")], "unknown key zero_optimisation; did you mean"),
        (["--deepspeed_confg", "x"], "unknown key deepspeed_confg.*did you mean deepspeed_config"),
        (["--train.precision", "fp64"], "train.precision = fp64"),
        (["--train.precision", "fp16"], "train.precision = fp16"),
        (["--resume", "elsewhere"], "resume = elsewhere"),
        (["--batch.global_size", "49"], "batch.global_size = 49 does not divide among 2"),
        (["--model_path", str(tmp_path)], "no config.json there"),
        (["--data.sequence_length", "129"], "takes 128 tokens; lower it"),
    ]:
        assert_one_line(group(2)(ON_RANKS.ends, [*arguments(places, tmp_path), *given]), words)
    assert not (tmp_path / "run").exists()


def assert_one_line(results, words):
    for code, text in results:
        assert code == 2, text
        lines = [line for line in text.splitlines() if "error: " in line]
        assert len(lines) == 1, text
        assert re.search(words, lines[0]), text
        assert "Traceback" not in text


# -------------------------------------------------------------------------------------------------------- launchers


@pytest.mark.slow
def test_the_launcher_of_deepspeed(places, plain, tmp_path):
    from launching import free_port, run_command

    binary = Path(sys.executable).parent / "deepspeed"
    launcher = [sys.executable, str(binary), "--num_gpus", "2", "--master_port", str(free_port())]
    given = arguments(places, tmp_path, *options("zero2", 4))
    run_command([*launcher, "deepspeed/finetune.py", *given], 200, DEVICE="cpu", DS_ACCELERATOR="cpu")
    assert_same(tmp_path / "run", plain(SGD))


@pytest.mark.slow
def test_the_table_in_bf16_and_of_a_given_model(launch, places, tmp_path):
    """Stage 0 has no bf16 here; the other rows go on. A model may be given with `=`, too."""
    place = ["--steps", "3", "--output", str(tmp_path / "low")]
    model = [f"--model_path={places / 'llama'}", "--data.sequence_length", "64", "--batch.global_size", "8"]
    more = ["--rows", "DDP", "0Z", "1Z", "--", "--train.precision", "bf16", *model]
    done = launch("deepspeed/compare_stages.py", *place, *more, nproc=0, timeout=300)
    assert "0Z is left out: without ZeRO DeepSpeed has another optimizer in bf16" in done.stdout
    assert "a random model" not in done.stdout
    runs = json.loads((tmp_path / "low" / "results.json").read_text())["runs"]
    assert [run["run"] for run in runs] == ["DDP-2G1N", "1Z-2G1N"]
