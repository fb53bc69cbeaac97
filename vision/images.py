"""The images: handwritten digits that need no download, and MNIST, CIFAR-10 or a folder of images by path.

The digits come with scikit-learn.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from common.config_fields import PathText
from common.launching import same_start
from common.ranks import fail


@dataclass
class ImageConfig:
    """Which images, and how they are fed."""

    source: Literal["digits", "mnist", "cifar10", "folder"] = "digits"
    """digits (embedded), mnist and cifar10 (torchvision's files), or a folder with train/ and val/ by class."""
    path: PathText | None = None
    """Where the files are; not needed for digits."""
    image_size: int | None = None
    """Side of the square images in pixels; by default that of the data set (224 for folders)."""
    augment: bool = True
    """Random crop and flip in training, where the data set allows it."""
    workers: int = 0
    """Loader processes per rank."""

    def __post_init__(self) -> None:
        if self.source != "digits" and not self.path:
            raise ValueError(f"data.source = {self.source} needs data.path, the folder with its files")
        if self.workers < 0 or (self.image_size is not None and self.image_size < 8):
            raise ValueError(
                f"data.workers = {self.workers} must be 0 or more, data.image_size = {self.image_size} at least 8"
            )


class ImageDataset:
    """Images by index, transformed: (image (channels, height, width) float32, label int)."""

    def __init__(self, items: Any, labels: Any, transform: Callable[[Any], torch.Tensor], augments: bool) -> None:
        self.items, self.labels, self.transform, self.augments = items, labels, transform, augments

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.items[index]), int(self.labels[index])

    def fingerprint(self) -> str:
        """A short hash of the labels in their order."""
        labels = np.asarray(self.labels, dtype=np.int64)
        return f"{len(labels)}:{hashlib.sha256(labels.tobytes()).hexdigest()[:16]}"


def to_rgb(image: Any) -> Any:
    """Return a picture of Pillow with 8 bits for each of red, green and blue. Of several pictures it is the first.

    Raises:
        ValueError: the range of its numbers is not known.
    """
    from PIL import Image

    if image.mode.startswith("I"):  # convert() would cut off all above 255
        values = np.asarray(image).astype(np.int64)
        sixteen = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
        if not sixteen or values.min() < 0 or values.max() > 65535:
            raise ValueError("whole numbers of 32 bits, of unknown range; save it with 8 or 16 bits")
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floats, of unknown range; save it with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


