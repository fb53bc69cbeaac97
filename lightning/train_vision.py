"""Images under Lightning's Trainer: the training of `ddp/train_vision.py`, with a loop that somebody else wrote.

    python lightning/train_vision.py --devices 2       # Lightning starts the second process; accuracy > 0.95
    torchrun --nproc-per-node=2 lightning/train_vision.py --model.name small_cnn         # seconds, accuracy > 0.9
    torchrun --nproc-per-node=8 lightning/train_vision.py --config ddp/configs/resnet50_imagenet.yaml --train.steps 200

The settings are those of `ddp/train_vision.py`, whose config files fit; networks and batches are the same to the bit.
What was one loop there is cut up here into what the Trainer calls: a data module says where batches come from, a
module what to do with one, a callback what to note down. Each part says which of Lightning's habits it has to mind.
"""

import warnings
from dataclasses import dataclass, replace
from datetime import timedelta

import environment  # noqa: F401  (first: it says when lightning is missing)
import torch
import torch.nn.functional as F
from batches import Batches, EvaluationBatches
from launch import read_launch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from run_folder import RunFolder
from settings import arguments_and_file, check_devices
from torch import nn
from torch.distributed.elastic.multiprocessing import errors as elastic
from torch.nn.utils import clip_grad_norm_

from common.config import parse
from common.data_sharding import BatchPlan, Loader
from common.flops import forward_flops
from common.optimizer import build_optimizer, learning_rate, set_learning_rate
from common.ranks import fail
from vision.images import ImageDataset, image_datasets
from vision.networks import VisionConfig, average_statistics, build_model

warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # by a torch that is newer than Lightning

PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp64": "64-true"}


