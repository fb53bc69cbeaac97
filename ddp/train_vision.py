"""DDP on images: a ResNet, BatchNorm across ranks, and a learning rate that grows with the batch.

    torchrun --nproc-per-node=2 ddp/train_vision.py             # a laptop: about a minute, accuracy > 0.95
    torchrun --nproc-per-node=2 ddp/train_vision.py --model.name small_cnn         # seconds, accuracy > 0.9
    torchrun --nproc-per-node=8 ddp/train_vision.py --config ddp/configs/resnet50_imagenet.yaml --train.steps 200

What `ddp/train.py` does for text, for images. New here: BatchNorm's running statistics, which every rank
gathers from its own images, and which must agree before anybody looks at them; SyncBatchNorm, or GroupNorm,
which needs neither; the linear scaling rule; and an evaluation by counts.
"""

from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from common.config import parse
from common.data_sharding import BatchPlan, Loader, evaluation_batches
from common.flops import forward_flops
from common.optimizer import build_optimizer, learning_rate, set_learning_rate
from common.ranks import Ranks, fail, join
from common.run import Run
from vision.images import image_datasets
from vision.networks import VisionConfig, average_statistics, build_model


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
    run = Run(config, ranks, "ddp", units_per_step=images_per_step, unit="images", flops_per_unit=flops,
              fingerprint=fingerprint)  # fmt: skip
    ranks.print(f"{flops / 1e6:.4g} MFLOP per image: three times the forward, as torch counts it")
    run.restore(model, optimizer, scaler)

    def validate() -> dict[str, float]:
        with autocast:
            loss, accuracy = evaluate(model, validation_set, plan.micro_size, ranks, config.data.workers)
        return {"val_loss": loss, "accuracy": accuracy}

    # ---- training
    for step in run.steps(validate):  # goes on where the last checkpoint ended
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
        run.end_step(step, model, optimizer, scaler)  # saves; after that, `steps` evaluates
    run.finish()
    ranks.leave()  # a barrier, then the end of the process group


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
