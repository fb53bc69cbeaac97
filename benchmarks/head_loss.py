"""What the head and the loss cost: three ways to the same sum and the same gradients.

    python benchmarks/head_loss.py                                        # about a minute on two cores
    python benchmarks/head_loss.py --tokens 16384 --width 768 --precision bf16      # on a GPU

whole       all logits at once, torch's cross-entropy
recomputed  a chunk of tokens at a time, whose logits are computed again in backward
fused       a chunk at a time, with the gradients computed in the forward (common/loss.py)

The three take turns; times are those of forward and backward. Memory is the peak above what was there before the turn:
allocated on a GPU, resident on the CPU (Linux). Each turn's gradients are compared with those of `whole`.
"""

import argparse
import ctypes
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from report import (  # beside this file
    cores,
    date,
    git_commit,
    hardware,
    measured_on,
    other_load_note,
    processor_seconds,
    since,
    spread,
    without_paths,
    write_json,
)
from torch import Tensor
from tqdm import tqdm

from common.loss import checkpointed_cross_entropy, chunked_cross_entropy
from common.ranks import fail, single_process
from common.runs.run_folder import environment_record

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Largest difference from `whole`, over the largest gradient: rounding of sums, and of 16-bit factors.
TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5, "bf16": 2**-6, "fp16": 2**-8}


def whole(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
    """All logits at once."""
    logits = F.linear(hidden, weight).flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets.flatten(), reduction="sum")


CONTESTANTS = {"whole": whole, "recomputed": checkpointed_cross_entropy, "fused": chunked_cross_entropy}


class Peak:
    """The most memory used within the block, in bytes above what was there at its start; None where unknown."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, None

    def __enter__(self) -> "Peak":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        elif sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before goes back to the system
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            self.before = self._resident("VmRSS")
        return self

    def __exit__(self, *_: Any) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before
        elif sys.platform == "linux":
            self.bytes = self._resident("VmHWM") - self.before

    @staticmethod
    def _resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def turn(name: str, inputs: tuple[Tensor, Tensor, Tensor], options: argparse.Namespace) -> dict[str, Any]:
    """Forward and backward once: seconds, peak bytes, loss and gradients."""
    hidden, weight, targets = inputs
    device, low = hidden.device, LOW.get(options.precision)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with Peak(device) as peak:
        synchronize()
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=low, enabled=low is not None):
            loss = CONTESTANTS[name](hidden, weight, targets, options.chunk)
        gradients = torch.autograd.grad(loss, (hidden, weight))
        synchronize()
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": peak.bytes, "gradients": gradients}


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Let the three take turns, and return medians and spread.

    Raises:
        SystemExit: (exit code 2) two of them disagree about a gradient.
    """
    dtype = torch.float64 if options.precision == "fp64" else torch.float32
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, options.tokens, options.width, generator=generator, dtype=dtype).to(device).requires_grad_()
    weight = (0.02 * torch.randn(options.vocabulary, options.width, generator=generator, dtype=dtype)).to(device)
    targets = torch.randint(options.vocabulary, (1, options.tokens), generator=generator).to(device)
    inputs = hidden, weight.requires_grad_(), targets
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    peaks: dict[str, list[int]] = {name: [] for name in CONTESTANTS}
    for number in tqdm(range(options.rounds + 1), unit="round", disable=None):  # the first warms up
        expected = None
        names = list(CONTESTANTS)
        for name in names[number % 3 :] + names[: number % 3] if number else names:
            result = turn(name, inputs, options)
            if number == 0:
                expected = expected or result["gradients"]
                for ours, right in zip(result["gradients"], expected, strict=True):
                    difference = ((ours - right).abs().max() / right.abs().max()).item()
                    if difference > TOLERANCE[options.precision]:
                        fail(f"{name}: a gradient differs from that of whole by {difference:.1e} of the largest")
            else:
                seconds[name].append(result["seconds"])
                if result["bytes"] is not None:
                    peaks[name].append(result["bytes"])
    return {
        name: {"seconds": spread(seconds[name]), "peak_bytes": statistics.median(peaks[name]) if peaks[name] else None}
        for name in CONTESTANTS
    }


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    lines = ["| | forward and backward | of whole | peak memory |", "|---|---|---|---|"]
    one = result["contestants"]["whole"]["seconds"]["median"]
    for name, found in result["contestants"].items():
        times, peak = found["seconds"], found["peak_bytes"]
        memory = "unknown" if peak is None else f"{peak / 2**20:,.0f} MiB"
        shown = f"{1e3 * times['median']:,.0f} ms ({1e3 * times['min']:,.0f} to {1e3 * times['max']:,.0f})"
        lines.append(f"| {name} | {shown} | {times['median'] / one:.2f} | {memory} |")
    return "\n".join([*lines, "", f"`{result['command']}`: median (least to greatest); {measured_on(result)}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1024, help="in the batch (default 1024)")
    parser.add_argument("--width", type=int, default=256, help="of the hidden states (default 256)")
    parser.add_argument("--vocabulary", type=int, default=50304, help="rows of the head (default 50304)")
    parser.add_argument("--chunk", type=int, default=128, help="tokens a chunk (default 128)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument("--precision", choices=list(TOLERANCE), default="fp32", help="of the matmuls (default fp32)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto (default)")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    if min(options.tokens, options.width, options.vocabulary, options.chunk, options.rounds) < 1:
        parser.error("--tokens, --width, --vocabulary, --chunk and --rounds must be at least 1")
    device = single_process(options.device).device
    torch.set_num_threads(cores())
    before = processor_seconds()
    result = {
        "benchmark": "head_loss",
        "contestants": measure(options, device),
        "command": without_paths(["python", *sys.argv]),
    }
    name = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    result |= {"hardware": hardware(name), "versions": environment_record("torch")["versions"]}
    result |= {"git_commit": git_commit(), "date": date(), "other_load": other_load_note(*since(before))}
    print(table(result))
    if result["other_load"]:
        print(result["other_load"])
    if options.output:
        write_json(result, options.output, "--output")


if __name__ == "__main__":
    main()
