"""DeepSpeed's own checkpoints: shards to one safetensors file, and to a form that another number of ranks can load.

    torchrun --nproc-per-node=2 deepspeed/own_checkpoint.py save --output runs/zero --stage 3       # three steps
    python deepspeed/convert_checkpoint.py convert runs/zero --output runs/zero/model               # for transformers
    python deepspeed/convert_checkpoint.py universal runs/zero                                      # for any ranks

Both commands print a fingerprint of the fp32 weights: it is that which `save` printed.
"""

import argparse
import contextlib
import io
import pickle
import shutil
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from checkpoint_files import fingerprint, shards_of
from own_checkpoint import settings_of

# isort: split
# after own_checkpoint.py, which chooses the accelerator
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from common.config_fields import to_path
from common.hf_weights import save_hugging_face
from common.ranks import fail, single_process
from common.transformer import Transformer


def convert(run_folder: Path, output: Path) -> None:
    """Put the shards together: model.safetensors and config.json under Hugging Face's names, checked."""
    config, ranks = settings_of(run_folder), single_process("cpu")
    source = shards_of(run_folder)
    start = time.perf_counter()
    try:
        with quiet():
            weights = get_fp32_state_dict_from_zero_checkpoint(str(source.parent), tag=source.name)
    except (ValueError, RuntimeError, KeyError, FileNotFoundError, pickle.UnpicklingError, EOFError) as error:
        fail(f"{source} cannot be put together: {error}; expected all shards of one save, whole; save it again")
    model = Transformer(config.model, seed=None)
    model.load_state_dict(weights)
    merged = time.perf_counter()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent) as folder:  # whole, or not there
            save_hugging_face(model, folder)
            output.mkdir(exist_ok=True)
            for name in ("config.json", "model.safetensors"):
                (Path(folder) / name).replace(output / name)
    except OSError as error:
        fail(f"--output {output}: {error.strerror}; choose a folder where you can write")
    written, size = time.perf_counter(), (output / "model.safetensors").stat().st_size
    print(f"{source}: put together in {merged - start:.3f} s, written in {written - merged:.3f} s")
    print(f"{output / 'model.safetensors'}: {size:,} bytes, {len(weights)} tensors; config.json beside it")
    print(f"weights {fingerprint(iter(sorted(weights.items())))}")

    difference, largest = compare_with_transformers(model, output, config.seed)
    print(f"transformers loads them: logits up to {largest:.4f}, largest difference to this model {difference:.1e}")
    ranks.leave()
    if difference > 1e-5 * max(1.0, largest):  # fp32: sums of some hundred terms in another order
        raise SystemExit(f"error: transformers computes something else from {output}")


@torch.no_grad()
def compare_with_transformers(model: Transformer, folder: Path, seed: int) -> tuple[float, float]:
    """Largest difference of the logits, and the largest logit, on random tokens."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    length = min(32, model.config.max_sequence)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.vocabulary, (2, length), generator=generator)
    ours = model(tokens)
    return (theirs(tokens).logits - ours).abs().max().item(), ours.abs().max().item()


def universal(run_folder: Path) -> None:
    """Cut the shards up by parameter: a folder for each, which any number of ranks can load."""
    settings_of(run_folder)
    single_process("cpu")
    source = shards_of(run_folder)
    target = source.with_name(f"{source.name}_universal")
    if target.exists():
        resume = f"own_checkpoint.py resume {run_folder}"
        fail(f"{target} exists already; expected to make it; remove it, or go on with: {resume}")
    unfinished = target.with_name(f"{target.name}.unfinished")  # whole, or not there
    shutil.rmtree(unfinished, ignore_errors=True)  # of a conversion that was killed
    start = time.perf_counter()
    options = Namespace(
        input_folder=str(source), output_folder=str(unfinished), num_extract_workers=1, num_merge_workers=1,
        keep_temp_folder=False, strict=True, inject_missing_state=False,
    )  # fmt: skip
    try:
        with quiet():
            ds_to_universal.main(options)
        unfinished.replace(target)
        target.with_name("latest_universal").write_text(target.name)  # DeepSpeed wrote the other name there
    except (ValueError, RuntimeError, KeyError, AssertionError, OSError, EOFError, pickle.UnpicklingError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        fail(f"{source} cannot be converted: {error}; expected all shards of one save, whole; save it again")
    seconds = time.perf_counter() - start
    names = sorted(path.name for path in (target / "zero").iterdir() if path.is_dir())
    weights = ((name, torch.load(target / "zero" / name / "fp32.pt", weights_only=True)) for name in names)
    whole = ((name, entry["param"] if isinstance(entry, dict) else entry) for name, entry in weights)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target}: {len(names)} parameters, {size:,} bytes, made in {seconds:.3f} s; weights {fingerprint(whole)}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the lines that DeepSpeed prints while it converts, and torch's warnings about its use of torch."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    parser = argparse.ArgumentParser(prog="deepspeed/convert_checkpoint.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    of = {}
    for function in (convert, universal):
        of[function] = commands.add_parser(function.__name__, help=function.__doc__)
        of[function].add_argument(
            "run_folder", type=to_path, help="a folder written by save: config.yaml, checkpoints/"
        )
    of[convert].add_argument("--output", type=to_path, required=True, help="the folder to write")
    given = vars(parser.parse_args())
    return {"convert": convert, "universal": universal}[given.pop("command")](**given)


if __name__ == "__main__":
    main()