class _ImageFiles:
    """Images read from disk when asked for."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        try:
            with Image.open(self.paths[index]) as image:
                return to_rgb(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # so Pillow says "broken"
            fail(f"{self.paths[index]} cannot be read as an image ({error}); replace or remove it")


def image_datasets(config: ImageConfig) -> tuple[ImageDataset, ImageDataset, int]:
    """Open the training and the validation set; returns (train, validation, number of classes).

    Raises:
        SystemExit: (exit code 2) files are missing: what was looked for, and how to get it.
    """
    from torchvision import datasets as tv
    from torchvision.transforms import v2

    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    if config.source == "folder":
        return _folder_datasets(config, to_tensor)
    if config.source == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)  # (1797, 1, 8, 8), 0 … 1
        size = config.image_size or 8
        resize = v2.Resize(size) if size != 8 else v2.Identity()
        is_validation = np.arange(len(images)) % 5 == 4
        transform = v2.Compose([resize, v2.Normalize([0.5], [0.5])])
        train, validation = (
            ImageDataset(images[mask], digits.target[mask], transform, augments=False)
            for mask in (~is_validation, is_validation)
        )
        return train, validation, 10
    builder = {"mnist": tv.MNIST, "cifar10": tv.CIFAR10}[config.source]
    try:
        sets = [builder(root=str(config.path), train=part, download=False) for part in (True, False)]
    except (RuntimeError, ValueError, AssertionError, OSError):  # torchvision's ways to say missing or damaged
        name = builder.__name__
        fetch = f"from torchvision.datasets import {name}; {name}({json.dumps(str(config.path))}, download=True)"
        fail(
            f"data.path = {config.path}: no {name} there, or a damaged one; fetch it once, where there is "
            f"internet: python -c {shlex.quote(fetch)}"
        )
    size = config.image_size or (28 if config.source == "mnist" else 32)
    mean, std = ([0.1307], [0.3081]) if config.source == "mnist" else ([0.491, 0.482, 0.447], [0.247, 0.243, 0.262])
    plain = [*to_tensor, v2.Resize(size), v2.Normalize(mean, std)]
    augments = config.augment and config.source == "cifar10"  # a mirrored digit is another digit
    random = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()] if augments else []
    pictures = [
        torch.as_tensor(np.asarray(part.data)) for part in sets
    ]  # MNIST (n, 28, 28), CIFAR-10 (n, 32, 32, 3) uint8
    pictures = [p.unsqueeze(1) if p.ndim == 3 else p.permute(0, 3, 1, 2).contiguous() for p in pictures]
    return (
        ImageDataset(pictures[0], sets[0].targets, v2.Compose([*random, *plain]), augments),
        ImageDataset(pictures[1], sets[1].targets, v2.Compose(plain), augments=False),
        10,
    )


def _folder_datasets(config: ImageConfig, to_tensor: list[Any]) -> tuple[ImageDataset, ImageDataset, int]:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    root, size = Path(str(config.path)), config.image_size or 224
    if not ((root / "train").is_dir() and (root / "val").is_dir()):
        fail(f"data.path = {root}: looked for train/CLASS/*.jpg and val/CLASS/*.jpg, as ImageNet unpacks")
    annotations = root / "val" / "val_annotations.txt"  # Tiny ImageNet keeps its validation labels in a file
    try:
        train = ImageFolder(str(root / "train"))
        if annotations.is_file():
            validation = _read_annotations(annotations, train.class_to_idx)
        else:
            folder = ImageFolder(str(root / "val"))
            only = {
                "train": sorted(set(train.classes) - set(folder.classes)),
                "val": sorted(set(folder.classes) - set(train.classes)),
            }
            if any(only.values()):
                found = "; ".join(
                    f"only in {part} ({len(names)}): {', '.join(names[:3])}" for part, names in only.items() if names
                )
                fail(f"data.path = {root}: {found}; expected folders of the same classes in train and val")
            validation = folder.samples
    except FileNotFoundError as error:
        fail(f"data.path = {root}: not a tree of images by class ({error})")
    normalize = [*to_tensor, v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    # The usual evaluation crop: the middle 7/8 of the image (He et al., arXiv 1512.03385, section 3.4).
    center = [v2.Resize(size * 8 // 7), v2.CenterCrop(size)]
    random = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()] if config.augment else center

    names = [(str(Path(path).relative_to(root)), label) for path, label in (*train.samples, *validation)]
    same_start.note({"data by file names": same_start.digest(repr(names).encode())})

    def dataset(samples: list[tuple[str, int]], transforms: list[Any], augments: bool) -> ImageDataset:
        paths, labels = [path for path, _ in samples], [label for _, label in samples]
        return ImageDataset(_ImageFiles(paths), labels, v2.Compose([*transforms, *normalize]), augments)

    evaluated = dataset(validation, center, False)
    for index in {0, len(evaluated) - 1}:
        evaluated[index]  # a sample of what only the evaluation reads, which may come hours later
    return (dataset(train.samples, random, config.augment), evaluated, len(train.classes))


def _read_annotations(file: Path, labels: dict[str, int]) -> list[tuple[str, int]]:
    """Read Tiny ImageNet's list: an image's name, a tab, its class, and more. SystemExit: it is broken."""
    folder, found = file.parent / "images", dict[str, int]()
    try:
        there = set(os.listdir(folder))
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{file} cannot be used ({error}); expected a text in UTF-8, and the folder images beside it")
    for number, line in enumerate(lines, 1):
        name, _, rest = line.partition("\t")
        label, wrong = rest.partition("\t")[0], ""
        if label not in labels:
            wrong = f"class {label!r}, which train does not have" if rest else "no tab; expected NAME<tab>CLASS"
        elif name not in there or name in found:
            wrong = f"image {name!r}, which {'stands above, too' if name in found else f'is not in {folder}'}"
        if line and wrong:
            fail(f"{file}: line {number}: {wrong:.200}; fetch it again")
        if line:
            found[name] = labels[label]
    if not found:
        fail(f"{file} names no images; expected NAME<tab>CLASS in each line; fetch it again")
    return [(str(folder / name), label) for name, label in found.items()]
