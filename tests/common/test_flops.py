"""FLOPs by formula equal FLOPs counted by torch; peaks are known or None."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.flops import allow_tf32, explain, flops_per_token, forward_flops, mfu, peak_by_name, peak_flops
from common.transformer import ModelConfig, Transformer

SMALL = dict(vocabulary=101, width=36, layers=3, heads=6, ffn_width=50, max_sequence=64)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(**SMALL, kv_heads=6),
        ModelConfig(**SMALL, kv_heads=2, tied=True),
        ModelConfig(**SMALL, kv_heads=1, head_size=10),
        ModelConfig(**SMALL, kv_heads=2, experts=5, experts_per_token=2),
    ],
    ids=["full", "grouped tied", "head size", "mixture"],
)
def test_formula_equals_what_torch_counts(config):
    """Forward and backward, exactly. The plain attention kernel: its matmuls are counted like any other."""
    batch, sequence = 2, 24
    model = Transformer(config)
    tokens = torch.randint(config.vocabulary, (batch, sequence))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    assert counter.get_total_flops() == flops_per_token(config, sequence) * batch * sequence
    with sdpa_kernel(SDPBackend.MATH):
        assert 3 * forward_flops(model, tokens) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("preset", "parameters_without_embedding"), [("gpt_124m", 84_953_088 + 38_633_472), ("llama3_8b", 7_504_658_432)]
)
def test_agrees_with_6n_plus_attention(preset, parameters_without_embedding):
    """PaLM's 6 N + 12 L H Q T, with N from the published shapes: matmul weights, the head among them."""
    config, sequence = ModelConfig(preset), 1024
    expected = 6 * parameters_without_embedding + 12 * config.layers * config.width * sequence
    # The norms' weights are in that N and in no matmul: 2.6e5 of 7.5e9, 1.9e4 of 1.2e8.
    assert flops_per_token(config, sequence) == pytest.approx(expected, rel=2e-4)


def test_forward_flops_of_a_convolutional_network():
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(512, 10)
    )
    before = module[1].running_mean.clone()
    convolution, linear = 2 * 8 * 8 * 8 * 3 * 3 * 3, 2 * 512 * 10
    assert forward_flops(module, torch.randn(4, 3, 8, 8)) == 4 * (convolution + linear)
    assert module.training and torch.equal(module[1].running_mean, before)


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 NVL", "fp16", 835.5e12),
        ("NVIDIA H200", "tf32", 494.5e12),
        ("NVIDIA B200", "bf16", 2250e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-PCIE-40GB", "tf32", 156e12),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5e12),
        ("Tesla V100-SXM2-16GB", "fp16", 125e12),
        ("Tesla V100-SXM2-16GB", "bf16", None),  # no bf16 unit
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA L40S", "bf16", 362.05e12),
        ("NVIDIA A10", "bf16", 125e12),
        ("NVIDIA A10G", "bf16", None),  # another device than the A10
        ("NVIDIA RTX A6000", "bf16", 154.8e12),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2e12),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", None),
        ("AMD Instinct MI300X", "bf16", 1307.4e12),
        ("AMD Instinct MI325X", "bf16", 1307.4e12),
        ("AMD Instinct MI300A", "tf32", 490.3e12),
        ("NVIDIA GH200 480GB", "bf16", 989.4e12),
        ("NVIDIA A40", "bf16", 149.7e12),
        ("NVIDIA L40", "bf16", 181.05e12),
        ("AMD Instinct MI250X", "fp16", 191.5e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),  # a seventh of the device
        ("NVIDIA H300", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "fp64", None),
    ],
)
def test_peaks_are_known_by_the_exact_name(name, precision, expected):
    assert peak_by_name(name, precision) == expected


def test_fp32_means_tf32_where_torch_may_use_it(monkeypatch):
    """Of matmuls and of convolutions alike: one peak stands for both."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA A100-SXM4-80GB")
    for allowed, peak in ((True, 156e12), (False, 19.5e12)):
        allow_tf32(allowed)
        assert peak_flops("cuda", "fp32") == peak
        assert torch.backends.cudnn.allow_tf32 == allowed
        assert peak_flops("cuda", "bf16") == 312e12


def test_mfu():
    # 1000 tokens/s at 3e9 FLOPs each are 3e12 of 4 x 10e12
    assert mfu(1000, 3e9, 10e12, 4) == pytest.approx(0.075)
    assert mfu(1000, 3e9, None, 4) is None
    assert peak_flops("cpu", "fp32") is None


def test_explain_shows_formula_convention_and_peak(monkeypatch):
    config = ModelConfig("gpt_124m")
    lines = explain(config, 1024, "cpu", "fp32").splitlines()
    assert len(lines) == 3
    assert f"{flops_per_token(config, 1024):.4g}" in lines[0]
    assert "full sequence (PaLM, appendix B)" in lines[1]
    assert lines[2] == "peak: not known for CPU in fp32, so no MFU"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 PCIe")
    assert (
        explain(config, 1024, "cuda", "bf16").splitlines()[2] == "peak: 756 TFLOP/s, dense bf16, per NVIDIA H100 PCIe"
    )
