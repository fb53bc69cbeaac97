"""The same weights give the same logits in transformers, and travel to its format and back bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file

from common.hf_weights import from_hugging_face, load_hugging_face, save_hugging_face, to_hugging_face
from common.transformer import ModelConfig, Transformer

transformers = pytest.importorskip("transformers")

SMALL = dict(vocabulary=101, width=36, layers=3, heads=6, kv_heads=2, ffn_width=50, max_sequence=64)
CONFIGS = {
    "grouped": ModelConfig(**SMALL),
    "tied": ModelConfig(**SMALL, tied=True),
    "full": ModelConfig(**SMALL | dict(kv_heads=6), norm_eps=1e-3, rope_theta=500.0),
    "one_kv_head": ModelConfig(**SMALL | dict(kv_heads=1)),
    "head_size": ModelConfig(**SMALL, head_size=10),
    # original 16 and head_size 6: one frequency kept, one in between, one stretched in full
    "scaled_rope": ModelConfig(
        **SMALL, rope_factor=8.0, rope_theta=100.0, rope_original_sequence=40, rope_low_frequency_factor=1.0
    ),
    "mixture": ModelConfig(**SMALL, experts=4, experts_per_token=2),
}
# The reference computes norms and rotary angles in fp32 even in an fp64 model, hence not 1e-12: for logits of order
# 1 its norms alone round at 1e-7 each. The wrong pairing in rotary embeddings, or eps outside the root, costs 1e-2.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-6}


def random_model(config, dtype=torch.float32):
    """Weights large enough for attention to be uneven, norms other than 1: a forgotten one would show."""
    model = Transformer(config, seed=None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.05 if name in ("embedding.weight", "head.weight") else 0.15
            parameter.copy_(1 + 0.3 * noise if name.endswith("norm.weight") else scale * noise)
    return model.to(dtype)


def some_tokens(config):
    return torch.randint(config.vocabulary, (2, 50), generator=torch.Generator().manual_seed(2))


def load_reference(config, folder):
    kind = transformers.MixtralForCausalLM if config.experts else transformers.LlamaForCausalLM
    # eager: the fused kernels for a mixture's experts take neither fp64 nor odd sizes
    options = {"experts_implementation": "eager"} if config.experts else {}
    model, notes = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CONFIGS)
def test_saved_model_gives_the_same_logits_in_transformers(name, dtype, tmp_path):
    config = CONFIGS[name]
    model = random_model(config, dtype)
    save_hugging_face(model, tmp_path)
    reference = load_reference(config, tmp_path)
    assert reference.dtype == dtype
    tokens = some_tokens(config)
    with torch.no_grad():
        ours, theirs = model(tokens), reference(tokens).logits
    assert ours.std() > 0.25  # the comparison means something
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCES[dtype])


def hold_in_fp64(reference, config):
    """Let the reference's norms and rotary angles keep fp64, by the formulas of their papers."""
    for module in reference.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, weight=module.weight: (
                weight * x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
            )

    def angles(hidden, position_ids):
        pairs = torch.arange(config.head_size // 2, dtype=torch.float64)
        turned = position_ids[..., None] * config.rope_theta ** (-2 * pairs / config.head_size)
        return torch.cat((turned, turned), -1).cos(), torch.cat((turned, turned), -1).sin()

    reference.model.rotary_emb.forward = angles


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "scaled_rope"])
def test_logits_equal_to_the_last_digits_where_the_reference_keeps_fp64(name, tmp_path):
    config = CONFIGS[name]
    model = random_model(config, torch.float64)
    save_hugging_face(model, tmp_path)
    reference = load_reference(config, tmp_path)
    hold_in_fp64(reference, config)
    tokens = some_tokens(config)
    with torch.no_grad():
        # A mixture's router keeps an fp32 softmax in the reference.
        tolerance = 1e-6 if config.experts else 1e-12
        torch.testing.assert_close(model(tokens), reference(tokens).logits, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_equal_those_of_transformers(name, tmp_path):
    config = CONFIGS[name]
    model = random_model(config, torch.float64)
    save_hugging_face(model, tmp_path)
    reference = load_reference(config, tmp_path)
    tokens = some_tokens(config)
    loss = model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
    loss.backward()
    theirs = reference(tokens, labels=tokens).loss
    theirs.backward()
    torch.testing.assert_close(loss.detach(), theirs.detach().double(), rtol=0, atol=1e-6)
    gradients = to_hugging_face({name: p.grad for name, p in model.named_parameters()}, config)
    for name, parameter in reference.named_parameters():
        if name in gradients:  # all of a dense model; the reference stacks a mixture's experts
            # rtol: some gradients are of order 1, where the reference's fp32 parts alone move 1e-6
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-6)
    assert config.experts or gradients.keys() == dict(reference.named_parameters()).keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_bit_equal(name, dtype, tmp_path):
    config = CONFIGS[name]
    state = random_model(config, dtype).state_dict()
    there = to_hugging_face(state, config)
    back = from_hugging_face(there, config)
    save_hugging_face(model := random_model(config, dtype), tmp_path)
    loaded_config, loaded = load_hugging_face(tmp_path)
    assert loaded_config == config
    assert back.keys() == loaded.keys() == state.keys()
    for key in state:
        assert back[key].dtype == loaded[key].dtype == dtype
        assert torch.equal(back[key], state[key]) and torch.equal(loaded[key], state[key])
    model.load_state_dict(loaded)


