"""The text: an embedded corpus that needs no download, a text file, or a folder of tokens.

The embedded corpus is the source code of Python's own standard library, as bytes. `tools/tokenize_text.py` makes a
folder of tokens from any text.
"""

import hashlib
import os
import shlex
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from common.config_fields import PathText
from common.launching import same_start
from common.ranks import fail
from common.strict_files import read_json


@dataclass
class TextConfig:
    """Which text, in pieces of which length."""

    source: Literal["text", "tokens"] = "text"
    """text: the embedded corpus as bytes, or a UTF-8 file; tokens: a folder made by python tools/tokenize_text.py."""
    path: PathText | None = None
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
            raise ValueError("data.source = tokens needs data.path, a folder made by python tools/tokenize_text.py")


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
    validation_set = TokenDataset(validation, length, needed, config.validation_samples)
    same_start.note({"data for validation": validation_set.fingerprint()})
    return TokenDataset(train, length, needed), validation_set


def _open_token_folder(folder: Path) -> tuple[np.ndarray, np.ndarray, int]:
    missing = [name for name in ("meta.json", "train.bin", "validation.bin") if not (folder / name).is_file()]
    if missing:
        fail(
            f"data.path = {folder}: no {', '.join(missing)} there (of meta.json, train.bin, validation.bin); make "
            f"them with: python tools/tokenize_text.py --input TEXT --output {shlex.quote(str(folder))}"
        )
    splits = ("train", "validation")
    try:
        meta = read_json(folder / "meta.json")
        dtype, counts, vocabulary = np.dtype(meta["dtype"]), meta["tokens"], int(meta["vocabulary"])
        if dtype.kind not in "ui" or vocabulary < 1:
            raise ValueError(f"dtype {dtype}, vocabulary {vocabulary}")
        for split in splits:
            if not counts[split]:
                fail(f"{folder}/{split}.bin has no tokens; make it again, of more text")
            size = (folder / f"{split}.bin").stat().st_size
            if size != counts[split] * dtype.itemsize:
                fail(f"{folder}/{split}.bin has {size} bytes, meta.json says {counts[split]} {dtype}; make it again")
    except (KeyError, TypeError, ValueError) as error:
        fail(f"{folder}/meta.json is not what python tools/tokenize_text.py writes ({error!r}); make it again")
    train, validation = (np.memmap(folder / f"{split}.bin", dtype=dtype, mode="r") for split in splits)
    for split, tokens in zip(splits, (train, validation), strict=True):
        least, largest = _extremes(tokens)
        if least < 0 or largest >= vocabulary:
            found = f"token {least if least < 0 else largest}, meta.json says a vocabulary of {vocabulary}"
            fail(f"{folder}/{split}.bin has {found}; make it again with the tokenizer of the model")
    return train, validation, vocabulary


def _extremes(tokens: np.ndarray) -> tuple[int, int]:
    """The least and the largest token; of more than 2^27 those of 256 pieces of it, evenly spread."""
    piece = len(tokens) if len(tokens) < 2**27 else 2**16
    starts = np.linspace(0, len(tokens) - piece, num=1 if piece == len(tokens) else 256, dtype=np.int64)
    pieces = [tokens[start : start + piece] for start in starts]
    return int(min(part.min() for part in pieces)), int(max(part.max() for part in pieces))