@dataclass
class LightningVisionConfig(VisionConfig):
    """The settings of `ddp/train_vision.py`, and one for Lightning's own launcher."""

    devices: int | None = None
    """Processes on each node. Default: as many as torchrun or srun started; else one per GPU, or one on the CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_devices(self.devices)


@elastic.record  # torchrun then reports the rank that failed first, and why
def main(config: LightningVisionConfig) -> None:
    if config.train.precision == "fp16":
        fail("train.precision = fp16 is not built in here; use bf16 (lightning/train.py has fp16, and its unscaling)")
    launch = read_launch(config, "ddp")
    on_gpu = launch.device_type == "cuda"

    # ---- data: the batch of step N is a pure function of the seed and N, random crops and flips included
    train_set, validation_set, classes = image_datasets(config.data)
    plan = BatchPlan(config.batch, len(train_set), config.seed, 0, launch.world_size)

    # ---- model: built before the Trainer, which would draw the weights of a "64-true" training in fp64
    example = train_set[0][0].unsqueeze(0)  # (1, channels, height, width)
    model = build_model(config.model, example.shape[1], example.shape[2], classes, config.seed)
    if config.model.norm == "batch" and not config.model.sync_batchnorm and plan.micro_size == 1:
        fail(
            "each rank has 1 image in a micro-batch, and BatchNorm needs more to take a mean of; raise "
            "batch.global_size or batch.micro_size, or use --model.norm group"
        )
    if config.model.sync_batchnorm and not on_gpu:
        fail("model.sync_batchnorm = true: torch has it for GPUs only; on the CPU, use --model.norm group")
    flops = 3 * forward_flops(model, example)  # backward costs twice the forward
    if on_gpu:  # where convolutions are fastest with the channels of a pixel side by side (NHWC) in memory
        model = model.to(memory_format=torch.channels_last)
    if config.train.compile:
        model.compile()

    # ---- the lesson: what the Trainer is told, and from then on it does. Its own sampler, logger, progress bar and
    # checkpoints (pickles that fit no other script) stay off: here they are those of every other script.
    record = VisionRun(
        config,
        launch,
        "ddp",
        explain=lambda _: f"{flops / 1e6:.4g} MFLOP per image: three times the forward, as torch counts it",
        units_per_step=config.batch.global_size,
        unit="images",
        flops_per_unit=flops,
        fingerprint=train_set.fingerprint(),
    )
    data = VisionData(config, plan, train_set, validation_set, record)
    trainer = Trainer(
        accelerator=launch.device_type,
        devices=launch.devices,
        num_nodes=launch.nodes,
        # DDP would send rank 0's statistics around when validation begins (and a rank that has no image to validate
        # would not be there to take them); average_statistics has made them agree already.
        strategy=DDPStrategy(
            timeout=timedelta(seconds=config.timeout_s), gradient_as_bucket_view=True, broadcast_buffers=False
        ),
        precision=PRECISION[config.train.precision],
        sync_batchnorm=config.model.sync_batchnorm,
        accumulate_grad_batches=plan.accumulation,
        max_epochs=1,  # all steps; the callback says which is next
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[record],
    )
    trainer.fit(VisionModule(config, model), data)
    record.ranks.leave()  # a barrier, then the end of the process group


class VisionData(LightningDataModule):
    """Where batches come from.

    Args:
        config: the settings.
        plan: that of rank 0.
        train_set, validation_set: from `image_datasets`.
        record: knows which step is next.
    """

    def __init__(
        self,
        config: VisionConfig,
        plan: BatchPlan,
        train_set: ImageDataset,
        validation_set: ImageDataset,
        record: "VisionRun",
    ) -> None:
        super().__init__()
        self.config, self.plan, self.record = config, plan, record
        self.train_set, self.validation_set = train_set, validation_set

    def setup(self, stage: str) -> None:
        """On every rank, as soon as it knows its number: take its part of the plan."""
        self.plan = replace(self.plan, dp_rank=self.trainer.global_rank)
        self.device = self.trainer.strategy.root_device
        self.loader = Loader(self.train_set, self.plan, self.device, self.config.data.workers)

    def train_dataloader(self) -> Batches:
        return Batches(self.loader, self.config.train.steps, self.plan.accumulation, self.record)

    def val_dataloader(self) -> EvaluationBatches:
        return EvaluationBatches(self.validation_set, self.plan, self.device, self.config.data.workers)


class VisionModule(LightningModule):
    """What to do with a batch. The network stays a plain one, in `model`: so checkpoints fit `ddp/train_vision.py`."""

    def __init__(self, config: VisionConfig, model: nn.Module) -> None:
        super().__init__()
        self.config, self.model = config, model
        self.grad_norm = torch.zeros(())
        # The linear scaling rule (Goyal et al., arXiv 1706.02677): with k times the batch the same images make k times
        # fewer steps, so each is k times as long. It fails in the first steps: hence the warm-up.
        self.settings = config.optimizer
        if self.settings.lr_batch is not None:
            scaled = self.settings.lr * config.batch.global_size / self.settings.lr_batch
            self.settings = replace(self.settings, lr=scaled)

    def training_step(self, batch, batch_index: int) -> torch.Tensor:
        """The loss of one micro-batch. The Trainer does autocast, backward, no_sync and zero_grad around it."""
        images, labels = batch
        if batch_index % self.trainer.accumulate_grad_batches == 0:
            self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        smoothing = self.config.train.label_smoothing
        loss_sum = F.cross_entropy(self.model(images), labels, reduction="sum", label_smoothing=smoothing)
        self.loss_sum += loss_sum.detach()
        # A sum over images, divided by the images of the *global* batch. DDP averages over the ranks where the global
        # batch wants the sum, hence the world size; the Trainer divides by the micro-batches, hence the accumulation.
        scale = self.trainer.world_size * self.trainer.accumulate_grad_batches / self.config.batch.global_size
        return loss_sum * scale

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Plain torch. The learning rate is a function of the step: the callback sets it, and there is no scheduler's
        # state to save.
        return build_optimizer(self.model.parameters(), self.settings, self.device)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        # Trainer(gradient_clip_val=…) clips as well, but keeps the norm to itself.
        self.grad_norm = clip_grad_norm_(self.model.parameters(), self.settings.clip)

    def on_validation_epoch_start(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, right answers, images

    def validation_step(self, batch, batch_index: int) -> None:
        """Add up. `self.log(…, sync_dist=True)` would divide by too few images where the ranks do not divide them."""
        images, labels = batch
        logits = self.model(images)
        loss_sum = F.cross_entropy(logits, labels, reduction="sum")
        right = (logits.argmax(dim=1) == labels).sum()
        self.sums += torch.stack([loss_sum.double(), right.double(), torch.ones_like(labels).sum().double()])

    def on_validation_epoch_end(self) -> None:
        """Sums over all ranks, then divided: ranks may have had different numbers of images."""
        loss, right, count = self.trainer.strategy.reduce(self.sums, reduce_op="sum").tolist()
        self.validation = {"val_loss": loss / count, "accuracy": right / count}


class VisionRun(RunFolder):
    """The run folder, and what a training of images has to do before each optimizer step."""

    def on_before_optimizer_step(self, trainer: Trainer, module: VisionModule, optimizer) -> None:
        """After backward, before clipping and the update: set the rate, and make BatchNorm's statistics agree."""
        self.lr = learning_rate(self.step, self.config.train.steps, module.settings)
        set_learning_rate(optimizer, self.lr)
        average_statistics(module.model, self.ranks)


if __name__ == "__main__":
    main(parse(LightningVisionConfig, arguments_and_file()))
