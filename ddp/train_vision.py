"""DDP on images: a ResNet, BatchNorm across ranks, and a learning rate that grows with the batch.

    torchrun --nproc-per-node=2 ddp/train_vision.py             # a laptop: about a minute, accuracy > 0.95
    torchrun --nproc-per-node=2 ddp/train_vision.py --model.name small_cnn         # seconds, accuracy > 0.9
    torchrun --nproc-per-node=8 ddp/train_vision.py --config ddp/configs/resnet50_imagenet.yaml  # 8 GPUs

What `ddp/train.py` does for text, for images. New here: BatchNorm's running statistics, which every rank
gathers from its own images, and which must agree before anybody looks at them; SyncBatchNorm, or GroupNorm,
which needs neither; the linear scaling rule; and an evaluation by counts.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torchvision.models import resnet18, resnet50

from common.config import RunConfig, TrainConfig, parse
from common.data import ImageConfig, image_datasets
from common.data_sharding import BatchConfig, BatchPlan, Loader, evaluation_batches
from common.flops import forward_flops
from common.optimizer import OptimizerConfig, build_optimizer, learning_rate, set_learning_rate
from common.ranks import Ranks, fail, join
from common.run import Run


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
    """The settings of this script."""

    train: VisionTrain = field(default_factory=VisionTrain)
    batch: VisionBatch = field(default_factory=VisionBatch)
    optimizer: VisionOptimizer = field(default_factory=VisionOptimizer)
    data: ImageConfig = field(default_factory=ImageConfig)
    model: VisionModel = field(default_factory=VisionModel)


@record  # torchrun then reports the rank that failed first, and why
def main(config: VisionConfig) -> None:
    ranks = join(config.device, config.timeout_s, config.network_profile)
    on_gpu = ranks.device.type == "cuda"

    # ---- data: the batch of step N is a pure function of the seed and N, random crops and flips included
    train_set, validation_set, classes = image_datasets(config.data)
    plan = BatchPlan(config.batch, len(train_set), config.seed, ranks.rank, ranks.world_size)
    loader = Loader(train_set, plan, ranks.device, config.data.workers)
    images_per_step = config.batch.global_size

    # ---- model: weights are kept in fp32 (fp64 for proofs); autocast computes in the low precision
    example = train_set[0][0].unsqueeze(0)  # (1, channels, height, width)
    model = build_model(config.model, example.shape[1], example.shape[2], classes, config.seed)
    if config.model.norm == "batch" and not config.model.sync_batchnorm and plan.micro_size == 1:
        fail(
            "each rank has 1 image in a micro-batch, and BatchNorm needs more to take a mean of; raise "
            "batch.global_size or batch.micro_size, or use --model.norm group"
        )
    # BatchNorm normalises the micro-batch of its rank: alone of all things here, it makes the training depend,
    # beyond rounding, on how the global batch is cut up.
    if config.model.sync_batchnorm and not on_gpu:
        fail("model.sync_batchnorm = true: torch has it for GPUs only; on the CPU, use --model.norm group")
    if config.model.sync_batchnorm:  # means and variances then come from all ranks, within the forward
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # On GPUs, convolutions are fastest with the channels of a pixel side by side (NHWC) in memory.
    model = model.to(ranks.device, memory_format=torch.channels_last if on_gpu else torch.preserve_format)
    flops = 3 * forward_flops(model, example.to(ranks.device))  # backward costs twice the forward
    if config.train.precision == "fp64":
        model.double()
    if config.train.compile:
        model.compile()
    low_precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.train.precision)
    autocast = torch.autocast(ranks.device.type, dtype=low_precision, enabled=low_precision is not None)

    # ---- DDP averages gradients. Buffers, such as BatchNorm's running statistics, it does not average: it
    # sends those of rank 0 to all, and only when the next forward begins; hence average_statistics below.
    ddp_model = DistributedDataParallel(model, device_ids=ranks.device_ids, gradient_as_bucket_view=True)

    # ---- optimizer. The linear scaling rule (Goyal et al., arXiv 1706.02677): with k times the batch the
    # same images make k times fewer steps, so each is k times as long. It fails in the first steps, when the
    # weights change fast: hence the warm-up.
    settings = config.optimizer
    if settings.lr_batch is not None:
        settings = replace(settings, lr=settings.lr * images_per_step / settings.lr_batch)
    optimizer = build_optimizer(model.parameters(), settings, ranks.device)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.train.precision == "fp16")

    fingerprint = train_set.fingerprint()
    run = Run(config, ranks, "ddp", images_per_step, "images", flops_per_unit=flops, fingerprint=fingerprint)
    run.say(f"{flops / 1e6:.4g} MFLOP per image: three times the forward, as torch counts it")
    run.restore(model, optimizer, scaler)

    # ---- training
    for step in run.steps():  # goes on where the last checkpoint ended
        lr = learning_rate(step, config.train.steps, settings)
        set_learning_rate(optimizer, lr)
        loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
        for (images, labels), is_last in loader.micro_batches(step):
            with nullcontext() if is_last else ddp_model.no_sync():  # the forward too must know
                with autocast:
                    logits = ddp_model(images.double() if config.train.precision == "fp64" else images)
                    micro_loss_sum = F.cross_entropy(
                        logits, labels, reduction="sum", label_smoothing=config.train.label_smoothing
                    )
                # A sum over images, divided by the images of the *global* batch; DDP averages over the ranks
                # where the global batch wants the sum, hence the world size.
                scaler.scale(micro_loss_sum * ranks.world_size / images_per_step).backward()
            loss_sum += micro_loss_sum.detach()
        scaler.unscale_(optimizer)
        grad_norm = clip_grad_norm_(model.parameters(), settings.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        average_statistics(model, ranks)
        run.log(step, loss_sum, grad_norm, lr)  # read one step late: the loop never waits for the device

        if run.wants_evaluation(step):
            with autocast:
                loss, accuracy = evaluate(model, validation_set, plan.micro_size, ranks, config.data.workers)
            run.log_validation(step, loss, accuracy=accuracy)
        run.save_if_due(step, model, optimizer, scaler)
    run.finish()
    ranks.leave()  # a barrier, then the end of the process group


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

    Training never reads them, so each rank may gather its own during a step. Evaluation, checkpoints and the
    replica check do read them, and must find the same on all ranks. The mean has seen the images of all
    ranks, where DDP's own broadcast keeps only what rank 0 saw.
    """
    statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]  # counters agree anyway
    if not statistics:
        return
    flat = torch.cat([buffer.flatten() for buffer in statistics])  # one all-reduce for all layers
    dist.all_reduce(flat)
    flat /= ranks.world_size
    for buffer, mean in zip(statistics, flat.split([b.numel() for b in statistics]), strict=True):
        buffer.copy_(mean.view_as(buffer))


@torch.no_grad()
def evaluate(model: nn.Module, dataset, batch_size: int, ranks: Ranks, workers: int = 0) -> tuple[float, float]:
    """Mean loss (without label smoothing) and top-1 accuracy: sums over all ranks, then divided.

    In eval mode the logits of an image depend on that image alone, and every image is on exactly one rank: so
    the accuracy does not depend on the number of ranks, and the loss only in its last bits.
    """
    dtype = next(model.parameters()).dtype
    sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)  # loss, right answers, images
    model.eval()
    mine = evaluation_batches(dataset, batch_size, ranks.device, ranks.rank, ranks.world_size, workers)
    for images, labels in mine:
        logits = model(images.to(dtype))
        loss_sum = F.cross_entropy(logits, labels, reduction="sum")
        right = (logits.argmax(dim=1) == labels).sum()
        sums += torch.stack([loss_sum.double(), right.double(), torch.ones_like(labels).sum().double()])
    model.train()
    dist.all_reduce(sums)  # ranks may have had different numbers of images: sums, never a mean of means
    loss, right_answers, count = sums.tolist()
    return loss / count, right_answers / count


if __name__ == "__main__":
    main(parse(VisionConfig))
