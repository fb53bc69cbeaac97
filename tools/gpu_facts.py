"""What a GPU chooses and reaches: versions, the rate of a large matmul, the kernel of attention and its time."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from common.flops import peak_by_name
from common.ranks import single_process

BACKENDS = {-1: "error", 0: "math", 1: "flash", 2: "memory-efficient", 3: "cuDNN"}


def milliseconds(function: Callable[[], object], times: int = 10) -> float:
    """The mean time of a call, after three that warm up."""
    for number in range(times + 3):
        if number == 3:
            torch.cuda.synchronize()
            start = time.perf_counter()
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / times * 1e3


def main() -> None:
    device = single_process("cuda").device
    name, bf16 = torch.cuda.get_device_name(device), {"dtype": torch.bfloat16, "device": device}
    peak = peak_by_name(name, "bf16")
    print(f"{name}, capability {torch.cuda.get_device_capability(device)}, bf16 peak {peak and peak / 1e12} TFLOP/s")
    print(f"torch {torch.__version__}, NCCL {torch.cuda.nccl.version()}, cuDNN {torch.backends.cudnn.version()}")
    a, b = torch.randn(2, 8192, 8192, **bf16)
    print(f"matmul of 8192³ in bf16: {2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9:.0f} TFLOP/s")
    copied = milliseconds(lambda: a.clone())
    print(f"copy of 134 MB: {2 * a.nbytes / copied / 1e9:.2f} TB/s")
    for heads, kv_heads, length in ((12, 12, 1024), (32, 8, 4096)):
        shape = (16384 // length, heads, length, 64)
        query = torch.randn(shape, **bf16, requires_grad=True)
        key = torch.randn(shape[0], kv_heads, length, 64, **bf16, requires_grad=True)
        options = {"is_causal": True, "enable_gqa": heads != kv_heads}
        kernel = BACKENDS.get(torch._fused_sdp_choice(query, key, key, **options), "another kernel")

        def step(query=query, key=key, options=options) -> None:
            F.scaled_dot_product_attention(query, key, key, **options).sum().backward()

        print(f"attention, {heads} heads, {kv_heads} for keys, {length} tokens: {kernel}, "
              f"{milliseconds(step):.2f} ms forward and backward for 16384 tokens")  # fmt: skip


if __name__ == "__main__":
    main()
