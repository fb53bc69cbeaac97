"""The environment of NCCL and Gloo, by kind of network: what is set, by whom, and why.

    python slurm/network.py --profile infiniband --explain    # a table: every variable and its reason

NCCL looks at its machine and chooses; a list of variables copied from another cluster mostly takes that
choice away. So `default` sets diagnostics only, and a named profile adds only what NCCL cannot find out.
Names of interfaces and adapters are facts of one site: they belong in that cluster's own profile, not here.

What the variables do is taken from NCCL's user guide, the EFA page of aws-ofi-nccl (doc/efa-env-var.md),
Google Cloud's page on GPU networking, and PyTorch's nccl2/ProcessGroupNCCL.hpp and FlightRecorder.hpp (torch 2.15: its
backend "nccl" is nccl2).
"""

import difflib
import os
import socket
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Variable:
    """What a variable does, and why a profile sets it to `value`; without a value: why none does."""

    name: str
    value: str
    what: str
    why: str
    other_name: str = ""  # torch reads either; whoever has set one of the two has chosen


DIAGNOSTICS = (
    Variable("TORCH_FR_BUFFER_SIZE", "2000", "flight recorder: how many of its last collectives a rank remembers",
        "after a hang it names the collective and the missing rank; older releases of torch have it off",
        "TORCH_NCCL_TRACE_BUFFER_SIZE"),
    Variable("TORCH_NCCL_DUMP_ON_TIMEOUT", "1", "ranks write the flight recorder to files when a collective fails",
        "else it ends with the process; older releases of torch have it off", "TORCH_FR_DUMP_ON_TIMEOUT"),
    Variable("TORCH_FR_DUMP_TEMP_FILE", "RUNS_DIR/flight_recorder_rank", "those files' names, up to the rank's number",
        "torch's choice is below the home folder, which the nodes of some clusters do not have",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"),
    Variable("NCCL_DEBUG", "WARN", "NCCL prints its version, and the reason when one of its calls fails",
        "NCCL is silent by default; INFO prints pages a rank: for one debugging run, not for every run"),
)  # fmt: skip
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
NO_VERBS = "no InfiniBand or RoCE: TCP sockets between machines"
NET = "the transport between machines: this one, or an error"
THREADS = "CPU threads that serve each network connection, 1 to 16"
STREAMS = "TCP streams that each of those threads opens"
PROFILES: dict[str, tuple[Variable, ...]] = {
    "default": DIAGNOSTICS,
    "laptop": (*DIAGNOSTICS,
        Variable("GLOO_SOCKET_IFNAME", LOOPBACK, "the interface on which Gloo's ranks meet",
            "all ranks are on this machine; the host name's address, Gloo's own choice, can go with a VPN"),
    ),
    "ethernet": (*DIAGNOSTICS,
        Variable("NCCL_IB_DISABLE", "1", NO_VERBS,
            "else NCCL prefers any RDMA port that is up, connected or not; where RoCE works, take infiniband"),
        Variable("NCCL_SOCKET_NTHREADS", "4", THREADS,
            "the NCCL guide's value for 100 Gbit/s Ethernet, default 1; they compete with data loader workers"),
        Variable("NCCL_NSOCKS_PERTHREAD", "4", STREAMS,
            "the NCCL guide's value for 100 Gbit/s Ethernet, default 1; threads × streams may be 64 at most"),
    ),
    "infiniband": (*DIAGNOSTICS,
        Variable("NCCL_NET", "IB", NET,
            "else a missing driver, or a container without /dev/infiniband, means slow TCP and no word of it; "
            "where a plugin drives the fabric, set that plugin's name"),
    ),
    "aws-efa": (*DIAGNOSTICS,
        Variable("NCCL_NET", "Libfabric", NET,
            "else a missing aws-ofi-nccl plugin means slow TCP and no word of it; "
            "up to version 1.11 the plugin is called 'AWS Libfabric'"),
        Variable("FI_EFA_USE_HUGE_PAGE", "0", "EFA's buffers use no huge pages",
            "else forking data loader workers can fail (Cannot allocate memory) when the huge pages run out"),
    ),
    "gcp": (*DIAGNOSTICS,
        Variable("NCCL_IB_DISABLE", "1", NO_VERBS,
            "A2, G2, G4 and N1 machines have no RDMA; A3 and later need an NCCL plugin, with its settings"),
        Variable("NCCL_SOCKET_NTHREADS", "4", THREADS,
            "what NCCL itself chooses on Google's gVNIC; said here so that VirtIO cards get it too"),
        Variable("NCCL_NSOCKS_PERTHREAD", "2", STREAMS,
            "one TCP stream may not fill the link; 4 × 2 = 8 streams, of 64 at most"),
    ),
}  # fmt: skip


def rows(profile: str) -> tuple[Variable, ...]:
    """The variables of a profile. Raises ValueError, with the nearest name, when no profile has that name."""
    if profile not in PROFILES:
        near = difflib.get_close_matches(profile.lower().replace("_", "-"), PROFILES, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"no network profile is called {profile!r}; expected {', '.join(PROFILES)}{hint}")
    return PROFILES[profile]


def apply(profile: str = "default", environment: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """Set the profile's variables that the user has not set, and return them (name to value).

    Call it before the process group exists: NCCL and Gloo read their environment once, when it is made.
    Raises ValueError, with nothing set, when the profile is unknown or the result cannot work (see `check`).
    """
    runs = os.path.abspath(environment.get("RUNS_DIR") or "runs")
    values = {v.name: v.value.replace("RUNS_DIR", runs) for v in rows(profile)}
    missing = {v.name: values[v.name] for v in rows(profile) if not {v.name, v.other_name} & environment.keys()}
    check({**environment, **missing})
    environment.update(missing)
    return missing


def check(environment: Mapping[str, str]) -> None:
    """Raise ValueError, a message of one line, for settings that cannot work on this machine."""
    names = environment.get("GLOO_SOCKET_IFNAME", "")
    for name in filter(None, names.split(",")):
        if name not in interfaces():
            syntax = " (^ and = are syntax of NCCL_SOCKET_IFNAME, not of Gloo)" if name[0] in "^=" else ""
            raise ValueError(
                f"GLOO_SOCKET_IFNAME={names}: host {socket.gethostname()} has no interface {name!r} with an "
                f"address{syntax}; expected names out of {', '.join(interfaces())}; correct or unset it"
            )
    disabled = environment.get("NCCL_IB_DISABLE", "")
    if disabled not in ("", "0", "1"):
        raise ValueError(f"NCCL_IB_DISABLE={disabled!r}; NCCL expects 0 or 1, no words; set one or unset it")
    if disabled == "1" and environment.get("NCCL_NET", "").upper() == "IB":
        raise ValueError(
            "NCCL_NET=IB demands InfiniBand and NCCL_IB_DISABLE=1 forbids it, so no communicator can start; "
            "unset NCCL_IB_DISABLE, or choose another network profile than infiniband"
        )
    threads, streams = (environment.get(v, "") for v in ("NCCL_SOCKET_NTHREADS", "NCCL_NSOCKS_PERTHREAD"))
    if threads.isdigit() and streams.isdigit() and (sockets := int(threads) * int(streams)) > 64:
        raise ValueError(
            f"NCCL_SOCKET_NTHREADS={threads} × NCCL_NSOCKS_PERTHREAD={streams} is {sockets} sockets for one "
            "connection; NCCL allows 64; lower one of the two"
        )


def interfaces() -> list[str]:
    """The network interfaces of this machine that have an IP address: those that Gloo can use."""
    families = (socket.AF_INET, socket.AF_INET6)
    return [name for name, have in psutil.net_if_addrs().items() if any(a.family in families for a in have)]
