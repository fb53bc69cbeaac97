"""Fine-tuning: its settings, a `transformers` model with or without LoRA, and what of it is saved and exported."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from settings import FsdpConfig
from torch import nn

from common.config import RunConfig, TrainConfig
from common.data_sharding import derive_seed
from common.question_answering import Question, QuestionsConfig, require, score
from common.ranks import fail
from common.replica_check import bit_sums


@dataclass
class FinetuneTrain(TrainConfig):
    """How long to train, in which arithmetic, and what to look at on the way."""

    steps: int = 300
    """Optimizer steps of the whole training, whatever the world size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile:
            raise ValueError(
                "train.compile = true is not for this script: each prompt has another length; leave it out"
            )


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
class FinetuneConfig(RunConfig):
    """The settings of this script."""

    train: FinetuneTrain = field(default_factory=FinetuneTrain)
    data: QuestionsConfig = field(default_factory=QuestionsConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    model_path: str | None = None
    """A local folder in the Hugging Face format, with safetensors; by default a tiny Llama with random weights."""
    export: bool = True
    """Write the model, or its adapters, to exported/ in the run folder when all steps are done."""


def build_model(config: FinetuneConfig, shape: Any, read: bool) -> nn.Module:
    """The causal language model, with adapters if asked for; its weights read or drawn, if `read`.

    Under `torch.device("meta")`, with `read` false, it has shapes and no memory.

    Raises:
        SystemExit: (exit code 2) a target layer that the model does not have.
        ValueError: the files do not hold the weights of this model.
    """
    transformers = require("transformers")
    torch.manual_seed(config.seed)  # for random weights and adapters
    if read and config.model_path:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            config.model_path, config=shape, dtype=torch.float32, local_files_only=True, use_safetensors=True,
            output_loading_info=True,
        )  # fmt: skip
        if absent := sorted(report["missing_keys"]):  # transformers would go on with random values
            raise ValueError(f"{', '.join(absent[:3])} missing ({len(absent)} in all)")
    else:
        model = transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
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


def adapter_config(config: FinetuneConfig) -> Any:
    """What peft is told."""
    return require("peft").LoraConfig(
        r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=config.lora.targets, task_type="CAUSAL_LM",
        base_model_name_or_path=config.model_path and os.path.abspath(config.model_path),
    )  # fmt: skip


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, whatever the architecture calls them: the list of modules that holds the most."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        fail(f"{type(model).__name__} has no list of blocks to shard; choose a model made of equal layers")
    return list(max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters())))


class Trained(nn.Module):
    """The trained parameters of a model alone, under their names: what a checkpoint holds.

    With LoRA the frozen weights are read from their folder again; so that they are the same ones, `base` keeps a
    number made from all their bits (a scalar int64), to be compared by `check_base`.
    """

    base: torch.Tensor

    def __init__(self, model: nn.Module, base: int) -> None:
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
        self._base = base
        device = next(model.parameters()).device
        self.register_buffer("base", torch.tensor(base, device=device))

    def check_base(self) -> None:
        """After a checkpoint was loaded. SystemExit: (exit code 2) its adapters belong to other frozen weights."""
        if int(self.base) != self._base:
            fail(
                "the checkpoint's adapters were trained beside other frozen weights, or with another lora.alpha; give "
                "the model_path and the settings of that run, or choose another run_name"
            )


def base_number(model: nn.Module, config: FinetuneConfig) -> int:
    """A number that changes with the bits of the frozen weights, or the scale of the adapters; 0 if all are trained."""
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


def export(weights: dict[str, torch.Tensor], tokenizer: Any, config: FinetuneConfig, shape: Any, folder: Path) -> None:
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
            model = build_model(config, shape, read=False)
        model.load_state_dict(weights, assign=True)
        model.tie_weights()
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def score_by_answer(answers: list[str], questions: list[Question], most: int = 5) -> list[tuple[str, int, int]]:
    """Of the `most` frequent right answers, and all others: which, how often it was given, how often right."""
    golds = [repr(question.answers[0]) if question.answers else "no answer" for question in questions]
    frequent = [gold for gold, _ in Counter(golds).most_common(most)]
    rows = {name: [0, 0] for name in (*frequent, "another")}
    for answer, question, gold in zip(answers, questions, golds, strict=True):
        row = rows[gold if gold in frequent else "another"]
        row[0] += int(score([answer], [question])[0] == 100)
        row[1] += 1
    return [(name, given, total) for name, (given, total) in rows.items() if total]
