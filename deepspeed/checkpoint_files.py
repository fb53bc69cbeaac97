"""Files of DeepSpeed's own checkpoints: which there are, and whether it is safe to read them.

DeepSpeed's shards are pickles, which may run code when they are read: a file that asks for more than what DeepSpeed
itself writes is refused, and torch is told to read the others without trust.
"""

import hashlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from common.ranks import fail

# All that DeepSpeed's checkpoints of a dense model name beside tensors, numbers and plain containers.
WRITTEN_BY_DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum", "deepspeed.utils.tensor_fragment.fragment_address",
}  # fmt: skip


def fingerprint(weights: Iterator[tuple[str, torch.Tensor]]) -> str:
    """A checksum over all bits of the weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def newest(run_folder: Path) -> str:
    """The name of the checkpoint that `latest` points to. SystemExit: there is none."""
    latest = run_folder / "checkpoints" / "latest"
    if not latest.is_file():
        fail(f"{latest} does not exist; expected the name of a checkpoint in it; was save interrupted?")
    tag = latest.read_text().strip()
    if Path(tag).name != tag or not (latest.parent / tag).is_dir():
        fail(f"{latest} names {tag!r}, but {latest.parent / tag} does not exist; fetch that folder, or save again")
    return tag


def shards_of(run_folder: Path) -> Path:
    """The folder of the newest checkpoint's shards. SystemExit: one is missing, damaged, or asks to run code."""
    source = run_folder / "checkpoints" / newest(run_folder)
    shards = {int(path.name.split("pp_rank_")[1].split("_")[0]) for path in source.glob("*pp_rank_*_optim_states.pt")}
    if not shards:
        fail(
            f"{source} is no ZeRO checkpoint: no *_optim_states.pt in it; expected one a rank; save with stage 1, 2, 3"
        )
    if missing := sorted(set(range(max(shards) + 1)) - shards):
        fail(
            f"{source}: the optimizer shard of rank {missing[0]} is missing; found those of {sorted(shards)}; fetch it"
        )
    refuse_foreign_pickles(source)
    return source


def refuse_foreign_pickles(folder: Path) -> None:
    """End with one line if a file names a function or class that DeepSpeed's own checkpoints do not have, or is a link.

    torch lists such names without calling anything. DeepSpeed itself loads with `weights_only=False`: whatever a file
    names is imported and called. So, from here on, torch overrules that in this process: it reads tensors, numbers,
    containers and the classes of WRITTEN_BY_DEEPSPEED, and nothing else.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    known = (name.rpartition(".") for name in WRITTEN_BY_DEEPSPEED)
    torch.serialization.add_safe_globals([getattr(importlib.import_module(module), name) for module, _, name in known])
    if links := sorted(path for path in (folder, *folder.rglob("*")) if path.is_symlink()):
        fail(f"{links[0]} is a link; expected the file itself; not read")
    for path in sorted(folder.rglob("*.pt")):
        try:
            found = set(get_unsafe_globals_in_checkpoint(path))
        except Exception as error:  # whatever a damaged file may cause
            fail(f"{path} is no whole file of torch.save ({type(error).__name__}); expected a shard; fetch it again")
        if foreign := sorted(found - WRITTEN_BY_DEEPSPEED):
            fail(f"{path} asks for {', '.join(foreign[:3])} when it is read; DeepSpeed does not write that; not read")
