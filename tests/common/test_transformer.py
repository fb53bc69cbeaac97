"""The model by itself: config, seeded weights, stages, cache, checkpointing, compile, precision, experts.

That its arithmetic is that of Llama is shown in test_hf_weights.py.
"""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

from common import transformer
from common.transformer import (
    PRESETS,
    KVCache,
    ModelConfig,
    RMSNorm,
    Transformer,
    causal_attention,
    initial_weight,
    load_balancing_loss,
)

SMALL = dict(vocabulary=37, width=24, layers=4, heads=6, kv_heads=2, ffn_width=40, max_sequence=32)
DENSE, TIED = ModelConfig(**SMALL), ModelConfig(**SMALL, tied=True)
MIXTURE = ModelConfig(**SMALL, experts=5, experts_per_token=2)
CONFIGS = pytest.mark.parametrize("config", [DENSE, TIED, MIXTURE], ids=["dense", "tied", "mixture"])


def make_tokens(batch=3, sequence=20):
    tokens = torch.randint(SMALL["vocabulary"], (batch, sequence + 1), generator=torch.Generator().manual_seed(5))
    targets = tokens[:, 1:].clone()
    targets[0, :4] = -100
    return tokens[:, :-1], targets


def make_model(config, **options):
    """In fp64, with weights 5 times the initial ones, so that a mistake in any part moves the loss."""
    model = Transformer(config, **options).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.mul_(5)
    return model


def loss_and_gradients(model, *inputs):
    model.zero_grad()
    loss = model(*inputs)
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# --- config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_a_resolved_config_survives_yaml_and_replace(preset):
    config = ModelConfig(preset)
    assert all(value is not None for value in dataclasses.asdict(config).values())
    assert ModelConfig(**yaml.safe_load(yaml.safe_dump(dataclasses.asdict(config)))) == config
    assert dataclasses.replace(config) == config
    assert dataclasses.replace(config, layers=2).layers == 2


def test_what_is_given_goes_before_the_preset():
    config = ModelConfig("gpt_124m", layers=4, tied=False, experts=0)
    assert (config.layers, config.tied, config.width, config.head_size) == (4, False, 768, 64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(preset="gpt_125m"), "model.preset is 'gpt_125m'; expected one of tiny, .*did you mean gpt_124m?"),
        (dict(width=100), "model.width is 100 and model.heads 8; expected a multiple"),
        (dict(kv_heads=3), "model.heads is 8 and model.kv_heads 3; expected a multiple"),
        (dict(width=24), "model.head_size is 3 .*expected an even number"),
        (dict(layers=0), "model.layers is 0; expected at least 1"),
        (dict(heads=0), "model.heads is 0; expected at least 1"),
        (dict(norm_eps=0.0), "model.norm_eps is 0.0; expected"),
        (dict(experts=-1), "model.experts is -1; expected at least 0"),
        (dict(experts=2, experts_per_token=3), "model.experts_per_token is 3; expected at most"),
    ],
)
def test_impossible_configs_are_refused_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as refused:
        ModelConfig(**fields)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [  # the Llama counts are those of the published checkpoints
        ("tiny", 853_120),
        ("tiny_moe", 1_444_992),
        ("gpt_124m", 123_587_328),
        ("llama_1b", 1_235_814_400),
        ("llama3_8b", 8_030_261_248),
        ("llama3_70b", 70_553_706_496),
    ],
)
def test_parameter_counts_of_the_presets(preset, parameters):
    with torch.device("meta"):
        model = Transformer(ModelConfig(preset))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert not list(model.buffers())


# --- initial weights ----------------------------------------------------------------------------------------------


@CONFIGS
def test_initial_weights_depend_on_seed_and_name_alone(config):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = Transformer(config, seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)  # torch's generator was not touched
    torch.manual_seed(2)
    Transformer(TIED, seed=3)
    second = Transformer(config, seed=7).state_dict()
    other = Transformer(config, seed=8).state_dict()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
        assert torch.equal(weight, initial_weight(name, weight.shape, config, 7)), name
        assert name.endswith("norm.weight") or not torch.equal(weight, other[name]), name
    drawn = [weight.flatten()[:8] for name, weight in first.items() if not name.endswith("norm.weight")]
    assert len({tuple(values.tolist()) for values in drawn}) == len(drawn)  # no two parameters alike


