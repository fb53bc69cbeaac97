"""Make a token folder, for `--data.source tokens`, from text or from a Hugging Face data set.

    python tools/tokenize_text.py --input book.txt --tokenizer bytes --output data/book

The folder holds train.bin, validation.bin and meta.json; `common/data.py` reads it.
"""

import json
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.config_fields import to_path
from common.ranks import fail


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
    meta.json is written last, so that the reader notices a command that was interrupted.
    """
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


def main() -> None:
    """Make a token folder from text or from a Hugging Face data set."""
    parser = ArgumentParser(description=main.__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="text files, or Hugging Face data sets")
    parser.add_argument("--column", default="text", help="column of the data set that holds the text")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, or a Hugging Face tokenizer (folder or name)")
    parser.add_argument("--output", required=True, type=to_path, help="folder for train.bin, validation.bin, meta.json")
    arguments = parser.parse_args()

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
