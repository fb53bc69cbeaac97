"""Lightning: you write what a step is; the Trainer owns the loop, the devices and the processes.

    python lightning/train.py --devices 2                                 # a laptop: about a minute, loss < 2.5
    torchrun --nproc-per-node=2 lightning/train.py --config lightning/configs/fsdp.json
    CONFIG_FILE=lightning/configs/ddp.json sbatch --ntasks-per-node=4 --gpus-per-node=4 lightning/single_node.sbatch

The same training as `ddp/train.py`, under each of Lightning's strategies: which one is a setting. The README has a
table of what stands where. Data, loss, optimizer, run folder and checkpoints are those of the other lessons.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import environment  # noqa: F401  (first: it says when lightning is missing)
import torch
from batches import Batches, EvaluationBatches
from launch import Launch, mesh_shape, read_launch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, Strategy
from run_folder import RunFolder
from settings import LightningConfig, arguments_and_file
from sharding import sharded_transformer
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

from common.config import parse
from common.data import text_datasets
from common.data_sharding import BatchPlan, Loader
from common.flops import explain, flops_per_token
from common.loss import count_valid
from common.optimizer import build_optimizer, learning_rate, set_learning_rate
from common.transformer import Transformer


@dataclass(frozen=True)
class Distribution:
    """What the Trainer and the module do under one of Lightning's strategies."""

    build: Callable[[timedelta, int, int], Strategy | str]
    """The Trainer's argument, from the timeout and the numbers of data-parallel and tensor-parallel ranks."""
    axis: str
    """What run.json calls the data-parallel axis."""
    is_sharded: bool = False
    """The module cuts the model itself, with a precision of its own, and says when gradients travel."""
    loss_context: Callable[[], Any] = nullcontext
    """Around the loss, for forward and backward."""


STRATEGIES = {
    "single_device": Distribution(lambda timeout, dp, tp: "auto", "dp_replicate"),
    "ddp": Distribution(
        lambda timeout, dp, tp: DDPStrategy(timeout=timeout, gradient_as_bucket_view=True), "dp_replicate"
    ),
    "deepspeed": Distribution(lambda timeout, dp, tp: DeepSpeedStrategy(stage=2, timeout=timeout), "dp_shard"),
    # FSDP is ModelParallelStrategy too: FSDPStrategy refuses CPUs, and is FSDP 1.
    "fsdp": Distribution(
        lambda timeout, dp, tp: ModelParallelStrategy(dp, tp, timeout=timeout), "dp_shard", is_sharded=True
    ),
    # The softmax is over logits of which each tensor rank has some columns.
    "tensor_parallel": Distribution(
        lambda timeout, dp, tp: ModelParallelStrategy(dp, tp, timeout=timeout), "dp_shard", is_sharded=True,
        loss_context=loss_parallel,
    ),
}  # fmt: skip
PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed", "fp64": "64-true"}