def test_initial_standard_deviations():
    config = ModelConfig("tiny")
    for name, weight in Transformer(config).named_parameters():
        into_residual = name.endswith(("attention.output.weight", "ffn.down.weight"))
        expected = 0.02 / math.sqrt(2 * config.layers) if into_residual else 0.02
        if name.endswith("norm.weight"):
            assert bool((weight == 1).all())
        else:  # at least 8192 draws: the standard deviation is known to 0.8 %, so 4 % is five sigma
            assert weight.std().item() == pytest.approx(expected, rel=0.04)


@CONFIGS
def test_meta_device_then_initialize_is_the_same(config):
    with torch.device("meta"):
        model = Transformer(config, seed=7)
    model.initialize(7)  # nothing to fill yet
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu").initialize(7)
    expected = Transformer(config, seed=7).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


# --- pipeline stages ----------------------------------------------------------------------------------------------


@CONFIGS
def test_stages_compose_to_the_whole_model(config):
    tokens, targets = make_tokens()
    whole = make_model(config, seed=7)
    stages = [
        make_model(config, seed=7, with_head=False, layers=range(0, 1)),
        make_model(config, seed=7, with_embedding=False, with_head=False, layers=range(1, 3)),
        make_model(config, seed=7, with_embedding=False, layers=range(3, 4)),
    ]
    expected = whole.state_dict()
    if config.tied:  # the last stage holds its own copy
        expected = expected | {"head.weight": expected["embedding.weight"]}
    held = [name for stage in stages for name in stage.state_dict()]
    assert sorted(held) == sorted(expected)
    for stage in stages:
        assert all(torch.equal(weight, expected[name]) for name, weight in stage.state_dict().items())

    loss, gradients = loss_and_gradients(whole, tokens, targets)
    staged = stages[2](stages[1](stages[0](tokens)), targets)
    staged.backward()
    assert torch.equal(staged.detach(), loss)
    found = {name: parameter.grad for stage in stages for name, parameter in stage.named_parameters()}
    if config.tied:
        found["embedding.weight"] = found["embedding.weight"] + found.pop("head.weight")
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-12)


# --- forward ------------------------------------------------------------------------------------------------------


@CONFIGS
def test_loss_is_the_sum_over_valid_tokens(config):
    tokens, targets = make_tokens()
    model = make_model(config)
    logits = model(tokens)
    assert logits.shape == (3, 20, config.vocabulary) and logits.dtype == torch.float64
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(model(tokens, targets), expected, rtol=0, atol=1e-11)


def test_later_tokens_do_not_matter():
    tokens, _ = make_tokens()
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % SMALL["vocabulary"]
    model = make_model(DENSE)
    difference = (model(tokens) - model(changed)).abs().amax(dim=(0, 2))
    assert bool((difference[:12] == 0).all()) and bool((difference[12:] > 1e-3).all())


