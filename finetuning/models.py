"""Causal language models of `transformers`: from a local folder, or random. Nothing is downloaded."""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.ranks import fail
from common.strict_files import read_json

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def require(package: str) -> Any:
    """Import a package that only some lessons need, and keep libraries of Hugging Face from downloading anything.

    Raises:
        SystemExit: (exit code 2) the package is not installed.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        return importlib.import_module(package)
    except ImportError as error:
        fail(f"this script needs the package {package} ({error}); install it: pip install -r requirements.txt")


def load_hf_config(folder: str | None, sequence_length: int) -> Any:
    """Return the `transformers` config of a local model's folder; without a folder, that of a tiny Llama over bytes.

    Raises:
        SystemExit: (exit code 2) no such folder, no config.json, no safetensors, a model that is no causal one, that
            needs code of its own or that cannot be built here, or sequences too long for the model.
    """
    transformers = require("transformers")
    transformers.utils.logging.disable_progress_bar()
    if folder is None:
        return transformers.LlamaConfig(
            vocab_size=257, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, eos_token_id=256,
            bos_token_id=None, pad_token_id=None,
        )  # fmt: skip
    if not Path(folder, "config.json").is_file():
        fail(f"model_path = {folder}: no config.json there; expected a model's folder in the Hugging Face format")
    if not any(Path(folder, name).is_file() for name in WEIGHT_FILES):
        fail(f"model_path = {folder}: neither {' nor '.join(WEIGHT_FILES)} there; other kinds of weights may run code")
    try:
        # Not read_json: the config of a Mamba has Infinity.
        written, index = json.loads(Path(folder, "config.json").read_bytes()), Path(folder, WEIGHT_FILES[1])
        places = set(read_json(index)["weight_map"].values()) if index.is_file() else set()
        if outside := sorted(place for place in places if Path(place).name != place):
            fail(f"{index} names {outside[0]}; expected files of the same folder; fetch it again")
        if "auto_map" in written and written.get("model_type") not in transformers.CONFIG_MAPPING:
            fail(f"model_path = {folder}: config.json asks for code of its own (auto_map), which is never run here; "
                 f"choose a model that transformers has")  # fmt: skip
        hf_config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a damaged file makes the library raise
        fail(f"model_path = {folder}: config.json cannot be used ({brief(error)}); fetch it again")
    if other := _other_than_causal(hf_config):
        fail(f"model_path = {folder}: {other}; expected a causal language model, which sees no later token")
    try:
        with torch.device("meta"):  # shapes alone
            random_model(hf_config)
    except Exception as error:
        attention = getattr(hf_config, "_attn_implementation", None)
        advice = f"; or set attn_implementation in config.json, {attention} now, to sdpa" if attention else ""
        fail(f"model_path = {folder}: this model cannot be built here ({brief(error)}); choose another{advice}")
    longest = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    if longest and sequence_length > longest:
        fail(
            f"data.sequence_length = {sequence_length}, but {folder} takes {longest} tokens; lower it to {longest} or "
            f"less"
        )
    return hf_config


def _other_than_causal(hf_config: Any) -> str | None:
    """Return what a config is of, if its model is no causal language model: its loss would see the answer."""
    auto = require("transformers").models.auto.modeling_auto
    names = {name for value in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
             for name in (value if isinstance(value, tuple) else [value])}  # fmt: skip
    kind, architectures = hf_config.model_type, getattr(hf_config, "architectures", None) or []
    if getattr(hf_config, "is_encoder_decoder", False):
        return f"{kind} is an encoder with a decoder"
    if kind not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (architectures and not names & set(architectures)):
        return f"config.json is of {', '.join(architectures) or kind}"
    # These families look at both sides, unless told not to.
    both = kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES or kind == "xlnet"
    return (
        f"{kind} looks at later tokens (no is_decoder)"
        if both and not getattr(hf_config, "is_decoder", False)
        else None
    )


def brief(error: Exception) -> str:
    """Return what a library says, in one line, shortened."""
    return f"{' '.join(str(error).split()) or type(error).__name__:.200}"


def read_model(folder: str, hf_config: Any) -> nn.Module:
    """Read a causal language model from a local folder, in fp32.

    Raises:
        ValueError: the files lack some of the model's weights.
        Exception: whatever a damaged file makes the library raise.
    """
    model, report = require("transformers").AutoModelForCausalLM.from_pretrained(
        folder, config=hf_config, dtype=torch.float32, local_files_only=True, use_safetensors=True,
        trust_remote_code=False, output_loading_info=True,
    )  # fmt: skip
    if absent := sorted(report["missing_keys"]):  # transformers would go on with random values
        raise ValueError(f"{', '.join(absent[:3])} missing ({len(absent)} in all)")
    return model


def random_model(hf_config: Any) -> nn.Module:
    """Make a causal language model in fp32; its weights are drawn from torch's global generator."""
    return require("transformers").AutoModelForCausalLM.from_config(
        hf_config, dtype=torch.float32, trust_remote_code=False
    )
