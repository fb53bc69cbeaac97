"""ZeRO-Offload and ZeRO-Infinity: what lies on the device, in host memory and on disk, before and after a step.

    torchrun --nproc-per-node=2 deepspeed/zero_offload.py                          # some ten seconds on a laptop
    torchrun --nproc-per-node=4 deepspeed/zero_offload.py --model.preset llama_1b --pin_memory true    # four GPUs
    python deepspeed/nvme.py                          # once, before NVMe: compiles async_io, 7 to 15 minutes

The same model takes the same steps with ZeRO-2, ZeRO-2 with the optimizer in host memory, ZeRO-3 with everything in
host memory, and ZeRO-3 with everything on disk. Bytes are those behind all tensors of this process and in its swap
files; beside them stands what the papers predict: ZeRO (arXiv 1910.02054), ZeRO-Offload (2101.06840), ZeRO-Infinity
(2104.07857). On the CPU, device and host are the same memory: there the table shows what would lie where on a GPU.
"""

import gc
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from environment import deepspeed
from nvme import nvme_problem
from offload_meter import HeldBytes, measure, storages
from settings import open_swap_folder, start_deepspeed
from torch.distributed.elastic.multiprocessing.errors import record

from common.config import parse
from common.config_fields import PathText
from common.data_sharding import derive_seed
from common.optimizer import OptimizerConfig, build_optimizer
from common.ranks import Ranks, fail, join
from common.transformer import ModelConfig, Transformer

CASES = {  # name: what it is, ZeRO's stage, where the optimizer goes, where the parameters go
    "zero2": ("ZeRO-2, nothing offloaded", 2, None, None),
    "zero2_cpu": ("ZeRO-2, optimizer in host memory (ZeRO-Offload)", 2, "cpu", None),
    "zero3_cpu": ("ZeRO-3, parameters and optimizer in host memory", 3, "cpu", "cpu"),
    "zero3_nvme": ("ZeRO-3, parameters and optimizer on disk (ZeRO-Infinity)", 3, "nvme", "nvme"),
}
ROLES = ("parameters", "gradients", "optimizer", "buffers")
MOMENTS = ("before the step", "after backward", "after the step")


@dataclass
class OffloadConfig:
    case: Literal["all", "zero2", "zero2_cpu", "zero3_cpu", "zero3_nvme"] = "all"
    """One case, or all of them (NVMe only where it can run)."""
    steps: int = 5
    """Steps to time; the first one, in which memory is allocated, is not among them."""
    sequence_length: int = 64
    """Random tokens per rank and step."""
    pin_memory: bool = False
    """Page-lock what is offloaded: copies to and from a GPU are faster. Without effect on the CPU."""
    nvme_path: PathText = ""
    """A folder on a disk of this node; default: the variable TMPDIR, else /tmp."""
    model: ModelConfig = field(default_factory=ModelConfig)
    seed: int = 1234
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps = {self.steps} cannot work; allowed: at least 1")
        if not 1 <= self.sequence_length <= self.model.max_sequence:
            longest = f"1 to model.max_sequence = {self.model.max_sequence}"
            raise ValueError(f"sequence_length = {self.sequence_length} cannot work; allowed: {longest}")


@record
def main(config: OffloadConfig) -> None:
    ranks = join(config.device)
    start_deepspeed(ranks)  # takes the process group that is there
    names = list(CASES) if config.case == "all" else [config.case]
    if "zero3_nvme" in names and (reason := nvme_problem(ranks)):
        if config.case == "zero3_nvme":
            fail(reason)
        names.remove("zero3_nvme")
        ranks.print(f"zero3_nvme is left out: {reason}\n")
    if ranks.device.type == "cpu":
        ranks.print("no GPU: device and host are one memory here; the table shows what would lie where with a GPU")
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in Transformer(config.model).parameters())
    ranks.print(f"Ψ = {count:,} parameters, n = {ranks.world_size} ranks, bf16; bytes on rank 0")
    for name in names:
        run_case(name, config, count, ranks)
    ranks.leave()