def test_positions_are_relative_and_can_be_given():
    tokens, _ = make_tokens()
    model = make_model(DENSE)
    expected = model(tokens)
    positions = torch.arange(20)
    # Rotary attention sees differences of positions only: rounding of cosines at 1e-16 remains.
    torch.testing.assert_close(model(tokens, positions=positions + 1000), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(model(tokens, positions=positions.expand(3, 20)), expected, rtol=0, atol=0)
    assert (model(tokens, positions=positions * 2) - expected).abs().max() > 1e-2


def test_too_long_a_sequence_is_refused():
    with pytest.raises(ValueError, match=r"sequence of 33 tokens; expected at most model\.max_sequence = 32"):
        Transformer(DENSE)(torch.zeros(1, 33, dtype=torch.int64))


def test_head_counts_come_from_the_weights():
    """Tensor parallelism by hand: each half of the heads in a model of its own, the outputs added."""
    attention = make_model(DENSE).blocks["0"].attention
    hidden = torch.randn(2, 9, DENSE.width, dtype=torch.float64)
    positions = torch.arange(9)
    angles = torch.rand(9, DENSE.head_size // 2, dtype=torch.float64)
    rotary = (angles.cos(), angles.sin())
    halves = []
    for rank in range(2):
        half = copy.deepcopy(attention)
        for projection in (half.query, half.key, half.value):
            projection.weight = torch.nn.Parameter(projection.weight.chunk(2, dim=0)[rank])
        half.output.weight = torch.nn.Parameter(half.output.weight.chunk(2, dim=1)[rank])
        halves.append(half(hidden, rotary, positions, None))
    torch.testing.assert_close(sum(halves), attention(hidden, rotary, positions, None), rtol=0, atol=1e-12)


def test_attention_function_can_be_replaced():
    tokens, _ = make_tokens()
    model = make_model(DENSE)
    expected, shapes = model(tokens), []

    def by_hand(query, key, value, mask=None):
        shapes.append((query.shape, key.shape))
        key, value = (part.repeat_interleave(3, dim=1) for part in (key, value))
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        hidden = torch.ones(20, 20, dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, -math.inf).softmax(-1) @ value

    for block in model.blocks.values():
        assert block.attention.attend is causal_attention
        block.attention.attend = by_hand
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-12)
    assert shapes == [((3, 6, 20, 4), (3, 2, 20, 4))] * 4  # keys arrive unrepeated


@pytest.mark.parametrize(("dtype", "masked", "key_heads"), [
    (torch.bfloat16, False, 2), (torch.float16, False, 2), (torch.bfloat16, True, 6), (torch.float32, False, 6),
])  # fmt: skip
def test_a_gpu_gets_keys_unrepeated_where_its_kernel_takes_them(monkeypatch, dtype, masked, key_heads):
    """Tensors of a GPU that is not there; and the same attention, in fp64, on the CPU."""
    seen, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(transformer, "_has_flash_attention", lambda: True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda query, key, *_, **more: seen.append((key, more)))
    with FakeTensorMode():
        query, key = (torch.empty(2, heads, 8, 4, dtype=dtype, device="cuda") for heads in (6, 2))
        causal_attention(query, key, key, query.new_ones(8, 8, dtype=torch.bool) if masked else None)
    ((key, options),) = seen
    assert key.shape[1] == key_heads and options["enable_gqa"] == (key_heads == 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    query, key, value = (torch.randn(2, heads, 8, 4, dtype=torch.float64) for heads in (6, 2, 2))
    repeated = causal_attention(query, key, value)
    monkeypatch.setattr(transformer, "takes_groups", lambda *_: True)
    torch.testing.assert_close(causal_attention(query, key, value), repeated, rtol=0, atol=1e-12)


# --- decoding -----------------------------------------------------------------------------------------------------


@CONFIGS
@pytest.mark.parametrize("pieces", [[20], [1] * 20, [7, 1, 1, 5, 6]], ids=["at once", "one by one", "pieces"])
def test_decoding_with_a_cache_equals_the_full_forward(config, pieces):
    tokens, _ = make_tokens()
    model = make_model(config)
    model.checkpoint_activations()  # which decoding does without
    cache = KVCache(24)
    logits = torch.cat([model(piece, cache=cache) for piece in tokens.split(pieces, dim=1)], dim=1)
    assert cache.length == 20
    assert cache.layer("0").keys.shape == (3, config.kv_heads, 24, config.head_size)
    torch.testing.assert_close(logits, model(tokens), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="25 tokens; a cache of 24"):
        model(tokens[:, :5], cache=cache)


@torch.no_grad()
def test_decoding_with_positions_of_the_caller():
    tokens, _ = make_tokens()
    model, cache = make_model(DENSE), KVCache(20)
    parts = []
    for start in range(0, 20, 5):
        positions = torch.arange(start, start + 5)
        parts.append(model(tokens[:, start : start + 5], positions=positions, cache=cache))
    assert cache.length == 0
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=0, atol=1e-12)


# --- activation checkpointing, compile, precision -----------------------------------------------------------------


@pytest.mark.parametrize(("config", "how"), [
    pytest.param(config, how, id=f"{how}-{name}", marks=() if (name, how) in (
        ("dense", "checkpointed"), ("tied", "checkpointed"), ("mixture", "checkpointed"), ("dense", "both"),
    ) else pytest.mark.slow)
    for name, config in (("dense", DENSE), ("tied", TIED), ("mixture", MIXTURE))
    for how in ("checkpointed", "compiled", "both", "whole", "checkpointed and whole")
])  # fmt: skip
def test_checkpointing_and_compile_change_nothing(config, how):
    torch._dynamo.reset()
    tokens, targets = make_tokens()
    model = make_model(config)
    loss, gradients = loss_and_gradients(model, tokens, targets)
    names = list(model.state_dict())
    calls = []
    if how == "checkpointed":
        for block in model.blocks.values():
            block.attention.register_forward_hook(lambda *_: calls.append(1))
    if "checkpointed" in how or how == "both":
        model.checkpoint_activations()
    if how in ("compiled", "both"):
        model.compile_blocks(backend="aot_eager")
    run = torch.compile(model, backend="aot_eager") if "whole" in how else model
    found_loss, found = loss_and_gradients(run, tokens, targets)
    assert list(model.state_dict()) == names
    # The compiler may order sums otherwise, hence not bitwise; fp64, losses of some 300.
    torch.testing.assert_close(found_loss, loss, rtol=0, atol=1e-11)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name.removeprefix("_orig_mod.")] if name in found else
                                   found["_orig_mod." + name], gradient, rtol=0, atol=1e-11)  # fmt: skip
    if calls:  # forward and backward each compute every block
        assert len(calls) == 2 * config.layers
        calls.clear()
        with torch.no_grad():
            model(tokens)
        assert len(calls) == config.layers


