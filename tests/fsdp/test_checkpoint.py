"""fsdp/checkpoint.py: what it writes is the state, whoever loads it, and what cannot be loaded is said in one line."""

import hashlib
import json
import re
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from equality import SMALL, read_checkpoint
from launching import SCRIPTS
from safetensors.torch import load_file

from common.data_sharding import derive_seed
from common.transformer import ModelConfig, Transformer

SCRIPT = "fsdp/checkpoint.py"
MODEL = ["--model.width", "32", "--model.ffn_width", "50", "--model.layers", "2"]  # 3 ranks divide neither
CONFIG = ModelConfig(width=32, ffn_width=50, layers=2)


@pytest.fixture(scope="module")
def saved(group, tmp_path_factory):
    """A run folder that three ranks have saved, and what rank 0 printed."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    output = group(3)(SCRIPTS.printed, SCRIPT, ["save", "--output", str(folder), *MODEL])[0]
    return folder, output


def weights_of(run, step=1):
    found = read_checkpoint(run, step)
    return {name.removeprefix("model."): tensor for name, tensor in found.items() if name.startswith("model.")}


def fingerprint(weights):
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:12]


def sizes(output, row):
    return [int(size.replace(",", "")) for size in re.search(rf"^{row}.* s   (.*)$", output, re.MULTILINE)[1].split()]


def test_the_three_kinds_hold_the_same_state(saved):
    folder, output = saved
    sharded = read_checkpoint(folder, 1)
    whole = torch.load(folder / "whole.pt", weights_only=True)
    asynchronous = {name: torch.empty_like(tensor) for name, tensor in sharded.items()}
    dcp.load(asynchronous, storage_reader=dcp.FileSystemReader(folder / "asynchronous"), no_dist=True)
    moments = {
        f"optimizer.state.{name}.{entry}": value
        for name, state in whole["optimizer"]["state"].items()
        for entry, value in state.items()
    }
    flat = {f"model.{name}": tensor for name, tensor in whole["model"].items()} | moments
    tensors = [name for name in sharded if name.startswith(("model.", "optimizer.state."))]
    assert len(tensors) == 4 * (2 + 2 * 9 + 1)  # weight, step and two averages of each parameter
    for name in tensors:
        assert torch.equal(sharded[name], flat[name]), name
        assert torch.equal(sharded[name], asynchronous[name]), name
    assert fingerprint(weights_of(folder)) in output
    assert f"is the state before them: {fingerprint(weights_of(folder))}" in output


def test_the_step_is_that_of_all_ranks_samples(saved):
    """Each rank draws other samples; the averages of AdamW after one step are 0.1 times the mean gradient."""
    model = Transformer(CONFIG, seed=1234)
    for rank in range(3):
        text = torch.randint(256, (2, 65), generator=torch.Generator().manual_seed(derive_seed(1234, 0, rank)))
        (model(text[:, :-1], text[:, 1:]) / (3 * text[:, 1:].numel())).backward()
    state = read_checkpoint(saved[0], 1)
    for name, parameter in model.named_parameters():
        found = state[f"optimizer.state.{name}.exp_avg"] / 0.1
        torch.testing.assert_close(found, parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_bytes_by_rank(saved):
    folder, output = saved
    state = 4 * 3 * sum(tensor.numel() for tensor in weights_of(folder).values())  # weights and AdamW's averages, fp32
    whole = sizes(output, "whole, on rank 0")
    assert whole[1:] == [0, 0]
    assert state < whole[0] == (folder / "whole.pt").stat().st_size
    for kind in ("sharded, synchronous", "sharded, asynchronous"):
        each = sizes(output, kind)
        assert len(each) == 3
        assert sum(each) > state
        assert max(each) < 0.6 * sum(each), each  # a third of the state each, beside names and what is not cut


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_loads_at_any_number_of_ranks(group, saved, ranks):
    folder, _ = saved
    output = group(ranks)(SCRIPTS.printed, SCRIPT, ["load", str(folder)])[0]
    assert f"saved by 3 ranks, loaded by {ranks}" in output
    assert f"weights {fingerprint(weights_of(folder))}\n" in output
    mine = [int(size.replace(",", "")) for size in re.search(r"by rank: ([\d, ]+)$", output, re.MULTILINE)[1].split()]
    assert len(mine) == ranks
    assert sum(mine) == 4 * 3 * sum(tensor.numel() for tensor in weights_of(folder).values())


def test_copies_are_no_matter_of_the_next_run(group, tmp_path):
    """Saved by two copies of the model, loaded by 3 ranks, which cannot hold two."""
    folder = str(tmp_path / "run")
    group(2)(SCRIPTS.train, SCRIPT, ["save", "--output", folder, *MODEL, "--fsdp.replicate", "2"])
    output = group(3)(SCRIPTS.printed, SCRIPT, ["load", folder])[0]
    assert f"weights {fingerprint(weights_of(tmp_path / 'run'))}\n" in output


def test_a_wrong_asynchronous_checkpoint_is_noticed(group, tmp_path):
    """Where nothing is read back, what is compared at the end is the state of the steps after it."""
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import sys\n"
        "sys.path.insert(0, 'fsdp')\n"
        "sys.modules.pop('checkpoint', None)\n"
        "import checkpoint as lesson\n"
        "load, lesson.dcp.load = lesson.dcp.load, lambda state, **options: None\n"
        "try:\n"
        "    lesson.main()\n"
        "finally:\n"
        "    lesson.dcp.load = load\n"
    )
    for message, _ in group(2)(SCRIPTS.ends, str(broken), ["save", "--output", str(tmp_path / "run"), *MODEL]):
        assert "error: the asynchronous checkpoint holds" in message


def test_the_fingerprint_tells_weights_apart(group, saved, tmp_path):
    output = group(2)(SCRIPTS.printed, SCRIPT, ["save", "--output", str(tmp_path / "other"), *MODEL, "--seed", "5"])[0]
    assert fingerprint(weights_of(tmp_path / "other")) in output
    assert fingerprint(weights_of(saved[0])) not in output


def test_export_is_bit_equal_and_transformers_reads_it(group, saved, tmp_path):
    folder, _ = saved
    target = str(tmp_path / "weights" / "model.safetensors")
    [output] = group(1)(SCRIPTS.printed, SCRIPT, ["export", str(folder), "--output", target])
    weights = weights_of(folder)
    assert f"weights {fingerprint(weights)}" in output
    assert sorted(p.name for p in (tmp_path / "weights").iterdir()) == ["config.json", "model.safetensors"]
    exported = load_file(tmp_path / "weights" / "model.safetensors")
    assert torch.equal(exported["model.embed_tokens.weight"], weights["embedding.weight"])
    assert torch.equal(exported["model.layers.1.mlp.down_proj.weight"], weights["blocks.1.ffn.down.weight"])
    assert sorted(t.numpy().tobytes() for t in exported.values()) == sorted(
        t.numpy().tobytes() for t in weights.values()
    )

    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "weights").eval()
    model = Transformer(CONFIG, seed=None)
    model.load_state_dict(weights)
    tokens = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        # fp32, two layers, logits of order 1: both sum in another order; a swapped tensor is off by 0.1 and more
        torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=1e-5, rtol=1e-5)


def test_exports_what_the_training_saved(group, tmp_path):
    """A run of fsdp/train.py, in fp64, with a tied head; under another name it leaves other files alone."""
    arguments = [*SMALL, "--train.steps", "2", "--train.precision", "fp64", "--model.tied", "true"]
    group(2)(SCRIPTS.train, "fsdp/train.py", [*arguments, "--runs_dir", str(tmp_path), "--run_name", "run"])
    (tmp_path / "model.safetensors").write_text("somebody else's")
    export = ["export", str(tmp_path / "run"), "--output", str(tmp_path / "mine.safetensors")]
    group(1)(SCRIPTS.train, SCRIPT, export)
    exported, weights = load_file(tmp_path / "mine.safetensors"), weights_of(tmp_path / "run", 2)
    assert "lm_head.weight" not in exported
    assert exported["model.embed_tokens.weight"].dtype == torch.float64
    assert sorted(t.numpy().tobytes() for t in exported.values()) == sorted(
        t.numpy().tobytes() for t in weights.values()
    )
    assert (tmp_path / "model.safetensors").read_text() == "somebody else's"


def damaged(saved, tmp_path, how):
    """A copy of the run with something wrong."""
    run = tmp_path / "run"
    shutil.copytree(saved[0], run)
    step = run / "checkpoints" / "step_1"
    manifest = json.loads((step / "manifest.json").read_text())
    shard = step / manifest["shards"] / "__1_0.distcp"
    if how == "uncommitted":
        (step / "manifest.json").unlink()
    elif how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif how == "changed":
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    elif how == "other model":
        config = run / "config.yaml"
        config.write_text(config.read_text().replace("layers: 2", "layers: 3"))
    elif how == "missing":
        shutil.rmtree(run)
    return run


@pytest.mark.parametrize(("how", "words"), [
    ("missing", "config.yaml does not exist"),
    ("uncommitted", "holds no finished checkpoint"),
    ("truncated", "is truncated or changed"),
    ("changed", "does not have the checksum of its manifest"),
    ("other model", "is of another model: blocks.2."),
])  # fmt: skip
@pytest.mark.parametrize("command", ["load", "export"])
def test_what_cannot_be_loaded_ends_in_one_line(group, saved, tmp_path, command, how, words):
    run = damaged(saved, tmp_path, how)
    ranks = 2 if command == "load" else 1
    more = [] if command == "load" else ["--output", str(tmp_path / "out" / "model.safetensors")]
    for code, text in group(ranks)(SCRIPTS.ends, SCRIPT, [command, str(run), *more]):
        assert code == 2
        assert words in text
        assert text.count("error: ") == 1, text
        assert "Traceback" not in text
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(("arguments", "words"), [
    (["export", "runs/NAME", "--output", "weights"], "--output weights is no safetensors file"),
    (["save", "--output", "/dev/null/run"], "--output /dev/null/run: "),
    (["save", "--fsdp.replicate", "3"], "fsdp.replicate = 3 with 1 ranks"),
    (["save", "--fsdp.shards", "3"], "unknown key fsdp.shards"),
    (["lode", "runs/NAME"], "invalid choice: 'lode'"),
    ([], "arguments are required: command"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)  # fmt: skip
def test_mistakes_end_in_one_line(group, arguments, words):
    [(code, text)] = group(1)(SCRIPTS.ends, SCRIPT, arguments)
    assert code == 2
    assert words in text
    assert text.count("error: ") == 1, text
    assert "Traceback" not in text


def test_a_folder_in_use_is_left_alone(group, saved):
    for code, text in group(2)(SCRIPTS.ends, SCRIPT, ["save", "--output", str(saved[0]), *MODEL]):
        assert code == 2
        assert "choose a new folder" in text
