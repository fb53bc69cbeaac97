"""Mistakes before the first collective: torch's own words for each, and those of this project's `join`.

    python collectives/debugging/joining.py --mistake port_in_use
    python collectives/debugging/joining.py --mistake wrong_interface

One process poses as one of several, so no launcher is needed. The script ends with exit code 2, as any script here
does when a user's mistake keeps it from joining.
"""

import datetime
import os
import socket
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from reporting import say

from common.config import parse
from common.ranks import join

PATIENCE_S = 2.0


@dataclass
class JoiningConfig:
    mistake: Literal["port_in_use", "rank_never_started", "nobody_listens", "wrong_interface", "half_set"] = (
        "port_in_use"
    )
    """What is wrong."""


def main(config: JoiningConfig) -> None:
    taken = socket.socket()  # kept open to the end where the mistake is a port in use
    taken.bind(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    if config.mistake == "port_in_use":
        taken.listen()
    else:
        taken.close()  # free again, a moment ago
    rank, size = {"nobody_listens": (1, 2), "wrong_interface": (0, 1)}.get(config.mistake, (0, 2))
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if config.mistake == "half_set":
        del variables["WORLD_SIZE"]
    if config.mistake == "wrong_interface":
        variables["GLOO_SOCKET_IFNAME"] = "nosuch0"
    os.environ.update({name: str(value) for name, value in variables.items()})

    try:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=PATIENCE_S))
    except (RuntimeError, ValueError) as error:
        say(rank, f"torch says: {type(error).__name__}: {error}")
    join("cpu", timeout_s=PATIENCE_S)


if __name__ == "__main__":
    main(parse(JoiningConfig))
