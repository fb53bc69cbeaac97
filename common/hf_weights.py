"""Weights to and from the Hugging Face format: Llama, and Mixtral for mixtures of experts.

Tensors are renamed (and a mixture's experts stacked), never changed, so a round trip is bit-equal. Only
safetensors files are read: they hold numbers, whereas a pickle may run code.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.ranks import fail
from common.strict_files import read_json
from common.transformer import ModelConfig, Transformer

_NAMES = {  # ours -> theirs, within a block; {e} is the expert
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "ffn.gate.weight": "mlp.gate_proj.weight",
    "ffn.up.weight": "mlp.up_proj.weight",
    "ffn.down.weight": "mlp.down_proj.weight",
    "ffn.router.weight": "block_sparse_moe.gate.weight",
    "ffn.gate": "block_sparse_moe.experts.{e}.w1.weight",
    "ffn.up": "block_sparse_moe.experts.{e}.w3.weight",
    "ffn.down": "block_sparse_moe.experts.{e}.w2.weight",
}
_NAMES_OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_FIELDS = {  # ours -> theirs, in the config
    "vocabulary": "vocab_size", "width": "hidden_size", "ffn_width": "intermediate_size",
    "layers": "num_hidden_layers", "heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
    "head_size": "head_dim", "max_sequence": "max_position_embeddings", "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings", "experts": "num_local_experts", "experts_per_token": "num_experts_per_tok",
}  # fmt: skip
_ROPE_FIELDS = {
    "rope_theta": "rope_theta", "rope_factor": "factor",
    "rope_low_frequency_factor": "low_freq_factor", "rope_high_frequency_factor": "high_freq_factor",
    "rope_original_sequence": "original_max_position_embeddings",
}  # fmt: skip


def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}


def _plan(config: ModelConfig) -> list[tuple[str, int | None, str, torch.Size]]:
    """Our name, expert (None: the whole tensor), their name and their shape, for every tensor of a model."""
    plan: list[tuple[str, int | None, str, torch.Size]] = []
    for name, shape in _shapes(config).items():
        if inside := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
            theirs = f"model.layers.{inside[1]}.{_NAMES[inside[2]]}"
        else:
            theirs = _NAMES_OUTSIDE[name]
        if "{e}" in theirs:
            plan += [(name, e, theirs.format(e=e), shape[1:]) for e in range(shape[0])]
        else:
            plan.append((name, None, theirs, shape))
    return plan


def _check(found: dict[str, Tensor], expected: dict[str, torch.Size], what: str) -> None:
    """End with one line if names or shapes are not those that the config asks for."""
    advice = "use the config that belongs to these weights (layers, tied, experts, widths)"
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    for names, word in ((missing, "missing"), (unexpected, "unexpected")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            fail(f"{what}: {word}: {', '.join(names[:3])}{more}; expected {len(expected)} tensors; {advice}")
    for name, shape in expected.items():
        if found[name].shape != shape:
            fail(f"{what}: {name} has shape {tuple(found[name].shape)}; expected {tuple(shape)}; {advice}")


def to_hugging_face(state_dict: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename a whole model's weights as files of LlamaForCausalLM, or MixtralForCausalLM, name them."""
    _check(state_dict, _shapes(config), "state dict")
    return {
        theirs: state_dict[ours] if expert is None else state_dict[ours][expert]
        for ours, expert, theirs, _ in _plan(config)
    }


