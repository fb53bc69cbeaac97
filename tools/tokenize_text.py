"""Make a token folder, for `--data.source tokens`, from text or from a Hugging Face data set.

    python tools/tokenize_text.py --input book.txt --tokenizer bytes --output data/book

The folder holds train.bin, validation.bin and meta.json; `common/data.py` reads it.
"""

import json
import os
import shutil
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.config_fields import to_path
from common.ranks import fail
from common.runs.manifest import sync_folder

FILES = ("meta.json", "train.bin", "validation.bin")


def read_documents(inputs: list[str], column: str) -> Iterator[str]:
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
            dataset = datasets.load_from_disk(name) if path.is_dir() else datasets.load_dataset(name, split="train")
            rows = dataset["train"] if isinstance(dataset, dict) else dataset
            if column not in rows.column_names:
                fail(
                    f"--input {name}: no column {column!r}; it has {', '.join(rows.column_names)}: choose with --column"
                )
        except (OSError, ValueError) as error:
            fail(f"--input {name}: neither a text file nor a Hugging Face data set: {error}")
        yield from (row[column] for row in rows)


def write_token_folder(
    texts: Iterable[str], encode: Callable[[str], list[int]], vocabulary: int, folder: Path, name: str
) -> dict[str, int]:
    """Tokenize documents into a folder, and return the number of tokens in each part.

    Every tenth document goes to validation.bin (of fewer than ten documents the last tenth), the others to train.bin.
    All is written beside the folder, and takes its name at the end: trainings that read the old one go on with it, and
    a command that breaks off changes nothing.

    Raises:
        OSError: it cannot be written.
        SystemExit: (exit code 2) the texts have too few tokens, or one that is not in the vocabulary.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint8 if vocabulary <= 2**8 else np.uint16 if vocabulary <= 2**16 else np.uint32)
    new, old = (folder.with_name(f".{folder.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    new.mkdir()
    try:
        counts, documents, largest = {"train": 0, "validation": 0}, 0, -1
        with open(new / "train.bin", "wb") as train, open(new / "validation.bin", "wb") as validation:
            for documents, text in enumerate(texts, start=1):
                split, file = ("validation", validation) if documents % 10 == 0 else ("train", train)
                ids = np.asarray(encode(text), dtype=np.int64)
                largest = max(largest, ids.max(initial=-1))
                file.write(ids.astype(dtype).tobytes())
                counts[split] += len(ids)
        if documents and not counts["validation"]:
            tokens = np.fromfile(new / "train.bin", dtype=dtype)
            cut = len(tokens) * 9 // 10
            tokens[:cut].tofile(new / "train.bin")
            tokens[cut:].tofile(new / "validation.bin")
            counts = {"train": cut, "validation": len(tokens) - cut}
        if not all(counts.values()):
            found = f"gives {counts['train']} training tokens and {counts['validation']} for validation"
            fail(f"the input (documents: {documents}) {found}; expected some of each; give more text")
        if largest >= vocabulary:
            fail(f"tokenizer {name} gives token {largest}, but has a vocabulary of {vocabulary}; use another tokenizer")
        meta = {"dtype": dtype.name, "vocabulary": vocabulary, "tokens": counts, "tokenizer": name}
        (new / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        for file_name in FILES:
            with open(new / file_name, "rb") as written:
                os.fsync(written.fileno())
        if folder.exists():
            folder.replace(old)
        new.replace(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return counts


def refuse_to_replace(folder: Path, overwrite: bool) -> None:
    """End with one line if something is there already, unless it is a token folder that is to be replaced."""
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if there and not overwrite:
        fail(f"--output {folder} exists already; choose another folder, or replace it with --overwrite")
    if others := [name for name in there if name not in FILES]:
        fail(f"--output {folder} holds {others[0]}, which no token folder has; choose another folder")


def main() -> None:
    """Make a token folder from text or from a Hugging Face data set."""
    parser = ArgumentParser(description=main.__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="text files, or Hugging Face data sets")
    parser.add_argument("--column", default="text", help="column of the data set that holds the text")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, or a Hugging Face tokenizer (folder or name)")
    parser.add_argument("--output", required=True, type=to_path, help=f"folder for {', '.join(FILES)}")
    parser.add_argument("--overwrite", action="store_true", help="replace the token folder that is there")
    arguments = parser.parse_args()
    refuse_to_replace(arguments.output, arguments.overwrite)

    if arguments.tokenizer == "bytes":
        encode, vocabulary = (lambda text: list(text.encode())), 256
    else:
        try:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer, trust_remote_code=False)
        except ImportError:
            fail("a Hugging Face tokenizer needs the package transformers: pip install transformers")
        except (OSError, ValueError) as error:
            fail(f"--tokenizer {arguments.tokenizer}: {str(error).splitlines()[0]}")
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        encode, vocabulary = ((lambda text: tokenizer.encode(text, add_special_tokens=False) + end), len(tokenizer))
    documents = tqdm(
        read_documents(arguments.input, arguments.column), desc="tokenizing", unit=" documents", disable=None
    )
    try:
        counts = write_token_folder(documents, encode, vocabulary, arguments.output, arguments.tokenizer)
    except OSError as error:
        fail(f"--output {arguments.output}: {error.strerror}; choose a folder you can write to")
    print(f"{arguments.output}: {counts['train']:,} training tokens, {counts['validation']:,} for validation")
    print(f"use it with: --data.source tokens --data.path {arguments.output} --model.vocabulary {vocabulary}")


if __name__ == "__main__":
    main()