@pytest.mark.slow
@CONFIGS
def test_checkpointed_and_compiled_blocks_take_batches_of_any_size(config):
    """As training, evaluation of a last small batch, and training again do."""
    torch._dynamo.reset()
    tokens, targets = make_tokens()
    plain, model = make_model(config), make_model(config)
    model.checkpoint_activations()
    model.compile_blocks(backend="aot_eager")
    for batch in (3, 2, 3):
        loss, gradients = loss_and_gradients(plain, tokens[:batch], targets[:batch])
        found_loss, found = loss_and_gradients(model, tokens[:batch], targets[:batch])
        torch.testing.assert_close(found_loss, loss, rtol=0, atol=1e-11)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-11)
        with torch.no_grad():
            torch.testing.assert_close(model(tokens[:batch]), plain(tokens[:batch]), rtol=0, atol=1e-11)


def test_checkpointing_keeps_one_activation_a_block():
    """What autograd keeps for backward: per block its input alone, instead of some twenty tensors."""
    tokens, targets = make_tokens()

    def kept_bytes(model):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.setdefault(tensor.untyped_storage().data_ptr(), tensor), lambda tensor: tensor
        ):
            loss = model(tokens, targets)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        assert loss.requires_grad
        return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in weights)

    model = make_model(DENSE)
    before = kept_bytes(model)
    model.checkpoint_activations()
    # The non-reentrant checkpoint keeps block inputs outside these hooks; what they see is embedding, norm and head.
    assert kept_bytes(model) < before / 4


@pytest.mark.slow
def test_inductor_compiles_the_blocks_once():
    """The default compiler, in fp32, as the scripts use it."""
    tokens, targets = make_tokens()
    torch._dynamo.reset()
    model = Transformer(DENSE)
    loss, gradients = loss_and_gradients(model, tokens, targets)
    torch._dynamo.utils.counters.clear()
    model.compile_blocks()
    found_loss, found = loss_and_gradients(model, tokens, targets)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # not one for each of the 4 blocks
    assert found.keys() == gradients.keys()
    # fp32: the loss is a sum of 56 terms of 3.6; fused kernels round otherwise at 1e-7 each.
    torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


@CONFIGS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(config, dtype):
    """fp32 loss and gradients; near the fp32 ones, as far as 8 or 11 bits of mantissa go."""
    tokens, targets = make_tokens()
    model = make_model(config).float()
    expected = model(tokens, targets).item()
    with torch.autocast("cpu", dtype):
        loss = model(tokens, targets)
        logits = model(tokens)
    loss.backward()
    assert (loss.dtype, logits.dtype) == (torch.float32, dtype)
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    assert loss.item() == pytest.approx(expected, rel=4 * torch.finfo(dtype).eps)


