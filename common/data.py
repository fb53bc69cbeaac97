"""The data sets: text and images, embedded ones that need no download and real ones by path.

    python -m common.data tokenize --input book.txt --tokenizer bytes --output data/book

The default text is the source code of Python's own standard library, as bytes; the default images are scikit-learn's
handwritten digits. Both come with packages that are installed anyway.
"""

import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from common.ranks import fail


@dataclass
class TextConfig:
    """Which text, in pieces of which length."""

    source: Literal["text", "tokens"] = "text"
    """text: the embedded corpus as bytes, or a UTF-8 file; tokens: a folder made by python -m common.data tokenize."""
    path: str | None = None
    """A text file, or the folder with train.bin and validation.bin."""
    sequence_length: int = 128
    """Tokens per sample."""
    validation_samples: int = 256
    """Evaluate on this many samples, spread over the validation set; 0 takes all."""
    workers: int = 0
    """Processes per rank that prepare batches ahead; 0 prepares each batch in the training process when it is due."""

    def __post_init__(self) -> None:
        if self.sequence_length < 1 or self.validation_samples < 0 or self.workers < 0:
            raise ValueError(
                f"data.sequence_length = {self.sequence_length} must be at least 1, data.validation_samples = "
                f"{self.validation_samples} 0 (all) or more, and data.workers = {self.workers} 0 or more"
            )
        if self.source == "tokens" and not self.path:
            raise ValueError("data.source = tokens needs data.path, a folder made by python -m common.data tokenize")


class TokenDataset:
    """Consecutive, non-overlapping windows of a token array; targets are the tokens one place further on.

    Items are (tokens, targets), each (sequence_length,) int64. `samples` keeps that many windows, evenly spread.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int, vocabulary: int, samples: int = 0) -> None:
        windows = (len(tokens) - 1) // sequence_length
        if windows < 1:
            fail(
                f"the text has {len(tokens)} tokens, but one sample needs data.sequence_length + 1 = "
                f"{sequence_length + 1}; use more text or shorter sequences"
            )
        self.tokens, self.sequence_length, self.vocabulary = tokens, sequence_length, vocabulary
        count = min(samples or windows, windows)
        self.windows = range(windows) if count == windows else [i * windows // count for i in range(count)]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.windows[index] * self.sequence_length
        window = torch.from_numpy(self.tokens[start : start + self.sequence_length + 1].astype(np.int64))
        return window[:-1], window[1:]

    def fingerprint(self) -> str:
        """A short hash of the content (of its ends and length, where the array is large)."""
        tokens, end = self.tokens, 2**20
        ends = tokens if len(tokens) < 2**27 else np.concatenate([tokens[:end], tokens[-end:]])
        return f"{len(tokens)}:{hashlib.sha256(np.ascontiguousarray(ends).tobytes()).hexdigest()[:16]}"


def standard_library_files() -> list[Path]:
    """The source files of Python's standard library, in a fixed order, without its tests and bundled tools."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "ensurepip",
            "pydoc_data"}  # fmt: skip
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - skip  # not entered: site-packages may hold tens of thousands of files
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _embedded_text() -> tuple[np.ndarray, np.ndarray]:
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in standard_library_files():
        is_validation = zlib.crc32(path.name.encode()) % 10 == 0  # a fixed tenth of the files, by name
        parts[is_validation].append(path.read_bytes())
    train, validation = (np.frombuffer(b"\n".join(part), dtype=np.uint8) for part in parts)
    return train, validation


def text_datasets(config: TextConfig, vocabulary: int) -> tuple[TokenDataset, TokenDataset]:
    """Open the training and the validation set.

    Args:
        vocabulary: of the model; text with more different tokens is refused.

    Raises:
        SystemExit: (exit code 2) a file is missing, too short, or needs a larger vocabulary.
    """
    needed = 256
    if config.source == "tokens":
        train, validation, needed = _open_token_folder(Path(str(config.path)))
    elif config.path:
        if not Path(config.path).is_file():
            fail(f"data.path = {config.path}: no such file; give a UTF-8 text, or leave it out for the embedded one")
        text = np.frombuffer(Path(config.path).read_bytes(), dtype=np.uint8)
        train, validation = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    else:
        train, validation = _embedded_text()
    if needed > vocabulary:
        fail(f"the text has a vocabulary of {needed}, the model {vocabulary}; set model.vocabulary to {needed}")
    length = config.sequence_length
    return TokenDataset(train, length, needed), TokenDataset(validation, length, needed, config.validation_samples)


