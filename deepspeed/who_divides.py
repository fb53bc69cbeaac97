"""Who divides the loss by what? One weight, a loss of 1 · weight in every micro-batch, and the gradient at the step.

    torchrun --nproc-per-node=2 deepspeed/who_divides.py

Over all ranks and micro-batches these gradients add up to ranks × micro-batches. What a framework leaves of it at the
optimizer's step tells what it divided by. Whoever wants the mean over all tokens of the global batch must know: with
the same loss in `backward`, the same optimizer and the same data, the frameworks train with different gradients.
"""

import logging
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from environment import deepspeed
from lightning import pytorch
from lightning.fabric import Fabric
from settings import start_deepspeed
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from transformers import PrinterCallback, Trainer, TrainingArguments

from common.config import parse
from common.ranks import Ranks, fail, join


@dataclass
class Settings:
    """How often the gradient is added up before a step."""

    accumulation: int = 4
    """Micro-batches of each rank."""

    def __post_init__(self) -> None:
        if self.accumulation < 1:
            raise ValueError(f"accumulation = {self.accumulation} cannot work; allowed: at least 1")


class OneWeight(torch.nn.Module):
    """weight · sum(x): with x = 1 the gradient of each micro-batch is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x).sum()


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    """With a learning rate of 1 and a weight of 0, the weight after the step is minus the gradient."""
    return torch.optim.SGD(model.parameters(), lr=1.0)


def with_ddp(ranks: Ranks, accumulation: int) -> float:
    model = DistributedDataParallel(OneWeight().to(ranks.device), device_ids=ranks.device_ids)
    optimizer = sgd(model)
    for number in range(accumulation):
        with nullcontext() if number + 1 == accumulation else model.no_sync():
            model(torch.ones(1, device=ranks.device)).backward()
    optimizer.step()
    return -model.module.weight.item()


def with_deepspeed(ranks: Ranks, accumulation: int, **how: Any) -> float:
    settings = {
        "train_batch_size": ranks.world_size * accumulation,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,  # without this line DeepSpeed 0.19 clips at 1
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 1},
    }
    model = OneWeight()
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=sgd(model), config=settings)
    for _ in range(accumulation):
        engine.backward(engine(torch.ones(1, device=ranks.device)), **how)
        engine.step()
    return -model.weight.item()


def with_fabric(ranks: Ranks, accumulation: int) -> float:
    accelerator = "cuda" if ranks.device.type == "cuda" else "cpu"
    fabric = Fabric(accelerator=accelerator, devices=ranks.local_world_size, strategy="ddp")
    fabric.launch()
    bare = OneWeight()
    model, optimizer = fabric.setup(bare, sgd(bare))
    for number in range(accumulation):
        with fabric.no_backward_sync(model, enabled=number + 1 < accumulation):
            fabric.backward(model(torch.ones(1, device=fabric.device)))
    optimizer.step()
    return -bare.weight.item()


def with_lightning(ranks: Ranks, accumulation: int) -> float:
    class Lesson(pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = OneWeight()

        def training_step(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self)

    lesson = Lesson()
    trainer = pytorch.Trainer(
        accelerator="cuda" if ranks.device.type == "cuda" else "cpu", devices=ranks.local_world_size,
        strategy="ddp", accumulate_grad_batches=accumulation, max_steps=1, use_distributed_sampler=False,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(lesson, torch.utils.data.DataLoader(torch.ones(accumulation, 1)))
    return -lesson.model.weight.item()


class ForTrainer(OneWeight):
    """The same as Trainer wants its models: it gives the loss. Trainer gives no count of items to this one."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": super().forward(x)}


class CountsItems(OneWeight):
    """The loss as models of transformers compute it: a sum divided by the items that Trainer counted.

    The items are all labels that are not -100, over the micro-batches and ranks; here three a micro-batch.
    """

    def forward(self, x: torch.Tensor, labels: torch.Tensor, **told: Any) -> dict[str, torch.Tensor]:
        return {"loss": super().forward(x) / told["num_items_in_batch"]}


def with_trainer(ranks: Ranks, accumulation: int, model: torch.nn.Module) -> float:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, use_cpu=ranks.device.type == "cpu", per_device_train_batch_size=1, max_steps=1,
            gradient_accumulation_steps=accumulation, max_grad_norm=0.0, report_to=[], disable_tqdm=True,
            save_strategy="no", logging_strategy="no", dataloader_pin_memory=False, ddp_find_unused_parameters=False,
        )  # fmt: skip
        data = [{"x": torch.ones(1), "labels": torch.zeros(3, dtype=torch.int64)}] * (accumulation * ranks.world_size)
        optimizer = sgd(model.to(ranks.device))
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, constant))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return -model.weight.item()


WAYS: dict[str, Callable[[Ranks, int], float]] = {
    "DDP": with_ddp,
    "Lightning, Fabric": with_fabric,
    "Lightning, Trainer": with_lightning,
    "DeepSpeed, engine.backward(loss)": with_deepspeed,
    "DeepSpeed, engine.backward(loss, scale_wrt_gas=False)": lambda r, a: with_deepspeed(r, a, scale_wrt_gas=False),
    "transformers, Trainer, a model that is told no count": lambda r, a: with_trainer(r, a, ForTrainer()),
    "transformers, Trainer, a model that divides by the count": lambda r, a: with_trainer(r, a, CountsItems()),
}


def in_words(divisor: float, ranks: int, accumulation: int) -> str:
    """What a divisor is made of."""
    both = ranks * accumulation
    names = {1: "nothing", ranks: "ranks", accumulation: "micro-batches", both: "ranks × micro-batches"}
    names |= {3 * both: "all items of the global batch"}
    return next((name for value, name in names.items() if abs(divisor - value) < 1e-4), f"{divisor:g}?")


@record
def main(settings: Settings) -> None:
    ranks = join()
    start_deepspeed(ranks)
    accumulation = settings.accumulation
    if len({1, ranks.world_size, accumulation}) < 3:
        fail(f"{ranks.world_size} ranks and accumulation {accumulation}; expected two different numbers above 1, so "
             "that what is divided by can be told apart")  # fmt: skip
    warnings.simplefilter("ignore")  # the table is what there is to see
    for name in ("lightning.pytorch", "lightning.fabric", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    total = ranks.world_size * accumulation
    if ranks.is_main:
        print(f"{ranks.world_size} ranks × {accumulation} micro-batches, each with a gradient of 1: {total} in all\n")
        print(f"{'':58}{'gradient':>9}   divided by")
    for name, way in WAYS.items():
        gradient = way(ranks, accumulation)
        if len(set(ranks.all_gather(gradient))) > 1:
            fail(f"{name}: the ranks have different gradients; they should have been reduced")
        if ranks.is_main:
            print(f"{name:58}{gradient:>9g}   {in_words(total / gradient, ranks.world_size, accumulation)}", flush=True)
    ranks.leave()


if __name__ == "__main__":
    main(parse(Settings))
