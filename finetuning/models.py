"""Causal language models of `transformers`: from a local folder, or random. Nothing is downloaded."""

import importlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.ranks import fail

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
        SystemExit: (exit code 2) no such folder, no config.json, no safetensors, or sequences too long for the model.
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
        hf_config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a damaged file makes the library raise
        fail(f"model_path = {folder}: config.json cannot be used ({error}); fetch it again")
    longest = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    if longest and sequence_length > longest:
        fail(
            f"data.sequence_length = {sequence_length}, but {folder} takes {longest} tokens; lower it to {longest} or "
            f"less"
        )
    return hf_config


def read_model(folder: str, hf_config: Any) -> nn.Module:
    """Read a causal language model from a local folder, in fp32.

    Raises:
        ValueError: the files lack some of the model's weights.
        Exception: whatever a damaged file makes the library raise.
    """
    model, report = require("transformers").AutoModelForCausalLM.from_pretrained(
        folder, config=hf_config, dtype=torch.float32, local_files_only=True, use_safetensors=True,
        output_loading_info=True,
    )  # fmt: skip
    if absent := sorted(report["missing_keys"]):  # transformers would go on with random values
        raise ValueError(f"{', '.join(absent[:3])} missing ({len(absent)} in all)")
    return model


def random_model(hf_config: Any) -> nn.Module:
    """Make a causal language model in fp32; its weights are drawn from torch's global generator."""
    return require("transformers").AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
