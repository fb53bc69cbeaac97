"""The optimizer against its formula, and the learning rate against torch's own schedulers."""

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, SequentialLR

from common.optimizer import OptimizerConfig, build_optimizer, learning_rate, set_learning_rate

CPU = torch.device("cpu")
STEPS, WARMUP = 50, 8


def rates(config, steps=STEPS):
    return [learning_rate(step, steps, config) for step in range(steps)]


def scheduled(lr, make):
    """What a torch scheduler, made for a dummy optimizer, gives for each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, found = make(optimizer), []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_warmup_and_cosine_are_those_of_torch():
    config = OptimizerConfig(lr=0.4, warmup_steps=WARMUP, min_lr_ratio=0.1)

    def make(optimizer):
        rising = LinearLR(optimizer, start_factor=1 / WARMUP, total_iters=WARMUP - 1)
        falling = CosineAnnealingLR(optimizer, T_max=STEPS - 1 - WARMUP, eta_min=0.04)
        return SequentialLR(optimizer, [rising, falling], milestones=[WARMUP])

    assert rates(config) == pytest.approx(scheduled(0.4, make), rel=1e-12)  # torch computes them recursively
    assert rates(config)[WARMUP - 1] == 0.4 and rates(config)[-1] == pytest.approx(0.04, rel=1e-12)


def test_milestones_are_those_of_torch():
    config = OptimizerConfig(lr=0.4, warmup_steps=0, milestones=[10, 20, 40])
    expected = scheduled(0.4, lambda optimizer: MultiStepLR(optimizer, [10, 20, 40], gamma=0.1))
    assert rates(config) == pytest.approx(expected, rel=1e-12)
    config = OptimizerConfig(lr=0.4, warmup_steps=WARMUP, milestones=[10, 20, 40])
    assert rates(config)[:WARMUP] == pytest.approx([0.4 * (n + 1) / WARMUP for n in range(WARMUP)])
    assert rates(config)[WARMUP:] == pytest.approx(expected[WARMUP:], rel=1e-12)


@pytest.mark.parametrize("steps", [1, 2, WARMUP, WARMUP + 1, WARMUP + 2])
def test_short_trainings_have_a_learning_rate_too(steps):
    """A run cut short with --train.steps must not divide by zero or leave the range."""
    found = rates(OptimizerConfig(lr=0.4, warmup_steps=WARMUP), steps)
    assert all(0 < rate <= 0.4 for rate in found)


def parameters():
    generator = torch.Generator().manual_seed(0)
    matrix, vector, frozen = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 4), (5,), (2, 2)))
    return torch.nn.Parameter(matrix), torch.nn.Parameter(vector), torch.nn.Parameter(frozen, requires_grad=False)


def gradients(step):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 4), (5,))]


def trained(config, steps=5):
    matrix, vector, frozen = parameters()
    optimizer = build_optimizer([matrix, vector, frozen], config, CPU)
    for step in range(steps):
        matrix.grad, vector.grad = gradients(step)
        optimizer.step()
    assert torch.equal(frozen, parameters()[2])
    return matrix.detach(), vector.detach()


def test_adamw_is_its_formula():
    """Loshchilov and Hutter, arXiv 1711.05101, algorithm 2; decay on the matrix, none on the vector."""
    config = OptimizerConfig(name="adamw", lr=0.01, betas=(0.8, 0.9), weight_decay=0.3)
    found = trained(config)
    for position, decay in ((0, 0.3), (1, 0.0)):
        weight = parameters()[position].detach().clone()
        mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
        for step in range(5):
            gradient = gradients(step)[position]
            mean = 0.8 * mean + 0.2 * gradient
            square = 0.9 * square + 0.1 * gradient**2
            weight -= 0.01 * decay * weight
            corrected = mean / (1 - 0.8 ** (step + 1)), square / (1 - 0.9 ** (step + 1))
            weight -= 0.01 * corrected[0] / (corrected[1].sqrt() + 1e-8)
        assert (found[position] - weight).abs().max() < 1e-14  # some fp64 roundings of numbers of order 1


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_its_formula(nesterov):
    """Momentum as in Goyal et al., arXiv 1706.02677, equation 9: the learning rate outside of the velocity."""
    config = OptimizerConfig(name="sgd", lr=0.1, betas=(0.9, 0.95), weight_decay=0.3, nesterov=nesterov)
    found = trained(config)
    for position, decay in ((0, 0.3), (1, 0.0)):
        weight = parameters()[position].detach().clone()
        velocity = torch.zeros_like(weight)
        for step in range(5):
            gradient = gradients(step)[position] + decay * weight
            velocity = 0.9 * velocity + gradient
            weight -= 0.1 * (gradient + 0.9 * velocity if nesterov else velocity)
        assert (found[position] - weight).abs().max() < 1e-14


def test_a_new_learning_rate_reaches_every_parameter():
    matrix, vector, frozen = parameters()
    optimizer = build_optimizer([matrix, vector, frozen], OptimizerConfig(name="sgd", weight_decay=0.0), CPU)
    set_learning_rate(optimizer, 0.5)
    before = matrix.detach().clone(), vector.detach().clone()
    matrix.grad, vector.grad = torch.ones_like(matrix), torch.ones_like(vector)
    optimizer.step()
    for old, new in zip(before, (matrix, vector), strict=True):
        torch.testing.assert_close(old - new.detach(), torch.full_like(old, 0.5))


@pytest.mark.parametrize(("settings", "says"), [
    ({"lr": 0.0}, r"optimizer\.lr = 0\.0 .* above 0"),
    ({"clip": -1.0}, r"optimizer\.clip = -1\.0 .* above 0"),
    ({"betas": (1.0, 0.9)}, r"optimizer\.betas = \(1\.0, 0\.9\)"),
    ({"warmup_steps": -1}, r"optimizer\.warmup_steps = -1"),
    ({"weight_decay": -0.1}, r"optimizer\.weight_decay = -0\.1"),
    ({"min_lr_ratio": 1.5}, r"optimizer\.min_lr_ratio = 1\.5 between 0 and 1"),
    ({"milestones": [20, 10]}, r"optimizer\.milestones = \[20, 10\] must be .* rising"),
    ({"milestones": [10, 10]}, r"optimizer\.milestones = \[10, 10\] must be .* rising"),
    ({"milestones": [0]}, r"optimizer\.milestones = \[0\] must be steps from 1 on"),
    ({"nesterov": True}, r"optimizer\.nesterov = true needs optimizer\.name = sgd"),
    ({"nesterov": True, "name": "sgd", "betas": (0.0, 0.9)}, r"optimizer\.betas\[0\] above 0"),
])  # fmt: skip
def test_settings_that_cannot_work(settings, says):
    with pytest.raises(ValueError, match=says):
        OptimizerConfig(**settings)
