"""DDP on images: equal to one process, with BatchNorm too once it is told which images go together."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from equality import STEPS, largest_difference, read_checkpoint, read_rows
from launching import ROOT, SCRIPTS, OnRanks

from common.config import Config, parse, to_dict
from common.data_sharding import BatchConfig, BatchPlan
from vision.images import ImageConfig, image_datasets
from vision.networks import VisionConfig, VisionModel, build_model

SCRIPT = "ddp/train_vision.py"
ON_RANKS, STARTS = OnRanks("tests/ddp/vision_on_ranks.py"), OnRanks("tests/ddp/starts_on_ranks.py")
SMALL = ["--model.name", "small_cnn"]
EVERY = ["--checkpoint.every", "1", "--checkpoint.keep", "99"]
WARMUP, GLOBAL, SEED, VALIDATION = 2, 48, 1234, 359


def train(group, world_size, folder, name, *more):
    """Train small_cnn on `world_size` ranks; returns the run folder."""
    arguments = [*SMALL, "--runs_dir", str(folder), "--run_name", name, *more]
    group(world_size)(SCRIPTS.train, SCRIPT, arguments)
    return folder / name


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------- against one process, exactly


def one_process(norm, ranks=1, accumulation=1):
    """The same training written out for one process, in fp64, without DDP, Run, schedule or optimizer of ours.

    BatchNorm takes its means over the images that go through the network together. So the reference sends the
    micro-batches of all ranks through one after the other, each rank starting from the same running statistics, whose
    mean then goes into the next step. With GroupNorm one batch of all images does.

    Returns:
        (losses, gradient norms, gradients of the first step by name, state of the model after the last step).
    """
    model = build_model(VisionModel("small_cnn", norm), 1, 8, 10, SEED).double()
    dataset = image_datasets(ImageConfig())[0]
    order = BatchPlan(BatchConfig(GLOBAL), len(dataset), SEED)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": others}]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    losses, norms, first, peak = [], [], {}, 0.2 * GLOBAL / 256
    for step in range(STEPS):
        progress = (step - WARMUP) / (STEPS - 1 - WARMUP)
        rate = peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
        for each in optimizer.param_groups:
            each["lr"] = peak * (step + 1) / WARMUP if step < WARMUP else rate
        samples = [dataset[order.sample(step * GLOBAL + i)] for i in range(GLOBAL)]
        images = torch.stack([image for image, _ in samples]).double()
        labels = torch.tensor([label for _, label in samples])
        optimizer.zero_grad()
        before, after, total = copy.deepcopy(dict(model.named_buffers())), [], 0.0
        for mine, theirs in zip(images.chunk(ranks), labels.chunk(ranks), strict=True):
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
            for part, target in zip(mine.chunk(accumulation), theirs.chunk(accumulation), strict=True):
                loss = F.cross_entropy(model(part), target, label_smoothing=0.1, reduction="sum") / GLOBAL
                loss.backward()
                total += loss.item()
            after.append(copy.deepcopy(dict(model.named_buffers())))
        for name, buffer in model.named_buffers():
            buffer.copy_(sum(each[name] for each in after) / ranks)
        losses.append(total)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        first = first or {name: p.grad.clone() for name, p in model.named_parameters()}
        if step == 0:
            for name, p in model.named_parameters():  # what SGD makes of it: its velocity after one step
                first[name] += 5e-4 * p.detach() if p.ndim > 1 else 0
        optimizer.step()
    return losses, norms, first, model.state_dict()


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (3, 2)])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_fp64_is_the_proof(group, tmp_path, norm, world_size, accumulation):
    """1e-12: sums in another order differ by some 1e-16, and these steps of SGD do not amplify that much."""
    losses, norms, first, state = one_process(norm, *((world_size, accumulation) if norm == "batch" else ()))
    run = train(
        group, world_size, tmp_path, "run", *EVERY, "--train.precision", "fp64", "--train.steps", str(STEPS),
        "--batch.micro_size", str(GLOBAL // world_size // accumulation), "--optimizer.warmup_steps", str(WARMUP),
        "--train.label_smoothing", "0.1", "--optimizer.clip", "1.0", "--model.norm", norm,
        "--train.check_replicas_every", "1",
    )  # fmt: skip
    rows = read_rows(run)
    assert [row["images"] for row in rows] == [GLOBAL * (step + 1) for step in range(STEPS)]
    for row, loss, norm_before_clipping in zip(rows, losses, norms, strict=True):
        assert abs(row["loss"] - loss) <= 1e-12
        assert abs(row["grad_norm"] - norm_before_clipping) <= 1e-12 * max(1, norm_before_clipping)
    assert losses[-1] < losses[0] - (
        0.3 if STEPS == 20 else 0.01
    )  # something was learned, or equality would say little
    velocities = read_checkpoint(run, 1)
    for name, gradient in first.items():
        found = velocities[f"optimizer.state.{name}.momentum_buffer"]
        assert (found - gradient).abs().max() <= 1e-12, name
    ours = {name: tensor for name, tensor in read_checkpoint(run, STEPS).items() if name.startswith("model.")}
    assert largest_difference(ours, {f"model.{name}": tensor for name, tensor in state.items()}) <= 1e-12


# -------------------------------------------------------------------------------------- BatchNorm's running statistics


@pytest.mark.parametrize("world_size", [2, 3])
def test_running_statistics_become_the_mean_over_the_ranks(group, world_size):
    answers = group(world_size)(ON_RANKS.averaged_statistics)
    own = sum(range(world_size)) / world_size
    expected = torch.tensor([own, 1 + own, 10 + own, 11 + own, 12 + own], dtype=torch.float64)
    for means, variances, batches in answers:
        torch.testing.assert_close(means, expected)
        torch.testing.assert_close(variances, torch.full_like(expected, (2**world_size - 1) / world_size))
        assert torch.equal(means, answers[0][0]) and torch.equal(variances, answers[0][1])  # to the bit
        assert batches == 5


def test_without_the_average_the_ranks_disagree(group, tmp_path):
    """The replica check sees buffers: it is this that makes the other tests' check_replicas_every mean something."""
    options = [*SMALL, "--train.steps", "3", "--train.check_replicas_every", "1", "--runs_dir", str(tmp_path)]
    for code, stderr in group(3)(ON_RANKS.train_without_averaging, options):
        assert code == 2 and "different weights: first in 1.running_mean" in stderr


