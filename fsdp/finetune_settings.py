"""Fine-tuning: its settings, a `transformers` model with or without LoRA, and what of it is saved and exported."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from settings import FsdpConfig
from torch import nn

from common.data_sharding import derive_seed
from common.ranks import fail
from common.replica_check import bit_sums
from finetuning.config import FinetuneConfig
from finetuning.models import random_model, read_model, require


@dataclass
class LoraConfig:
    """Low-rank adapters beside frozen weights (arXiv 2106.09685)."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights instead."""
    alpha: float = 16.0
    """An adapter's output is scaled by alpha / rank."""
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    """Last parts of the names of the layers that get one."""

    def __post_init__(self) -> None:
        if self.rank < 0 or self.alpha <= 0 or not self.targets:
            raise ValueError(
                f"lora.rank = {self.rank} must be 0 (all weights) or more, lora.alpha = {self.alpha} above 0, and "
                f"lora.targets = {self.targets} name at least one layer"
            )


@dataclass
class ShardedFinetuneConfig(FinetuneConfig):
    """The settings of this script."""

    lora: LoraConfig = field(default_factory=LoraConfig)
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)


def build_model(config: ShardedFinetuneConfig, hf_config: Any, read: bool) -> nn.Module:
    """Make the causal language model, with adapters if `lora.rank` is above 0.

    Under `torch.device("meta")`, with `read` false, it has shapes and no memory.

    Args:
        read: read the weights from `model_path`, if there is one; otherwise they are random.

    Raises:
        SystemExit: (exit code 2) a target layer that the model does not have.
        ValueError: the files do not hold the weights of this model.
    """
    torch.manual_seed(config.seed)  # for random weights and adapters
    model = read_model(config.model_path, hf_config) if read and config.model_path else random_model(hf_config)
    if config.lora.rank:
        peft, options = require("peft"), config.lora
        layers = {name.split(".")[-2] for name, _ in model.named_parameters() if name.endswith(".weight")}
        if unknown := [target for target in options.targets if target not in layers]:
            fail(f"lora.targets: no layer is called {', '.join(unknown)}; this model has {', '.join(sorted(layers))}")
        try:
            peft.inject_adapter_in_model(adapter_config(config), model)  # freezes all else
        except ValueError as error:
            fail(f"lora.targets = {options.targets}: {error}; choose linear layers")
    return model.double() if config.train.precision == "fp64" else model


def adapter_config(config: ShardedFinetuneConfig) -> Any:
    """Return what peft needs to know of the adapters."""
    return require("peft").LoraConfig(
        r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=config.lora.targets, task_type="CAUSAL_LM",
        base_model_name_or_path=config.model_path and os.path.abspath(config.model_path),
    )  # fmt: skip


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks, whatever the architecture calls them: the list with the most parameters."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        fail(f"{type(model).__name__} has no list of blocks to shard; choose a model made of equal layers")
    return list(max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters())))


class TrainableState(nn.Module):
    """The trained parameters of a model, without the frozen ones, under their names: what a checkpoint holds.

    With LoRA a resumed run reads the frozen weights from their folder again. The checkpoint holds a digest of them (a
    scalar int64), so that `check_frozen_weights` can see whether they are still the same.
    """

    digest: torch.Tensor

    def __init__(self, model: nn.Module, digest: int) -> None:
        super().__init__()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                module: nn.Module = self
                *path, leaf = name.split(".")
                for part in path:
                    if part not in module._modules:
                        module.add_module(part, nn.Module())
                    module = module.get_submodule(part)
                module.register_parameter(leaf, parameter)
        self._expected_digest = digest
        device = next(model.parameters()).device
        self.register_buffer("digest", torch.tensor(digest, device=device))

    def check_frozen_weights(self) -> None:
        """Check a loaded checkpoint. SystemExit: (exit code 2) its adapters belong to other frozen weights."""
        if int(self.digest) != self._expected_digest:
            fail(
                "the checkpoint's adapters were trained beside other frozen weights, or with another lora.alpha; give "
                "the model_path and the settings of that run, or choose another run_name"
            )


def frozen_weights_digest(model: nn.Module, config: ShardedFinetuneConfig) -> int:
    """Return a number that changes with any bit of the frozen weights and with lora.alpha; 0 if none are frozen."""
    if not config.lora.rank:
        return 0
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    sums = dict(zip(*(list(part) for part in bit_sums(model)), strict=True))
    return derive_seed(config.lora.alpha, *((name, int(sums[name])) for name in sorted(frozen)))


def describe_trained(model: nn.Module) -> str:
    """One line: how many parameters are trained, and the bytes of their gradients and AdamW's averages on this rank."""
    parameters = list(model.parameters())
    total, trained = (sum(p.numel() for p in part) for part in (parameters, [p for p in parameters if p.requires_grad]))
    mine = sum(p.to_local().nbytes for p in parameters if p.requires_grad)
    return (
        f"training {trained:,} of {total:,} parameters ({trained / total:.2%}): gradients {mine:,} bytes, AdamW's "
        f"averages {2 * mine:,} bytes on this rank"
    )


def export(
    weights: dict[str, torch.Tensor], tokenizer: Any, config: ShardedFinetuneConfig, hf_config: Any, folder: Path
) -> None:
    """Write whole weights as `PeftModel.from_pretrained` (LoRA) or `AutoModelForCausalLM.from_pretrained` reads them.

    weights: all tensors (LoRA: all adapters) by their names in the model, on the CPU.
    """
    if config.lora.rank:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        named = {f"base_model.model.{name.replace('.default.', '.')}": tensor for name, tensor in weights.items()}
        save_file({name: t.contiguous() for name, t in named.items()}, folder / "adapter_model.safetensors")
        adapter_config(config).save_pretrained(folder)
    else:
        with torch.device("meta"):
            model = build_model(config, hf_config, read=False)
        model.load_state_dict(weights, assign=True)
        model.tie_weights()
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
