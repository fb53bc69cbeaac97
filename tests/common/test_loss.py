"""The chunked loss: equal to torch's cross-entropy, gradients included, without the logits of the whole batch."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from common.loss import checkpointed_cross_entropy, chunked_cross_entropy, count_valid

BOTH = pytest.mark.parametrize("function", [chunked_cross_entropy, checkpointed_cross_entropy])
BATCH, SEQUENCE, WIDTH, VOCABULARY = 3, 7, 10, 13  # 21 tokens: chunks of 4, 5 and 20 are ragged


def make_inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(BATCH, SEQUENCE, WIDTH, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(VOCABULARY, (BATCH, SEQUENCE), generator=generator)
    return hidden, weight, targets


def loss_and_gradients(function, hidden, weight):
    loss = function(hidden, weight)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def reference(targets):
    def function(hidden, weight):
        return F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction="sum")

    return function


@BOTH
@pytest.mark.parametrize("ignored", ["none", "some", "a whole chunk", "all"])
@pytest.mark.parametrize("chunk_size", [1, 4, 5, 7, 20, 21, 1000])
def test_equals_cross_entropy(function, chunk_size, ignored):
    hidden, weight, targets = make_inputs()
    targets = targets.clone()
    if ignored == "some":
        targets[0, 1] = targets[2, 3] = -100
    elif ignored == "a whole chunk":
        targets[0] = -100
    elif ignored == "all":
        targets[:] = -100
    ours = loss_and_gradients(lambda h, w: function(h, w, targets, chunk_size), hidden, weight)
    expected = loss_and_gradients(reference(targets), hidden, weight)
    for found, wanted in zip(ours, expected, strict=True):
        assert found.dtype == torch.float64
        # Sums of some 300 fp64 terms of order 1, in another order: a few times 1e-15.
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    if ignored == "all":
        assert all(bool((found == 0).all()) for found in ours)


def test_counts_and_ignore_index():
    hidden, weight, targets = make_inputs()
    targets = targets.clone()
    targets[1, :3] = -100
    assert count_valid(targets).item() == BATCH * SEQUENCE - 3
    sevens = torch.where(targets == -100, 7, targets % 7)  # 7 takes the role of -100
    loss = chunked_cross_entropy(hidden, weight, sevens, 4, ignore_index=7)
    kept = torch.where(sevens == 7, -100, sevens)
    torch.testing.assert_close(loss, reference(kept)(hidden, weight), rtol=0, atol=1e-12)
    assert count_valid(sevens, ignore_index=7).item() == BATCH * SEQUENCE - 3


def test_chunk_size_must_be_positive():
    hidden, weight, targets = make_inputs()
    with pytest.raises(ValueError, match="chunk_size is 0; expected"):
        chunked_cross_entropy(hidden, weight, targets, 0)


class RecordLogits(TorchDispatchMode):
    """The most elements of any tensor made, and the most rows of any tensor as wide as the vocabulary."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.elements, self.rows = vocabulary, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
                if tensor.dim() == 2 and tensor.shape[-1] == self.vocabulary:
                    self.rows = max(self.rows, tensor.shape[0])
        return result