@pytest.mark.parametrize("name", CONFIGS)
def test_reads_what_transformers_writes(name, tmp_path):
    """config.json of the installed transformers, and an index with several shards."""
    config = CONFIGS[name]
    model = random_model(config)
    save_hugging_face(model, tmp_path / "ours")
    load_reference(config, tmp_path / "ours").save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    loaded_config, loaded = load_hugging_face(tmp_path / "theirs")
    assert loaded_config == config
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded[key], tensor)


def test_tied_file_with_a_head_loads():
    config = CONFIGS["tied"]
    weights = to_hugging_face(random_model(config).state_dict(), config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    assert "head.weight" not in from_hugging_face(weights, config)


def spoil(folder, kind):
    """Make one mistake in a saved model; the words that the error line must hold."""
    config_file, weights_file = folder / "config.json", folder / "model.safetensors"
    fields, weights = json.loads(config_file.read_text()), load_file(weights_file)
    if kind == "no folder":
        return folder / "nowhere", ["nowhere/config.json does not exist"]
    if kind == "no weights":
        weights_file.unlink()
        torch.save(weights, folder / "pytorch_model.bin")
        return folder, ["neither model.safetensors nor", "pickled weights may run code"]
    if kind == "torn weights":
        weights_file.write_bytes(weights_file.read_bytes()[:1000])
        return folder, ["model.safetensors is not a whole safetensors file"]
    if kind == "missing shard":
        index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder, ["model-00001-of-00001.safetensors does not exist"]
    if kind == "broken json":
        config_file.write_text("{")
        return folder, ["config.json does not describe a model"]
    edits = {
        "architecture": ({"architectures": ["GPT2LMHeadModel"]}, "architecture is GPT2LMHeadModel; expected Llama"),
        "bias": ({"attention_bias": True}, "bias is True; expected False"),
        "activation": ({"hidden_act": "gelu"}, "hidden_act is gelu; expected silu"),
        "rope": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is yarn; expected default or"),
        "no width": ({"hidden_size": None}, "does not say hidden_size"),
        "odd heads": ({"num_attention_heads": 5}, "model.width is 36 and model.heads 5"),
        "other width": ({"intermediate_size": 51}, "has shape (50, 36); expected (51, 36)"),
        "more layers": ({"num_hidden_layers": 4}, "missing: model.layers.3."),
        "fewer layers": ({"num_hidden_layers": 2}, "unexpected: model.layers.2."),
    }  # fmt: skip
    config_file.write_text(json.dumps(fields | edits[kind][0]))
    return folder, [edits[kind][1]]


@pytest.mark.parametrize("kind", [
    "no folder", "no weights", "torn weights", "missing shard", "broken json", "architecture", "bias", "activation",
    "rope", "no width", "odd heads", "other width", "more layers", "fewer layers",
])  # fmt: skip
def test_mistakes_end_in_one_line(kind, tmp_path, capsys):
    save_hugging_face(random_model(CONFIGS["grouped"]), tmp_path)
    folder, words = spoil(tmp_path, kind)
    with pytest.raises(SystemExit) as stopped:
        load_hugging_face(folder)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for word in words:
        assert word in message


def test_wrong_config_for_a_state_dict(capsys):
    state = random_model(CONFIGS["grouped"]).state_dict()
    with pytest.raises(SystemExit):
        to_hugging_face(state, CONFIGS["tied"])
    assert "unexpected: head.weight" in capsys.readouterr().err


def test_saved_file_is_safetensors_of_the_standard_names(tmp_path):
    save_hugging_face(random_model(CONFIGS["grouped"]), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    names = load_file(tmp_path / "model.safetensors").keys()
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=101, hidden_size=36, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=50,
    ))  # fmt: skip
    assert names == reference.state_dict().keys()