def from_hugging_face(state_dict: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `to_hugging_face`. A tied model's superfluous lm_head.weight is left out."""
    plan = _plan(config)
    found = {name: state_dict[name] for name in state_dict if not (config.tied and name == "lm_head.weight")}
    _check(found, {theirs: shape for _, _, theirs, shape in plan}, "Hugging Face weights")
    result: dict[str, Tensor] = {}
    experts: dict[str, list[Tensor]] = {}
    for ours, expert, theirs, _ in plan:
        if expert is None:
            result[ours] = found[theirs]
        else:
            experts.setdefault(ours, []).append(found[theirs])
    return result | {name: torch.stack(tensors) for name, tensors in experts.items()}


def save_hugging_face(model: Transformer, folder: str | Path) -> None:
    """Write model.safetensors and config.json, as `from_pretrained` of transformers reads them."""
    config, folder = model.config, Path(folder)
    weights = {
        name: tensor.detach().contiguous().cpu() for name, tensor in to_hugging_face(model.state_dict(), config).items()
    }
    kind = "mixtral" if config.experts else "llama"
    rope = {theirs: getattr(config, ours) for ours, theirs in _ROPE_FIELDS.items()}
    fields = {theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()} | {
        "architectures": [f"{kind.capitalize()}ForCausalLM"], "model_type": kind, "hidden_act": "silu",
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": {"rope_type": "llama3"} | rope if config.rope_factor != 1.0 else None,
        "torch_dtype": str(next(iter(weights.values())).dtype).removeprefix("torch."),
        "attention_bias": False, "mlp_bias": False, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def load_hugging_face(folder: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read config.json and the safetensors (one file, or the shards of an index) of a Llama or Mixtral model.

    Returns the config and our state dict, on the CPU, in the files' dtype. What is missing, damaged or of
    another architecture ends the program with one line.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        fail(f"{folder}/config.json does not exist; expected a Hugging Face model's folder; check the path")
    config = _read_config(folder / "config.json")
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            fail(f"{index} is no index of safetensors ({error!r}); fetch it again")
        if outside := [name for name in names if Path(str(name)).name != name]:
            fail(f"{index} names {outside[0]}; expected files of the same folder; fetch it again")
    elif not (folder / names[0]).is_file():
        fail(
            f"{folder} has neither {names[0]} nor {index.name}; expected one, because pickled weights "
            "may run code; save the model again with save_pretrained of a current transformers"
        )
    weights: dict[str, Tensor] = {}
    for name in names:
        try:
            weights |= load_file(folder / name)
        except FileNotFoundError:
            fail(f"{folder / name} does not exist; expected it, for {index.name} names it; fetch this shard")
        except Exception as error:  # safetensors' own exception, which is a plain Exception
            fail(f"{folder / name} is not a whole safetensors file ({error}); fetch it again")
    return config, from_hugging_face(weights, config)


def _read_config(path: Path) -> ModelConfig:
    try:
        theirs: dict[str, Any] = read_json(path)
        # transformers 5 writes rope_parameters, 4 wrote rope_theta and rope_scaling
        rope = theirs.get("rope_parameters") or (theirs.get("rope_scaling") or {}) | {
            "rope_theta": theirs.get("rope_theta", 10000.0)
        }
        found = {
            "architecture": (theirs.get("architectures") or [None])[0],
            "hidden_act": theirs.get("hidden_act", "silu"),
            "rope_type": rope.get("rope_type", rope.get("type", "default")),
            "bias": bool(theirs.get("attention_bias") or theirs.get("mlp_bias")),
            "sliding_window": theirs.get("sliding_window"),
        }
        supported: dict[str, tuple[object, ...]] = {
            "architecture": ("LlamaForCausalLM", "MixtralForCausalLM"),
            "hidden_act": ("silu",), "rope_type": ("default", "llama3"),
            "bias": (False,), "sliding_window": (None,),
        }  # fmt: skip
        for key, value in found.items():
            if value not in supported[key]:
                allowed = " or ".join(map(str, supported[key]))
                fail(f"{path}: {key} is {value}; expected {allowed}; choose a model built like Llama")
        fields: dict[str, Any] = {ours: theirs.get(name) for ours, name in _FIELDS.items()}
        fields |= {ours: rope.get(name) for ours, name in _ROPE_FIELDS.items()}
        fields["kv_heads"] = fields["kv_heads"] or fields["heads"]
        optional = {"head_size", "tied", "experts", "experts_per_token", *_ROPE_FIELDS}
        if absent := [_FIELDS[name] for name in fields if fields[name] is None and name not in optional]:
            fail(f"{path} does not say {', '.join(absent)}; expected a complete config.json; fetch it again")
        return ModelConfig(**fields)
    except (ValueError, TypeError, AttributeError) as error:
        fail(f"{path} does not describe a model ({error}); expected a Llama config.json; fetch it again")
