"""What the ranks of a `group` run for the tests of ddp/train_vision.py."""

import contextlib
import importlib.util
import io
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from rank_worker import starts_its_own_group

from common import checkpoint
from common.config import parse
from common.ranks import join
from vision.images import ImageConfig, image_datasets
from vision.networks import VisionModel, build_model

ROOT = Path(__file__).resolve().parent.parent.parent


def load_script():
    """ddp/train_vision.py as a module; imported by its path, because ddp/ is no package."""
    spec = importlib.util.spec_from_file_location("train_vision", ROOT / "ddp" / "train_vision.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@starts_its_own_group
def evaluate_checkpoint(path: str, batch_size: int) -> tuple[float, float]:
    """Loss and accuracy of a small_cnn from a checkpoint, by as many ranks as there are."""
    vision, ranks = load_script(), join("cpu")
    model = build_model(VisionModel("small_cnn"), 1, 8, 10, seed=0)
    checkpoint.load(Path(path), model, None, ranks)
    result = vision.evaluate(model, image_datasets(ImageConfig())[1], batch_size, ranks)
    assert model.training
    ranks.leave()
    return result


@starts_its_own_group
def averaged_statistics() -> tuple[torch.Tensor, torch.Tensor, int]:
    """Running mean and variance and the counter after averaging; before, each rank has its own."""
    vision, ranks = load_script(), join("cpu")
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(2), torch.nn.Conv2d(2, 2, 1), torch.nn.BatchNorm2d(3)).double()
    for place, layer in enumerate((model[0], model[2])):
        layer.running_mean += ranks.rank + 10 * place + torch.arange(layer.num_features)
        layer.running_var *= 2**ranks.rank
        layer.num_batches_tracked += 5
    vision.average_statistics(model, ranks)
    vision.average_statistics(torch.nn.Conv2d(2, 2, 1), ranks)  # without any: no collective, no error
    ranks.leave()
    means = torch.cat([model[0].running_mean, model[2].running_mean])
    variances = torch.cat([model[0].running_var, model[2].running_var])
    return means, variances, int(model[2].num_batches_tracked)


@starts_its_own_group
def train_without_averaging(arguments: list[str]) -> tuple[int, str]:
    """Train with the running statistics left to DDP: exit code and stderr."""
    vision, stderr, code = load_script(), io.StringIO(), 0
    vision.average_statistics = lambda model, ranks: None
    with contextlib.redirect_stderr(stderr):
        try:
            vision.main(parse(vision.VisionConfig, arguments))
        except SystemExit as ended:
            code = ended.code
    if dist.is_initialized():
        dist.destroy_process_group()
    return code, stderr.getvalue()