@BOTH
@pytest.mark.parametrize("chunk_size", [8, 64])
def test_full_logits_never_exist(function, chunk_size):
    vocabulary, width, tokens = 512, 4, 64
    hidden = torch.randn(1, tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    with RecordLogits(vocabulary) as record:
        function(hidden, weight, torch.zeros(1, tokens, dtype=torch.int64), chunk_size).backward()
    assert record.rows == chunk_size  # forward and backward; 64 proves that the recording sees whole logits
    assert record.elements == max(vocabulary * width, chunk_size * vocabulary)


@BOTH
@pytest.mark.parametrize("chunk_size", [5, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_has_low_precision_matmul_and_fp32_softmax(function, dtype, chunk_size):
    hidden, weight, targets = make_inputs(torch.float32)

    def by_hand(hidden, weight):
        logits = F.linear(hidden.to(dtype), weight.to(dtype)).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    def autocast(hidden, weight):
        with torch.autocast("cpu", dtype):
            return function(hidden, weight, targets, chunk_size)

    expected = loss_and_gradients(by_hand, hidden, weight)
    found = loss_and_gradients(autocast, hidden, weight)
    assert [tensor.dtype for tensor in found] == [torch.float32] * 3
    # The same roundings; only the fp32 sum has another order. A softmax in bf16 would be off by 1e-1.
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-6)
    # By hand the weight's gradient is rounded to 16 bits once, in chunks each part is: an ulp or so apart.
    torch.testing.assert_close(found[2], expected[2], rtol=0, atol=4 * torch.finfo(dtype).eps)


@BOTH
def test_autocast_sums_weight_gradients_in_fp32(function):
    """Each chunk adds 1 to a gradient; in bf16 a sum of ones would end at 256."""
    tokens = 400
    hidden = torch.ones(1, tokens, 1)
    weight = torch.zeros(2, 1, requires_grad=True)  # probabilities 1/2: a token's gradient is +-1/2
    with torch.autocast("cpu", torch.bfloat16):
        loss = function(hidden, weight, torch.zeros(1, tokens, dtype=torch.int64), chunk_size=1)
    loss.backward()
    assert weight.grad.tolist() == [[-tokens / 2], [tokens / 2]]


def test_bf16_weights_sum_their_gradients_in_fp32():
    """As under FSDP's mixed precision, where the gathered head itself is bf16: rounded once, at the end."""
    hidden = torch.ones(1, 400, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    chunked_cross_entropy(hidden, weight, torch.zeros(1, 400, dtype=torch.int64), chunk_size=1).backward()
    assert weight.grad.tolist() == [[-200], [200]]


def test_a_scale_beyond_fp16():
    """GradScaler begins with 65 536, which fp16 does not hold."""
    hidden, weight, targets = make_inputs(torch.float32)

    def gradients(scale):
        with torch.autocast("cpu", torch.float16):
            loss = chunked_cross_entropy(hidden, weight, targets, 5)
        return torch.autograd.grad(scale * loss, (hidden, weight))

    plain, scaled = gradients(1), gradients(65536)
    for a, b in zip(plain, scaled, strict=True):
        assert torch.equal(65536 * a, b)


def test_two_backwards_through_one_loss():
    """As zero-bubble pipelines do, which ask for the gradients of inputs and of weights one after the other."""
    hidden, weight, targets = make_inputs()
    loss = chunked_cross_entropy(hidden, weight, targets, 5)
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    assert torch.equal(first, torch.autograd.grad(loss, (hidden, weight))[0])


@pytest.mark.parametrize("trained", ["hidden", "weight", "neither"])
def test_matmuls_for_the_gradients_that_are_needed(trained):
    """Three matmuls where a gradient is wanted, in each chunk; one in an evaluation."""
    hidden, weight, targets = make_inputs()
    hidden.requires_grad_(trained == "hidden")
    weight.requires_grad_(trained == "weight")
    with FlopCounterMode(display=False) as counter:
        loss = chunked_cross_entropy(hidden, weight, targets, 7)
    assert counter.get_total_flops() == 2 * BATCH * SEQUENCE * WIDTH * VOCABULARY * (1 if trained == "neither" else 3)
    assert loss.requires_grad == (trained != "neither")


@pytest.mark.parametrize("vocabulary", [256, 50304, pytest.param(128256, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_real_vocabularies(vocabulary, dtype, tolerance):
    """The same as recomputation and as torch's own loss: to an ulp of a sum of some 900 in fp32."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 32, 8, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, 8, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocabulary, (2, 32), generator=generator)
    targets[0, :5] = -100
    fused = loss_and_gradients(lambda h, w: chunked_cross_entropy(h, w, targets, 24), hidden, weight)
    for other in (lambda h, w: checkpointed_cross_entropy(h, w, targets, 24), reference(targets)):
        for a, b in zip(fused, loss_and_gradients(other, hidden, weight), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6 if dtype == torch.float32 else 0, atol=tolerance)


def test_bf16_weights_give_an_fp32_loss():
    hidden, weight, targets = make_inputs(torch.bfloat16)
    loss, hidden_gradient, weight_gradient = loss_and_gradients(
        lambda h, w: chunked_cross_entropy(h, w, targets, 5), hidden, weight
    )
    assert (loss.dtype, hidden_gradient.dtype, weight_gradient.dtype) == (torch.float32, *[torch.bfloat16] * 2)


@pytest.mark.parametrize("chunk_size", [5, pytest.param(1000, marks=pytest.mark.slow)])
def test_compiled_loss_is_the_same(chunk_size):
    hidden, weight, targets = make_inputs()
    compiled = torch.compile(chunked_cross_entropy, backend="aot_eager", fullgraph=True)
    found = loss_and_gradients(lambda h, w: compiled(h, w, targets, chunk_size), hidden, weight)
    expected = loss_and_gradients(reference(targets), hidden, weight)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=torch.float64)

    def forward(self, hidden, targets):
        return chunked_cross_entropy(self.first(hidden), self.head.weight, targets, 4)


def test_ddp_accepts_a_weight_used_in_many_chunks():
    """DDP's reducer raises when a parameter's gradient becomes ready twice: one rank is enough to see that."""
    hidden, _, targets = make_inputs()
    plain = Head()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(copy.deepcopy(plain))
        wrapped(hidden.detach(), targets).backward()
        plain(hidden.detach(), targets).backward()
        for ours, theirs in zip(wrapped.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)
        del wrapped
    finally:
        dist.destroy_process_group()