def _open_token_folder(folder: Path) -> tuple[np.ndarray, np.ndarray, int]:
    missing = [name for name in ("meta.json", "train.bin", "validation.bin") if not (folder / name).is_file()]
    if missing:
        fail(
            f"data.path = {folder}: no {', '.join(missing)} there (of meta.json, train.bin, validation.bin); make "
            f"them with: python -m common.data tokenize --input TEXT --output {folder}"
        )
    try:
        meta = json.loads((folder / "meta.json").read_text())
        dtype, counts, vocabulary = np.dtype(meta["dtype"]), meta["tokens"], int(meta["vocabulary"])
        for split in ("train", "validation"):
            size = (folder / f"{split}.bin").stat().st_size
            if size != counts[split] * dtype.itemsize:
                fail(f"{folder}/{split}.bin has {size} bytes, meta.json says {counts[split]} {dtype}; make it again")
    except (KeyError, TypeError, ValueError) as error:
        fail(f"{folder}/meta.json is not what python -m common.data tokenize writes ({error!r}); make it again")
    train, validation = (np.memmap(folder / f"{split}.bin", dtype=dtype, mode="r") for split in ("train", "validation"))
    return train, validation, vocabulary


def write_token_folder(
    texts: Iterable[str], encode: Callable[[str], list[int]], vocabulary: int, folder: Path, name: str
) -> dict[str, int]:
    """Tokenize documents into train.bin, validation.bin (every tenth document, or the last tenth of a single one) and
    meta.json (written last, so that a broken-off run is noticed). Returns the number of tokens in each."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint8 if vocabulary <= 2**8 else np.uint16 if vocabulary <= 2**16 else np.uint32)
    counts, documents = {"train": 0, "validation": 0}, 0
    with open(folder / "train.bin", "wb") as train, open(folder / "validation.bin", "wb") as validation:
        for documents, text in enumerate(texts, start=1):
            split, file = ("validation", validation) if documents % 10 == 0 else ("train", train)
            ids = np.asarray(encode(text), dtype=dtype)
            file.write(ids.tobytes())
            counts[split] += len(ids)
    if documents and not counts["validation"]:
        tokens = np.fromfile(folder / "train.bin", dtype=dtype)
        cut = len(tokens) * 9 // 10
        tokens[:cut].tofile(folder / "train.bin")
        tokens[cut:].tofile(folder / "validation.bin")
        counts = {"train": cut, "validation": len(tokens) - cut}
    meta = {"dtype": dtype.name, "vocabulary": vocabulary, "tokens": counts, "tokenizer": name}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    return counts


# ---------------------------------------------------------------------------------------------------------- images


@dataclass
class ImageConfig:
    """Which images, and how they are fed."""

    source: Literal["digits", "mnist", "cifar10", "folder"] = "digits"
    """digits (embedded), mnist and cifar10 (torchvision's files), or a folder with train/ and val/ by class."""
    path: str | None = None
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


class _ImageFiles:
    """Images read from disk when asked for."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        try:
            with Image.open(self.paths[index]) as image:
                return image.convert("RGB")
        except OSError as error:
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
        fetch = f"from torchvision.datasets import {name}; {name}('{config.path}', download=True)"
        fail(
            f"data.path = {config.path}: no {name} there, or a damaged one; fetch it once, where there is "
            f'internet: python -c "{fetch}"'
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
            rows = [line.split("\t")[:2] for line in annotations.read_text().splitlines() if line]
            validation = [(str(root / "val" / "images" / name), train.class_to_idx[label]) for name, label in rows]
        else:
            folder = ImageFolder(str(root / "val"))
            if folder.classes != train.classes:
                fail(f"{root}/val has {len(folder.classes)} classes, train {len(train.classes)}; they must be the same")
            validation = folder.samples
    except (FileNotFoundError, KeyError) as error:
        fail(f"data.path = {root}: not a tree of images by class ({error})")
    normalize = [*to_tensor, v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    # The usual evaluation crop: the middle 7/8 of the image (He et al., arXiv 1512.03385, section 3.4).
    center = [v2.Resize(size * 8 // 7), v2.CenterCrop(size)]
    random = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()] if config.augment else center

    def dataset(samples: list[tuple[str, int]], transforms: list[Any], augments: bool) -> ImageDataset:
        paths, labels = [path for path, _ in samples], [label for _, label in samples]
        return ImageDataset(_ImageFiles(paths), labels, v2.Compose([*transforms, *normalize]), augments)

    return (dataset(train.samples, random, config.augment), dataset(validation, center, False), len(train.classes))


# ----------------------------------------------------------------------------------------------------- command line


def _documents(inputs: list[str], column: str) -> Iterator[str]:
    """Yield documents from text files, or from a Hugging Face data set (a saved folder, or a name on the hub)."""
    for name in inputs:
        path = Path(name)
        if path.is_file():
            try:
                yield path.read_text(encoding="utf-8", errors="replace")
            except OSError as error:
                fail(f"--input {name}: {error.strerror}; choose a file you can read")
            continue
        try:
            import datasets
        except ImportError:
            fail(f"--input {name}: no such text file; to read it as a Hugging Face data set, pip install datasets")
        try:
            found = datasets.load_from_disk(name) if path.is_dir() else datasets.load_dataset(name, split="train")
            rows = found["train"] if isinstance(found, dict) else found
            if column not in rows.column_names:
                fail(
                    f"--input {name}: no column {column!r}; it has {', '.join(rows.column_names)}: choose with --column"
                )
        except (OSError, ValueError) as error:
            fail(f"--input {name}: neither a text file nor a Hugging Face data set: {error}")
        yield from (row[column] for row in rows)


def main() -> None:
    """Make a token folder from text or from a Hugging Face data set."""
    from argparse import ArgumentParser

    from tqdm import tqdm

    parser = ArgumentParser(prog="python -m common.data", description=main.__doc__)
    command = parser.add_subparsers(dest="command", required=True).add_parser("tokenize", help=main.__doc__)
    command.add_argument("--input", nargs="+", required=True, help="text files, or Hugging Face data sets")
    command.add_argument("--column", default="text", help="column of the data set that holds the text")
    command.add_argument("--tokenizer", default="bytes", help="bytes, or a Hugging Face tokenizer (folder or name)")
    command.add_argument("--output", required=True, type=Path, help="folder for train.bin, validation.bin, meta.json")
    arguments = parser.parse_args()

    if arguments.tokenizer == "bytes":
        encode, vocabulary = (lambda text: list(text.encode())), 256
    else:
        try:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
        except ImportError:
            fail("a Hugging Face tokenizer needs the package transformers: pip install transformers")
        except (OSError, ValueError) as error:
            fail(f"--tokenizer {arguments.tokenizer}: {str(error).splitlines()[0]}")
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        encode, vocabulary = ((lambda text: tokenizer.encode(text, add_special_tokens=False) + end), len(tokenizer))
    documents = tqdm(_documents(arguments.input, arguments.column), desc="tokenizing", unit=" documents", disable=None)
    try:
        counts = write_token_folder(documents, encode, vocabulary, arguments.output, arguments.tokenizer)
    except OSError as error:
        fail(f"--output {arguments.output}: {error.strerror}; choose a folder you can write to")
    print(f"{arguments.output}: {counts['train']:,} training tokens, {counts['validation']:,} for validation")
    print(f"use it with: --data.source tokens --data.path {arguments.output} --model.vocabulary {vocabulary}")


if __name__ == "__main__":
    main()