def run_case(name: str, config: OffloadConfig, count: int, ranks: Ranks) -> None:
    """Take the steps of one case and print what was where, and how long it took."""
    swap = open_swap_folder(config.nvme_path, ranks) if name == "zero3_nvme" else None
    gc.collect()
    before = set(storages(gc.get_objects()))
    engine, optimizer = build(name, config, swap, ranks)
    _, _, optimizer_to, parameters_to = CASES[name]
    offloaded = {"parameters": parameters_to, "gradients": optimizer_to, "optimizer": optimizer_to}
    held = [measure(engine, before, offloaded, swap, ranks)]
    generator = torch.Generator().manual_seed(derive_seed(config.seed, ranks.rank))
    shape = (1, config.sequence_length + 1)
    text = torch.randint(config.model.vocabulary, shape, generator=generator).to(ranks.device)
    before |= set(storages([text]))
    seconds: dict[str, list[float]] = {"forward": [], "backward": [], "step": []}

    for step in range(1 + config.steps):
        clock = [now(ranks)]
        loss = engine(text[:, :-1], text[:, 1:]) / config.sequence_length
        clock.append(now(ranks))
        engine.backward(loss)
        clock.append(now(ranks))
        if step == 0:
            loss = loss.detach()  # lets go of what the forward kept
            before |= set(storages([loss]))
            held.append(measure(engine, before, offloaded, swap, ranks))
        start = now(ranks)
        engine.step()
        if step == 0:
            held.append(measure(engine, before, offloaded, swap, ranks))
        else:
            for kind, value in zip(
                seconds, (clock[1] - clock[0], clock[2] - clock[1], now(ranks) - start), strict=True
            ):
                seconds[kind].append(value)

    print_case(name, held, count, ranks)
    medians = [statistics.median(values) for values in seconds.values()]
    slowest = [max(of_rank) for of_rank in zip(*ranks.all_gather(medians), strict=True)]
    times = ", ".join(f"{kind} {1000 * value:.1f} ms" for kind, value in zip(seconds, slowest, strict=True))
    ranks.print(f"  {times} (median of {config.steps}); loss {loss.item():.6f} in step {1 + config.steps}")
    engine.destroy()
    del engine, optimizer, loss
    gc.collect()


def build(name: str, config: OffloadConfig, swap: Path | None, ranks: Ranks) -> tuple[Any, torch.optim.Optimizer]:
    """The engine of one case. Sizes are set so that a small model shows what a large one does."""
    _, stage, optimizer_to, parameters_to = CASES[name]
    model = Transformer(config.model, config.seed)
    largest = max(parameter.numel() for parameter in model.parameters())
    where = {"pin_memory": config.pin_memory} | ({"nvme_path": str(swap)} if swap else {})
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": largest}  # default: 500 million elements, allocated
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # default: up to 100,000 elements are never cut up
        zero["sub_group_size"] = max(largest, 1_000_000)  # what the optimizer updates at a time; default: 1 billion
    if optimizer_to:
        zero["offload_optimizer"] = {"device": optimizer_to, **where}
    if parameters_to:
        zero["offload_param"] = {"device": parameters_to, **where}
        if swap:  # default: 5 buffers of 100 million elements, and up to 1 billion stay in memory as well
            size = max(-(-largest // ranks.world_size), 1024)
            zero["offload_param"] |= {"buffer_size": size, "buffer_count": 5, "max_in_cpu": 0}
            # Each parameter that is whole, or on its way, takes a buffer: by default (1 billion) a whole small model.
            keys = "stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance"
            zero |= dict.fromkeys(keys, 0)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": True},
        # A torch optimizer, which DeepSpeed does not know, in place of its own CPU Adam, which has to be compiled.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    optimizer = build_optimizer(
        model.parameters(), OptimizerConfig(), torch.device("cpu" if optimizer_to else ranks.device)
    )
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine, optimizer


def predicted(name: str, count: int, n: int) -> dict[tuple[str, str], tuple[str, int]]:
    """What the papers give for mixed precision with Adam: 2 bytes of weights and of gradients, 12 of fp32 state."""
    _, stage, optimizer_to, parameters_to = CASES[name]
    places = {None: "device", "cpu": "host", "nvme": "disk"}
    weights = ("2 Ψ/n", 2 * count // n) if stage == 3 else ("2 Ψ", 2 * count)
    return {
        (places[parameters_to], "parameters"): weights,
        (places[optimizer_to], "gradients"): ("2 Ψ/n", 2 * count // n),
        (places[optimizer_to], "optimizer"): ("12 Ψ/n", 12 * count // n),
    }


def print_case(name: str, held: list[HeldBytes], count: int, ranks: Ranks) -> None:
    formula = predicted(name, count, ranks.world_size)
    ranks.print(f"\n{CASES[name][0]}")
    ranks.print(" " * 21 + "".join(f"{moment:>17}" for moment in MOMENTS) + "   by the papers")
    for place in ("device", "pinned", "host", "disk"):
        for role in ROLES:
            row, (words, expected) = [each[place, role] for each in held], formula.get((place, role), ("", 0))
            if any(row) or expected:
                by_formula = f"{expected:>16,}  {words}" if expected else ""
                ranks.print(f"  {place:7}{role:12}" + "".join(f"{value:>17,}" for value in row) + by_formula)
    for place in ("device", "pinned", "host", "disk"):
        of_ranks = ranks.all_gather(sum(value for (where, _), value in held[-1].items() if where == place))
        if any(of_ranks):
            ranks.print(f"  {place} after the step, by rank: {'  '.join(f'{value:,}' for value in of_ranks)}")


def now(ranks: Ranks) -> float:
    """The time when the device has done all that it was told."""
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
    return time.perf_counter()


if __name__ == "__main__":
    main(parse(OffloadConfig))
