"""The networks for images, the settings of the scripts that train them, and BatchNorm's statistics across ranks."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torchvision.models import resnet18, resnet50

from common.config import RunConfig, TrainConfig
from common.data_sharding import BatchConfig
from common.optimizer import OptimizerConfig
from common.ranks import Ranks
from vision.images import ImageConfig


@dataclass
class VisionTrain(TrainConfig):
    """How long to train, in which arithmetic, and what to look at on the way."""

    steps: int = 120
    """Optimizer steps of the whole training, whatever the world size."""
    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over all classes (arXiv 1512.00567, section 7)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 1:
            found = f"train.label_smoothing = {self.label_smoothing}"
            raise ValueError(f"{found} must lie between 0 and 1 (1 excluded)")
        if self.activation_checkpointing:
            raise ValueError(
                "train.activation_checkpointing = true is not for this script: computing a block again would "
                "count the batch twice in BatchNorm's statistics; lower batch.micro_size to save memory"
            )


@dataclass
class VisionBatch(BatchConfig):
    """The batch of one optimizer step, and how much of it goes through the model at a time."""

    global_size: int = 48
    """Images per optimizer step over all ranks; must divide evenly among the data-parallel ranks."""


@dataclass
class VisionModel:
    """Which network, and how it normalises."""

    name: Literal["resnet18", "resnet50", "small_cnn"] = "resnet18"
    """A ResNet of torchvision (with a stem for small images up to 64 pixels), or three convolutions."""
    norm: Literal["batch", "group"] = "batch"
    """batch: BatchNorm, over the micro-batch of each rank; group: GroupNorm, over each image by itself."""
    sync_batchnorm: bool = False
    """BatchNorm over the micro-batches of all ranks together; only on GPUs."""

    def __post_init__(self) -> None:
        if self.sync_batchnorm and self.norm != "batch":
            raise ValueError(f"model.sync_batchnorm = true needs model.norm = batch, found {self.norm}")


@dataclass
class VisionOptimizer(OptimizerConfig):
    """SGD as in most vision recipes; its learning rate is given for one batch size and scaled to yours."""

    name: Literal["adamw", "sgd"] = "sgd"
    """adamw, or sgd with momentum betas[0]."""
    lr: float = 0.2
    """Peak learning rate for a batch of lr_batch images."""
    lr_batch: int | None = 256
    """The peak is lr × batch.global_size / lr_batch; null: it is lr, whatever the batch."""
    weight_decay: float = 5e-4
    """Applied to convolutions and matrices only; norms and biases are left alone."""
    clip: float = math.inf
    """Largest global gradient norm; .inf never clips."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr_batch is not None and self.lr_batch < 1:
            raise ValueError(f"optimizer.lr_batch = {self.lr_batch} must be at least 1, or null")


@dataclass
class VisionConfig(RunConfig):
    """The settings of a script that trains on images."""

    train: VisionTrain = field(default_factory=VisionTrain)
    batch: VisionBatch = field(default_factory=VisionBatch)
    optimizer: VisionOptimizer = field(default_factory=VisionOptimizer)
    data: ImageConfig = field(default_factory=ImageConfig)
    model: VisionModel = field(default_factory=VisionModel)


def build_model(config: VisionModel, channels: int, image_size: int, classes: int, seed: int) -> nn.Module:
    """Build the network for images (batch, channels, image_size, image_size); equal weights on all ranks.

    As in Goyal et al., section 5.1, each residual block starts as the identity (its last norm has weight 0),
    and the classifier is drawn with standard deviation 0.01. GroupNorm has 32 groups, as in arXiv 1803.08494.
    """
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d if config.norm == "batch" else partial(nn.GroupNorm, 32)
    if config.name == "small_cnn":
        layers: list[nn.Module] = []
        for before, width, stride in ((channels, 32, 1), (32, 64, 2), (64, 128, 2)):
            layers += [nn.Conv2d(before, width, 3, stride, padding=1, bias=False), norm(width), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes))

    build = {"resnet18": resnet18, "resnet50": resnet50}[config.name]
    model = build(num_classes=classes, norm_layer=norm, zero_init_residual=True)
    if image_size <= 64:  # ImageNet's stem would shrink them fourfold before the first block
        model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    elif channels != 3:
        model.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    nn.init.normal_(model.fc.weight, std=0.01)
    nn.init.zeros_(model.fc.bias)
    return model


@torch.no_grad()
def average_statistics(model: nn.Module, ranks: Ranks) -> None:
    """Give all ranks the mean of their BatchNorm running statistics; nothing to do for a model without any.

    Training never reads the statistics, so each rank may gather its own during a step. Evaluation, checkpoints and
    the replica check do read them, and must find the same on all ranks. The mean has seen the images of all ranks;
    DDP's own broadcast keeps only what rank 0 saw.
    """
    statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]  # counters agree anyway
    if not statistics:
        return
    flat = torch.cat([buffer.flatten() for buffer in statistics])  # one all-reduce for all layers
    dist.all_reduce(flat)
    flat /= ranks.world_size
    for buffer, mean in zip(statistics, flat.split([b.numel() for b in statistics]), strict=True):
        buffer.copy_(mean.view_as(buffer))
