"""FLOPs per token, known device peaks, and model FLOPs utilisation (MFU).

MFU (PaLM, arXiv 2204.02311, appendix B) is the share of the hardware's peak spent on the arithmetic that
the model needs, whatever else is computed: forward once, and backward as twice forward; recomputation, by
activation checkpointing or in a fused kernel, is not counted. A multiply-add is 2 FLOPs; only matmuls count.

The causal convention here: attention counts over the full sequence, as in PaLM's appendix B
(6N + 12 L H Q T) and in nanoGPT, although a causal kernel skips almost half of it. FlashAttention-2
(2307.08691) counts that half only.
"""

import re

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common.transformer import ModelConfig

_NO = None  # the device has no unit for this precision, or its maker gives no figure
# Dense peaks in TFLOP/s by torch.cuda.get_device_name: bf16, fp16, TF32, fp32. Datasheets often print the
# doubled figure "with sparsity" (2:4): halved here. Matrix units with fp32 accumulation, as torch uses them.
_PEAKS: list[tuple[str, tuple[float | None, ...]]] = [
    (r"V100-SXM2", (_NO, 125.0, _NO, 15.7)),  # NVIDIA V100 datasheet (2020)
    (r"V100-PCIE", (_NO, 112.0, _NO, 14.0)),  # the same
    (r"V100S-PCIE", (_NO, 130.0, _NO, 16.4)),  # the same
    (r"A100-(SXM4|PCIE)|A100 80GB PCIe", (312.0, 312.0, 156.0, 19.5)),  # NVIDIA A100 datasheet (2021)
    (r"H100 80GB HBM3", (989.4, 989.4, 494.7, 66.9)),  # H100 SXM5; NVIDIA Hopper architecture white paper
    (r"H100 PCIe", (756.0, 756.0, 378.0, 51.2)),  # the same
    (r"H100 NVL", (835.5, 835.5, 417.5, 60.0)),  # NVIDIA H100 datasheet (2024), sparse figures halved
    (r"H200", (989.5, 989.5, 494.5, 67.0)),  # H200 SXM; NVIDIA H200 datasheet (2024), sparse figures halved
    (r"GH200 (120|480)GB", (989.4, 989.4, 494.7, 66.9)),  # NVIDIA GH200 datasheet, sparse figures halved: H100 SXM's
    (r"H200 NVL", (835.5, 835.5, 417.5, 60.0)),  # the same
    (r"B200", (2250.0, 2250.0, 1100.0, 75.0)),  # NVIDIA Blackwell datasheet (HGX B200), sparse halved
    (r"L4", (121.0, 121.0, 60.0, 30.3)),  # NVIDIA L4 datasheet, sparse figures halved
    (r"L40S", (362.05, 362.05, 183.0, 91.6)),  # NVIDIA L40S datasheet, dense column
    (r"L40", (181.05, 181.05, 90.5, 90.5)),  # NVIDIA Ada GPU architecture white paper
    (r"A30", (165.0, 165.0, 82.0, 10.3)),  # NVIDIA A30 datasheet
    (r"A40", (149.7, 149.7, 74.8, 37.4)),  # NVIDIA A40 datasheet
    (r"A10", (125.0, 125.0, 62.5, 31.2)),  # NVIDIA A10 datasheet (the A10G is another device)
    (r"RTX A6000", (154.8, 154.8, 77.4, 38.7)),  # NVIDIA Ampere GA102 architecture white paper
    (r"GeForce RTX 4090", (165.2, 165.2, 82.6, 82.6)),  # NVIDIA Ada GPU architecture white paper
    (r"GeForce RTX 3090", (71.0, 71.0, 35.6, 35.6)),  # NVIDIA Ampere GA102 architecture white paper
    (r"AMD Instinct MI250X", (191.5, 191.5, _NO, 47.9)),  # AMD datasheet, halved: torch sees dies
    (r"AMD Instinct MI210", (181.0, 181.0, _NO, 45.3)),  # AMD MI210 brochure
    (r"AMD Instinct MI300A", (980.6, 980.6, 490.3, 122.6)),  # AMD MI300A datasheet
    (r"AMD Instinct MI3(00X|25X)( OAM)?", (1307.4, 1307.4, 653.7, 163.4)),  # AMD MI300X and MI325X datasheets
]


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of forward and backward per token: 3 x forward, every matmul from its shape.

    Forward, per layer: 2 for each weight of query, key, value and output; 4 x heads x head_size x
    sequence_length for the two attention matmuls (the whole sequence, see above); 2 for each weight of the
    feed-forward part, in a mixture those of the active experts and of the router. For the head 2 x width x
    vocabulary. The embedding is a lookup: 0. In sum PaLM's 6 N + 12 L H Q T, N without embedding and norms.
    """
    attention_width, kv_width = config.heads * config.head_size, config.kv_heads * config.head_size
    projections = 2 * config.width * (2 * attention_width + 2 * kv_width)
    attention = 4 * attention_width * sequence_length
    feed_forward = 2 * 3 * config.width * config.ffn_width
    if config.experts:
        feed_forward = feed_forward * config.experts_per_token + 2 * config.width * config.experts
    head = 2 * config.width * config.vocabulary
    return 3.0 * (config.layers * (projections + attention + feed_forward) + head)


def forward_flops(module: nn.Module, example: Tensor) -> int:
    """FLOPs of `module(example)` as torch counts them: for models without a closed formula, such as ResNets.

    Mode, gradients and statistics of the module stay as they were. Training takes 3 times as many.
    """
    training = module.training
    module.eval()  # so that BatchNorm's running statistics do not move
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(example)
    module.train(training)
    return counter.get_total_flops()


def peak_by_name(name: str, precision: str) -> float | None:
    """Dense peak in FLOP/s of the device called `name`, in bf16, fp16, tf32 or fp32; None if not known."""
    column = {"bf16": 0, "fp16": 1, "tf32": 2, "fp32": 3}.get(precision)
    for pattern, peaks in _PEAKS:
        if column is not None and re.fullmatch(rf"(NVIDIA |Tesla )*({pattern})(-\d+GB)?", name):
            peak = peaks[column]
            return None if peak is None else peak * 1e12
    return None


def peak_flops(device: torch.device | str, precision: str) -> float | None:
    """Dense peak of a device in FLOP/s; None, never a guess, for CPUs, fp64 and devices not in the table."""
    if torch.device(device).type != "cuda":
        return None
    return peak_by_name(torch.cuda.get_device_name(device), _arithmetic(precision))


def allow_tf32(allowed: bool) -> None:
    """Let fp32 matmuls and convolutions run as TF32, or neither. (torch's default: only convolutions.)"""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def _arithmetic(precision: str) -> str:
    """fp32 matmuls run as TF32 when torch has been told that they may."""
    return "tf32" if precision == "fp32" and torch.get_float32_matmul_precision() != "highest" else precision


def mfu(tokens_per_second: float, flops_per_token: float, peak_per_device: float | None, devices: int) -> float | None:
    """MFU, 1 being the peak of all `devices`, whose tokens are counted together; None without a peak."""
    if peak_per_device is None:
        return None
    return tokens_per_second * flops_per_token / (peak_per_device * devices)


def explain(config: ModelConfig, sequence_length: int, device: torch.device | str, precision: str) -> str:
    """Formula, convention and peak behind the MFU of a run, in three lines, to be printed once."""
    total = flops_per_token(config, sequence_length)
    attention = 12 * config.layers * config.heads * config.head_size * sequence_length
    peak, kind = peak_flops(device, precision), _arithmetic(precision)
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "CPU"
    lines = (
        f"FLOPs per token: {total:.4g} = 3 x forward: 6 per active weight (head included, embedding not) "
        f"+ attention, 12 x layers x heads x head_size x sequence = {attention:.4g}",
        "convention: attention over the full sequence (PaLM, appendix B), recomputation not counted; "
        f"with the causal half only, MFU would be {1 - attention / 2 / total:.3f} of this",
        f"peak: {peak / 1e12:.4g} TFLOP/s, dense {kind}, per {name}" if peak else
        f"peak: not known for {name} in {kind}, so no MFU",
    )  # fmt: skip
    return "\n".join(lines)
