"""The options of bandwidth.py."""

import difflib
import math
import re
from dataclasses import dataclass
from typing import Literal

from bandwidth_operations import RUN

from common.config_fields import PathText

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclass
class BandwidthConfig:
    """What to measure."""

    collective: str = "all"
    """all, or some of all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, reduce, send_recv, with commas."""
    sizes: str = "auto"
    """Message sizes in bytes, with commas; K, M and G are powers of 1024. auto: 4K to 16M on CPUs, to 1G on GPUs."""
    dtype: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """The type of the numbers that are sent."""
    warmup: int = 3
    """Operations before the clock runs: buffers and connections are made then."""
    repeats: int = 10
    """How often each is timed."""
    within_nodes: bool = False
    """On several nodes, measure besides the whole also one group a node, all nodes at the same time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: every GPU if there is one, else the CPU."""
    network_profile: str = "default"
    """Which NCCL and Gloo variables to set; see python slurm/network.py --explain."""
    json: PathText | None = None
    """Write all results to this file."""
    plot: PathText | None = None
    """Draw time and bandwidth over size into this PNG."""
    minimum_gbytes_per_second: float | None = None
    """Exit code 3 when the bus bandwidth of the one collective at the largest size, over all ranks, is below."""

    def __post_init__(self) -> None:
        for name in self.collectives:
            if name not in RUN:
                near = difflib.get_close_matches(name, RUN, 1, 0.5)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ValueError(
                    f"collective = {name!r} is none that this tool knows; {hint}allowed: all, {', '.join(RUN)}"
                )
        if not self.bytes_by_device("cpu"):
            raise ValueError(f"sizes = {self.sizes!r} cannot work; allowed: auto, or bytes above 0 such as 4K,64K,16M")
        if self.warmup < 1 or self.repeats < 1:
            raise ValueError(f"warmup = {self.warmup} and repeats = {self.repeats} must be at least 1")
        minimum = self.minimum_gbytes_per_second
        if minimum is not None and not (0 <= minimum < math.inf and len(self.collectives) == 1):
            raise ValueError(
                f"minimum_gbytes_per_second = {minimum:g} with collective = {self.collective} cannot work; allowed: "
                f"0 or more, for one collective; add --collective all_reduce"
            )

    @property
    def collectives(self) -> list[str]:
        """The names, each once."""
        return (
            list(RUN) if self.collective == "all" else list(dict.fromkeys(self.collective.replace(" ", "").split(",")))
        )

    def bytes_by_device(self, device: str) -> list[int]:
        """The sizes, small ones first; none where the text makes no sense."""
        text = self.sizes
        if text == "auto":
            text = "4K,64K,1M,16M" + (",256M,1G" if device == "cuda" else "")
        words = [re.fullmatch(r"(\d+)([KMG]?)(i?B)?", word.strip(), re.IGNORECASE) for word in text.split(",")]
        sizes = {int(word[1]) * UNITS[word[2].upper()] if word else 0 for word in words}
        return [] if 0 in sizes else sorted(sizes)