# --------------------------------------------------------------------------------------------------- a whole training


@pytest.fixture(scope="module")
def trained(group, tmp_path_factory):
    """The default training with the small network, on 2 ranks."""
    return train(group, 2, tmp_path_factory.mktemp("runs"), "trained", "--train.eval_every", "60")


def test_it_learns_to_read_digits(trained):
    rows, record = rows_of(trained), json.loads((trained / "run.json").read_text())
    first, last = [row for row in rows if "val_loss" in row]
    assert (first["step"], last["step"]) == (60, 120)
    assert last["accuracy"] > 0.9 and last["val_loss"] < 0.4
    assert last["accuracy"] > first["accuracy"]
    assert record["unit"] == "images" and record["units_per_step"] == 48 and record["strategy"] == "ddp"
    # 3 × 2 FLOPs for each weight and place: 64 places of 9 × 32, 16 of 288 × 64, 4 of 576 × 128, and the classifier
    assert record["flops_per_unit"] == 6 * (64 * 9 * 32 + 16 * 288 * 64 + 4 * 576 * 128 + 128 * 10)


def test_the_evaluation_does_not_depend_on_the_world_size(group, trained):
    """359 images divide among no number of ranks here; a padded evaluation would count some twice."""
    logged = next(row for row in rows_of(trained) if row["step"] == 120 and "val_loss" in row)
    path = str(trained / "checkpoints" / "step_120")
    for world_size, batch_size in ((1, 48), (3, 7)):  # logged were 2 ranks, 24 images at a time
        answers = group(world_size)(ON_RANKS.evaluate_checkpoint, path, batch_size)
        assert len(set(answers)) == 1  # all ranks know it
        loss, accuracy = answers[0]
        assert accuracy == logged["accuracy"] and (accuracy * VALIDATION) == round(accuracy * VALIDATION)
        assert abs(loss - logged["val_loss"]) < 1e-6  # fp32 kernels may sum another batch size in another order


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resuming_is_bitwise_at_two_ranks(group, tmp_path, precision):
    """Weights, velocities, running statistics, the scaler with its count of steps, data, learning rates."""
    options = ["--train.steps", str(STEPS), "--optimizer.warmup_steps", "2", "--train.precision", precision]
    half = STEPS // 2
    whole = train(group, 2, tmp_path, "whole", *options, "--checkpoint.every", str(half))
    resumed = train(group, 2, tmp_path, "resumed", *options, "--resume", str(whole / "checkpoints" / f"step_{half}"))
    for mine, theirs in zip(read_rows(resumed), read_rows(whole)[half:], strict=True):
        assert all(mine[key] == theirs[key] for key in ("step", "loss", "grad_norm", "lr", "images"))
    manifests = [json.loads((run / "checkpoints" / f"step_{STEPS}" / "manifest.json").read_text())
                 for run in (whole, resumed)]  # fmt: skip
    assert manifests[0]["extra"] == manifests[1]["extra"]
    scaler = manifests[1]["extra"].get("scaler")
    assert scaler["_growth_tracker"] == STEPS if precision == "fp16" else scaler is None
    a, b = read_checkpoint(whole, STEPS), read_checkpoint(resumed, STEPS)
    assert a.keys() == b.keys() and any("running_var" in name for name in a)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains(group, tmp_path, precision):
    """Autocast over fp32 weights and fp32 statistics; the scaler of fp16 travels in the checkpoint."""
    run = train(group, 2, tmp_path, "low", "--train.precision", precision, "--train.steps", "12",
                "--train.check_replicas_every", "1")  # fmt: skip
    rows = read_rows(run)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    weights = {name: t for name, t in read_checkpoint(run, 12).items() if name.startswith("model.")}
    assert {t.dtype for name, t in weights.items() if "num_batches" not in name} == {torch.float32}
    manifest = json.loads((run / "checkpoints" / "step_12" / "manifest.json").read_text())
    assert ("scaler" in manifest["extra"]) == (precision == "fp16")


