"""The optimizer and the learning rate: plain torch, the same in every script."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.distributed.tensor import DTensor


@dataclass
class OptimizerConfig:
    """AdamW or SGD, with linear warm-up, then a cosine or steps down."""

    name: Literal["adamw", "sgd"] = "adamw"
    """adamw, or sgd with momentum betas[0]."""
    lr: float = 3e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's first and second moments."""
    weight_decay: float = 0.1
    """Applied to matrices only; norms and biases are left alone."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises linearly to its peak."""
    min_lr_ratio: float = 0.1
    """The learning rate at the end of the cosine, as a fraction of the peak."""
    milestones: list[int] = field(default_factory=list)
    """Steps at which the learning rate falls to a tenth of what it was; given any, there is no cosine."""
    nesterov: bool = False
    """Nesterov's momentum, for sgd."""
    clip: float = 1.0
    """Largest global gradient norm."""

    def __post_init__(self) -> None:
        if not (self.lr > 0 and self.clip > 0):  # nor nan, which is neither
            found = f"optimizer.lr = {self.lr} and optimizer.clip = {self.clip}"
            raise ValueError(f"{found} must both be above 0")
        if not (0 <= self.betas[0] < 1 and 0 <= self.betas[1] < 1):
            raise ValueError(f"optimizer.betas = {self.betas} must lie between 0 and 1 (1 excluded)")
        if self.warmup_steps < 0 or not self.weight_decay >= 0 or not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(
                f"optimizer.warmup_steps = {self.warmup_steps} and optimizer.weight_decay = "
                f"{self.weight_decay} must be 0 or more, and optimizer.min_lr_ratio = {self.min_lr_ratio} "
                f"between 0 and 1"
            )
        if self.milestones != sorted(set(self.milestones)) or min(self.milestones, default=1) < 1:
            found = f"optimizer.milestones = {self.milestones}"
            raise ValueError(f"{found} must be steps from 1 on, in rising order")
        if self.nesterov and (self.name != "sgd" or self.betas[0] == 0):
            raise ValueError("optimizer.nesterov = true needs optimizer.name = sgd and optimizer.betas[0] above 0")


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], config: OptimizerConfig, device: torch.device
) -> torch.optim.Optimizer:
    """Build the optimizer; vectors (norms, biases) get no weight decay, as in the GPT-3 and Llama recipes.

    Where the device has a fused kernel (CUDA and CPU), one kernel updates all parameters.
    """
    trainable = [p for p in parameters if p.requires_grad]
    # In ZeRO's stage 3 a parameter is an empty vector between its uses; DeepSpeed notes its shape beside it.
    matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) >= 2]
    vectors = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = device.type in ("cuda", "cpu")
    if config.name == "sgd":
        momentum, nesterov = config.betas[0], config.nesterov
        fused = fused and not any(isinstance(p, DTensor) for p in trainable)  # torch 2.15 has none for shards
        return torch.optim.SGD(groups, lr=config.lr, momentum=momentum, nesterov=nesterov, fused=fused)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The learning rate of step 0 … steps − 1: linear warm-up, then half a cosine to `min_lr_ratio` of it.

    With `milestones`, the rate falls to a tenth at each of them instead. A pure function of the step, so that
    there is no scheduler state to save (cosine: arXiv 1608.03983; steps: arXiv 1512.03385, section 3.4).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.milestones:
        return config.lr * 0.1 ** sum(step >= milestone for milestone in config.milestones)
    progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give all parameter groups one learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value
