"""Print the environment of NCCL and Gloo that a network profile sets: what, by whom, and why.

    python slurm/network.py --profile infiniband --explain    # a table: every variable and its reason
    eval "$(python slurm/network.py --profile infiniband)"    # set it in this shell

The profiles are those of `common/launching/network.py`, which every script applies by itself.
"""

import argparse
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Mapping
from itertools import zip_longest

from common.launching import network
from common.launching.network import Variable

LEFT_ALONE = (  # what guides set, and no profile here does
    Variable("NCCL_SOCKET_IFNAME", "", "interfaces for TCP and NCCL's start-up: prefixes; ^ excludes, = is exact",
        "a fact of one site; by itself NCCL avoids lo and docker* and prefers ib*: naming one ends that"),
    Variable("NCCL_IB_HCA", "", "which InfiniBand adapters to use",
        "a fact of one site; with = in front, or mlx5_1 means mlx5_10 too"),
    Variable("NCCL_NET_GDR_LEVEL", "", "how far apart GPU and adapter may be for GPUDirect: LOC PIX PXB PHB SYS",
        "NCCL reads the topology; the numbers in old guides have changed their meaning between versions"),
    Variable("NCCL_IB_TIMEOUT", "", "how long an adapter waits for an acknowledgement: 4.096 µs × 2^value",
        "20 since NCCL 2.23, about 30 s with 7 retries; the 22 of old guides answered a default of 14"),
    Variable("NCCL_BUFFSIZE", "", "bytes of the buffer between two GPUs", "4194304, as guides set, is the default"),
    Variable("NCCL_ALGO", "", "Ring, Tree, …", "the best one depends on size and ranks: NCCL chooses each time"),
    Variable("NCCL_PROTO", "", "Simple, LL or LL128", "as NCCL_ALGO; EFA needed it up to aws-ofi-nccl 1.5 only"),
    Variable("FI_EFA_USE_DEVICE_RDMA", "", "1: EFA with RDMA", "not needed since libfabric 1.18, aws-ofi-nccl 1.7"),
    Variable("TORCH_NCCL_ASYNC_ERROR_HANDLING", "", "what happens to a process whose collective failed",
        "torch's default, 3, ends it; 1, as guides set, cleans up first, which can hang"),
    Variable("TORCH_DIST_USE_NCCL2", "", "0: torch's former NCCL backend in the place of nccl2",
        "nccl2 is what nccl means since torch 2.15; 0 for one run, to rule nccl2 out"),
    Variable("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "", "after how long without a heartbeat the watchdog ends the process",
        "the former backend's, as TORCH_NCCL_ENABLE_MONITORING is; nccl2 has no such monitor"),
    Variable("CUDA_DEVICE_MAX_CONNECTIONS", "", "hardware queues between CPU and GPU",
        "1 is for Megatron's tensor and sequence parallelism before Blackwell; FSDP overlaps worse with it"),
)  # fmt: skip
PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_DIST_", "TORCH_FR_", "TORCH_GLOO_", "FI_", "CUDA_DEVICE_MAX_")


def explain(profile: str, environment: Mapping[str, str] = os.environ, width: int = 160) -> str:
    """A table of `width` characters: the profile's variables, the user's, and those that nobody sets."""
    table = [("variable", "value", "set by", "what it does", "why here")]
    for v in network.rows(profile):
        name = next((n for n in (v.name, v.other_name) if n in environment), "")
        who = f"you ({profile}: {v.value})" if name else profile
        table.append((name or v.name, environment.get(name, v.value), who, v.what, v.why))
    known = {v.name: v for some in (*network.PROFILES.values(), LEFT_ALONE) for v in some}
    listed = {row[0] for row in table}
    for name in sorted(n for n in environment if n.startswith(PREFIXES) and n not in listed):
        v = known.get(name, Variable(name, "", "", "no profile knows it"))
        inert = (profile, name) == ("aws-efa", "NCCL_IB_DISABLE")
        why = "without effect here: EFA is driven by its plugin" if inert else f"not in {profile}: {v.why}"
        table.append((name, environment[name], "you", v.what, why))
    table += [(v.name, "", "nobody", v.what, v.why) for v in LEFT_ALONE if v.name not in environment]

    fixed = [max(len(row[i]) for row in table) for i in range(3)]
    rest = max(24, (width - sum(fixed) - 2 * 4) // 2)
    lines = []
    for row in table:
        cells = [[row[0]], [row[1]], [row[2]], textwrap.wrap(row[3], rest), textwrap.wrap(row[4], rest)]
        for line in zip_longest(*cells, fillvalue=""):
            columns = (text.ljust(size) for text, size in zip(line, [*fixed, rest, rest], strict=True))
            lines.append("  ".join(columns).rstrip())
    return "\n".join(lines)


def main() -> int:
    """The command line. Returns the exit status: 2, after one line on stderr, if the settings cannot work."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="default", help=f"the kind of network: {', '.join(network.PROFILES)}")
    parser.add_argument("--explain", action="store_true", help="print a table instead of export lines")
    options = parser.parse_args()
    try:
        if options.explain:
            print(explain(options.profile, width=shutil.get_terminal_size((160, 0)).columns))
        chosen = network.apply(options.profile)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not options.explain:
        print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in chosen.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