@pytest.mark.slow
def test_the_default_under_torchrun(launch, tmp_path):
    """ResNet-18, as a user starts it; two steps, because the whole is about a minute."""
    result = launch(SCRIPT, "--train.steps", "2", "--run_name", "resnet", "--train.check_replicas_every", "1")
    assert "finished after 2 of 2 steps" in result.stdout and "accuracy 0." in result.stdout
    weights = read_checkpoint(tmp_path / "runs" / "resnet", 2)
    assert weights["model.conv1.weight"].shape == (64, 1, 3, 3)  # the stem for small images
    assert weights["model.layer4.1.conv2.weight"].shape == (512, 512, 3, 3)
    assert weights["model.fc.weight"].shape == (10, 512)


def test_the_default_network_trains(group, tmp_path):
    """ResNet-18 on a few digits: the stem for small images, the classes of the data set, equal statistics."""
    arguments = ["--train.steps", "1", "--batch.global_size", "4", "--runs_dir", str(tmp_path), "--run_name", "resnet",
                 "--train.check_replicas_every", "1"]  # fmt: skip
    group(2)(SCRIPTS.train, SCRIPT, arguments)
    weights = read_checkpoint(tmp_path / "resnet", 1)
    assert weights["model.conv1.weight"].shape == (64, 1, 3, 3)
    assert weights["model.layer4.1.conv2.weight"].shape == (512, 512, 3, 3)
    assert weights["model.fc.weight"].shape == (10, 512)


@pytest.mark.parametrize(("world_size", "micro"), [(2, 24), (2, 6), (3, 8)])
def test_gradients_travel_once_a_step(group, tmp_path, world_size, micro):
    """However many micro-batches there are: reduced on every one they are right, and cost as many times as much."""
    options = [*SMALL, "--train.steps", "3", "--batch.micro_size", str(micro), "--train.check_replicas_every", "0"]
    places = ["--runs_dir", str(tmp_path), "--run_name", "run"]
    parameters = list(build_model(VisionModel("small_cnn"), 1, 8, 10, SEED).named_parameters())
    statistics = 4 * 2 * (32 + 64 + 128)  # running mean and variance of three layers, in fp32
    for answer in group(world_size)(STARTS.counted, SCRIPT, [*options, *places]):
        assert [sum(messages) for messages in answer["gradients"]] == [4 * sum(p.numel() for _, p in parameters)] * 3
        assert sorted(answer["others"]) == [16] * 3 + [24] + [statistics] * 3  # Run's, the evaluation's, the averages