@record  # torchrun then reports the rank that failed first, and why
def main(config: LightningConfig) -> None:
    launch = read_launch(config, config.strategy)
    data_parallel, tensor_parallel = mesh_shape(config, launch)
    distribution, timeout = STRATEGIES[config.strategy], timedelta(seconds=config.timeout_s)
    data = TextData(config, data_parallel)
    length = config.data.sequence_length
    data.run_folder = RunFolder(
        config,
        launch,
        config.strategy,
        explain=lambda device: explain(config.model, length, device, config.train.precision),
        units_per_step=config.batch.global_size * length,
        flops_per_unit=flops_per_token(config.model, length),
        fingerprint=data.train_set.fingerprint(),
        mesh={distribution.axis: data_parallel, "tp": tensor_parallel},
    )

    trainer = Trainer(
        # ---- where
        accelerator=launch.device_type,
        devices=launch.devices,
        num_nodes=launch.nodes,
        strategy=distribution.build(timeout, data_parallel, tensor_parallel),
        **precision(config, launch),
        # ---- how long: one "epoch" of so many optimizer steps
        max_steps=config.train.steps,
        max_epochs=1,
        accumulate_grad_batches=data.plan.accumulation,
        gradient_clip_val=config.optimizer.clip,
        # ---- who decides: our batch plan says which samples are whose, our run folder keeps metrics and checkpoints
        use_distributed_sampler=False,
        callbacks=[data.run_folder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,  # else two batches are evaluated before the first step
    )
    trainer.fit(GPT(config, data_parallel, tensor_parallel), data)
    data.run_folder.ranks.leave()  # a barrier, then the end of the process group, which Lightning leaves open


def precision(config: LightningConfig, launch: Launch) -> dict[str, Any]:
    """The Trainer's arguments for `train.precision`."""
    if STRATEGIES[config.strategy].is_sharded:
        return {"precision": "32-true"}  # it refuses fp64; `sharded_transformer` has its own policy
    if config.train.precision == "fp16" and config.strategy != "deepspeed":
        return {"plugins": [MixedPrecision("16-mixed", launch.device_type)]}  # by name it becomes bf16 on a CPU
    return {"precision": PRECISION[config.train.precision]}


class GPT(LightningModule):
    """What a step is: the model, its loss, its optimizer, its evaluation. Lightning calls the methods in this order."""

    def __init__(self, config: LightningConfig, data_parallel: int, tensor_parallel: int) -> None:
        super().__init__()
        self.config, self.data_parallel, self.tensor_parallel = config, data_parallel, tensor_parallel
        self.distribution = STRATEGIES[config.strategy]
        self.tokens_per_step = config.batch.global_size * config.data.sequence_length
        self.model: Any = None

    def configure_model(self) -> None:
        """Build the model: the group exists by now, and each rank may make its own part and no more."""
        if self.model is not None:
            return  # Lightning may call it again
        if self.distribution.is_sharded:
            device = self.trainer.strategy.root_device  # self.device is still the CPU
            self.model = sharded_transformer(self.config, self.device_mesh, device)
            return
        self.model = Transformer(self.config.model, self.config.seed)  # which Lightning moves, and wraps in DDP
        if self.config.train.activation_checkpointing:
            self.model.checkpoint_activations()
        if self.config.train.compile:
            self.model.compile_blocks()

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW, and a schedule that Lightning moves on after each optimizer step."""
        config = self.config
        optimizer = build_optimizer(self.model.parameters(), config.optimizer, self.device)
        set_learning_rate(optimizer, 1.0)  # LambdaLR multiplies: with 1, the function gives the rate itself
        schedule = LambdaLR(optimizer, lambda step: learning_rate(step, config.train.steps, config.optimizer))
        for group in optimizer.param_groups:
            del group["initial_lr"]  # LambdaLR's note to itself, which no other lesson's checkpoint has
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """The loss of one micro-batch; Lightning divides it by the accumulation, calls `backward`, and steps."""
        accumulation = self.trainer.accumulate_grad_batches
        if batch_idx % accumulation == 0:
            self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        if self.distribution.is_sharded:
            # Until the last micro-batch gradients add up locally. Lightning sees to this for DDP, not for FSDP 2.
            self.model.set_requires_gradient_sync((batch_idx + 1) % accumulation == 0)
        micro_loss_sum = self.loss_of(batch)  # a sum over tokens, not a mean
        self.loss_sum += micro_loss_sum.detach() / self.tensor_parallel  # tensor ranks have the same loss
        # The gradient of the mean over the global batch: DDP and FSDP average over the data-parallel ranks, where the
        # sum is wanted, and Lightning divides by the accumulation.
        return micro_loss_sum * self.data_parallel * accumulation / self.tokens_per_step

    def loss_of(self, batch: list[torch.Tensor]) -> torch.Tensor:
        """Sum of the token losses; tokens, targets: (micro-batch, sequence) int64."""
        with self.distribution.loss_context():
            loss = self.model(*batch)
        return loss.to_local() if isinstance(loss, DTensor) else loss

    def backward(self, loss: torch.Tensor) -> None:
        with self.distribution.loss_context():
            loss.backward()

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: float, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip, and keep the norm before it, which Lightning's own clipping keeps to itself."""
        scaler = RunFolder.scaler(self.trainer)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # Lightning leaves it to fused optimizers, which do it after the clipping
        norm = clip_grad_norm_(self.model.parameters(), gradient_clip_val)
        self.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # of all shards and slices

    # `self.log("val_loss", …, sync_dist=True)` weighs batches by their samples, in fp32, and drops from the count what
    # the ranks do not divide. The loss is one of tokens, and batches that only keep sharded ranks company would count:
    # so sums and counts.
    def on_validation_epoch_start(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, tokens

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.sums += torch.stack([self.loss_of(batch).double(), count_valid(batch[1])])

    def on_validation_epoch_end(self) -> None:
        loss, count = self.trainer.strategy.reduce(self.sums, reduce_op="sum").tolist()
        self.validation = {"val_loss": loss / count}


class TextData(LightningDataModule):
    """Which samples are whose. Lightning asks for the loaders; the batch of step N is a function of the seed and N."""

    def __init__(self, config: LightningConfig, data_parallel: int) -> None:
        super().__init__()
        self.config, self.data_parallel = config, data_parallel
        self.train_set, self.validation_set = text_datasets(config.data, config.model.vocabulary)
        self.plan = BatchPlan(config.batch, len(self.train_set), config.seed, 0, data_parallel)  # for its accumulation
        self.run_folder: RunFolder

    def setup(self, stage: str) -> None:
        """Now the ranks are known: what Lightning would hand to a DistributedSampler is our data-parallel rank."""
        rank = (self.trainer.distributed_sampler_kwargs or {"rank": 0})["rank"]
        self.plan = BatchPlan(self.config.batch, len(self.train_set), self.config.seed, rank, self.data_parallel)
        self.device = self.trainer.strategy.root_device

    def train_dataloader(self) -> Batches:
        loader = Loader(self.train_set, self.plan, self.device, self.config.data.workers)
        return Batches(loader, self.config.train.steps, self.plan.accumulation, self.run_folder)

    def val_dataloader(self) -> EvaluationBatches:
        # A forward of a sharded model communicates: all ranks need equally many batches.
        equal_batches = STRATEGIES[self.config.strategy].is_sharded
        return EvaluationBatches(self.validation_set, self.plan, self.device, equal_batches=equal_batches)


if __name__ == "__main__":
    main(parse(LightningConfig, arguments_and_file()))