def test_fp64_stays_fp64():
    """Every floating-point tensor between the parts is fp64: no fp32 norm or rotary on the way."""
    tokens, targets = make_tokens()
    model = make_model(MIXTURE)
    seen = set()
    for module in model.modules():
        module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    loss, gradients = loss_and_gradients(model, tokens, targets)
    assert seen == {torch.float64} == {gradient.dtype for gradient in gradients.values()} | {loss.dtype}
    # A finite difference in fp64 agrees to 1e-7 only if nothing is rounded to fp32 (1e-7 / step) on the way.
    weight, gradient = model.blocks["1"].attention.query.weight, gradients["blocks.1.attention.query.weight"]
    step = 1e-5
    with torch.no_grad():
        weight[3, 5] += step
        above = model(tokens, targets)
        weight[3, 5] -= 2 * step
        below = model(tokens, targets)
    assert ((above - below) / (2 * step)).item() == pytest.approx(gradient[3, 5].item(), rel=1e-6, abs=1e-7)


def test_bf16_weights():
    tokens, targets = make_tokens()
    model = Transformer(DENSE).bfloat16()
    assert model(tokens).dtype == torch.bfloat16 and model(tokens, targets).dtype == torch.float32


def test_a_norm_of_bf16_activations_keeps_its_fp32_weight():
    norm = RMSNorm(24, 1e-5)
    with torch.no_grad():
        norm.weight.copy_(1 + torch.arange(24) / 1000)  # which bf16 cannot hold
    hidden = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = F.rms_norm(hidden.float(), (24,), norm.weight, 1e-5).bfloat16()
    assert torch.equal(norm(hidden), expected)


# --- mixture of experts -------------------------------------------------------------------------------------------


def test_mixture_equals_a_loop_over_tokens():
    mixture = make_model(MIXTURE).blocks["2"].ffn
    hidden = torch.randn(3, 9, MIXTURE.width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    output, used = mixture(hidden), set()
    for token, found in zip(hidden.flatten(0, 1), output.flatten(0, 1), strict=True):
        probabilities = (mixture.router.weight @ token).softmax(0)
        best = sorted(range(MIXTURE.experts), key=lambda e: -probabilities[e].item())[: MIXTURE.experts_per_token]
        used |= set(best)
        expected = torch.zeros_like(token)
        for e in best:
            inner = F.silu(mixture.gate[e] @ token) * (mixture.up[e] @ token)
            expected += probabilities[e] / sum(probabilities[b] for b in best) * (mixture.down[e] @ inner)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert used == set(range(MIXTURE.experts))


def test_mixture_drops_no_token_and_idle_experts_get_zero_gradients():
    mixture = make_model(MIXTURE).blocks["0"].ffn
    with torch.no_grad():  # all tokens to experts 1 and 3, where a capacity limit would drop most
        mixture.router.weight.zero_()
        mixture.router.weight[1], mixture.router.weight[3] = 2.0, 1.0
    output = mixture(torch.rand(4, 8, MIXTURE.width, dtype=torch.float64) + 0.1)
    assert bool((output.abs().sum(-1) > 0).all())
    output.sum().backward()
    for stacked in (mixture.gate, mixture.up, mixture.down):
        assert [bool(part.abs().sum() > 0) for part in stacked.grad] == [False, True, False, True, False]


def test_load_balancing_loss():
    uniform = torch.eye(4, dtype=torch.float64).repeat(3, 1) * 1e-9  # each expert first equally often
    assert load_balancing_loss(uniform, 1).item() == pytest.approx(1.0, abs=1e-8)
    collapsed = torch.zeros(12, 4, dtype=torch.float64)
    collapsed[:, 2] = 50.0
    assert load_balancing_loss(collapsed, 1).item() == pytest.approx(4.0, abs=1e-8)
    transformers = pytest.importorskip("transformers")
    scores = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theirs = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func((scores,), 5, 2)
    # The reference sums over the chosen where we average, and works in fp32.
    assert load_balancing_loss(scores, 2).item() == pytest.approx(theirs.item() / 2, rel=1e-6)


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["tiny", "tiny_moe"])
def test_tiny_presets_learn(preset):
    """From a uniform guess, ln 256 = 5.5, towards the period of a repeating text."""
    model = Transformer(ModelConfig(preset))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.tensor(list(b"def add(a, b):\n    return a + b\n\n" * 3))[:65].expand(4, 65)
    losses = []
    for _ in range(12):
        loss = model(text[:, :-1], text[:, 1:]) / text[:, 1:].numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(256), abs=0.2) and losses[-1] < 2.5