def test_networks():
    """Shapes and starts: stems by image size, each residual block the identity at first, equal seeds equal weights."""
    large = build_model(VisionModel("resnet50"), 3, 224, 1000, SEED)
    assert sum(p.numel() for p in large.parameters()) == 25_557_032  # as torchvision's documentation says
    assert large.conv1.weight.shape == (64, 3, 7, 7) and isinstance(large.maxpool, torch.nn.MaxPool2d)
    grey = build_model(VisionModel("resnet18"), 1, 96, 10, SEED)
    assert grey.conv1.weight.shape == (64, 1, 7, 7) and isinstance(grey.maxpool, torch.nn.MaxPool2d)
    small = build_model(VisionModel("resnet18", "group"), 3, 64, 200, SEED)
    assert small.conv1.weight.shape == (64, 3, 3, 3) and isinstance(small.maxpool, torch.nn.Identity)
    assert not list(small.buffers())  # GroupNorm keeps no statistics
    block, image = small.layer1[0], torch.rand(2, 64, 8, 8)
    assert torch.equal(block(image), image)
    again = build_model(VisionModel("resnet18", "group"), 3, 64, 200, SEED)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))


# --------------------------------------------------------------------------------------------------- mistakes, configs


@pytest.mark.parametrize(("arguments", "words"), [
    (["--model.sync_batchnorm", "true"], ["model.sync_batchnorm", "GPUs only", "--model.norm group"]),
    (["--model.sync_batchnorm", "true", "--model.norm", "group"], ["model.sync_batchnorm", "model.norm = batch"]),
    (["--batch.micro_size", "1"], ["1 image", "batch.micro_size", "--model.norm group"]),
    (["--batch.global_size", "25"], ["global_size = 25", "2 data-parallel ranks"]),
    (["--train.activation_checkpointing", "true"], ["train.activation_checkpointing", "batch.micro_size"]),
    (["--train.label_smoothing", "1.0"], ["train.label_smoothing = 1.0"]),
    (["--optimizer.lr_batch", "0"], ["optimizer.lr_batch = 0"]),
    (["--model.name", "resnet19"], ["model.name", "resnet18"]),
    (["--model.nrom", "group"], ["model.nrom", "did you mean model.norm"]),
    (["--data.source", "mnist"], ["data.source = mnist", "data.path"]),
    (["--data.source", "cifar10", "--data.path", "nowhere"], ["nowhere", "CIFAR10", "download=True"]),
    (["--data.source", "folder", "--data.path", "nowhere"], ["nowhere", "train/CLASS"]),
])  # fmt: skip
def test_a_mistake_is_one_line_on_every_rank(group, tmp_path, arguments, words):
    options = [*([] if "--model.name" in arguments else SMALL), "--runs_dir", str(tmp_path), *arguments]
    for code, text in group(2)(SCRIPTS.ends, SCRIPT, options):
        lines = [line for line in text.splitlines() if "error: " in line]
        assert code == 2 and len(lines) == 1 and "Traceback" not in text, text
        assert all(word in lines[0] for word in words), lines


def read_config(path):
    """A config as its script reads it."""
    kind = Config if path.stem in ("tiny", "gpt_124m") else VisionConfig
    return kind, parse(kind, ["--config", str(path)])


CONFIGS = sorted((ROOT / "ddp" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_configs_are_read(path: Path):
    kind, config = read_config(path)
    if path.stem in ("tiny", "digits"):  # which spell the defaults out
        assert to_dict(config) == to_dict(parse(kind, []))
    for ranks in (1, 2, 4):
        BatchPlan(config.batch, 10**6, config.seed, 0, ranks)
    assert all(milestone < config.train.steps for milestone in config.optimizer.milestones)
    assert config.optimizer.warmup_steps < config.train.steps
