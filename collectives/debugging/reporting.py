"""How the programs of this folder end: every rank says what it was told, and none waits for the others."""

import datetime
import os
import sys
import time
from collections.abc import Callable

import torch.distributed as dist


def impatient_group(seconds: float) -> dist.ProcessGroup:
    """All ranks, with this timeout for each collective; joining may take longer, on a busy machine by some seconds."""
    dist.barrier()  # connections are made with the first collective
    return dist.new_group(timeout=datetime.timedelta(seconds=seconds))


def say(who: object, text: str) -> None:
    """Print one line, in one piece: several processes write to one terminal."""
    sys.stdout.write(f"[rank {who}] {' '.join(text.split())}\n")
    sys.stdout.flush()


def attempt(rank: int, action: Callable[[], object]) -> None:
    """Run `action`; if it raises what torch.distributed raises, print that and end this process with exit code 1."""
    try:
        action()
    except RuntimeError as error:  # DistBackendError and its like are RuntimeErrors
        say(rank, f"{type(error).__name__}: {error}")
        time.sleep(2)  # torchrun stops all ranks as soon as one has ended: let the others speak first
        os._exit(1)  # connections are broken now, and an orderly end would wait for them
