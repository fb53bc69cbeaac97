"""Interfaces, routes, the host name and ports."""

from __future__ import annotations  # so that an old Python gets as far as being told that it is too old

import contextlib
import os
import socket

from doctor_results import Result, count, ok, problem, warning


def interface_of(address: str) -> str:
    """The interface that has this address, or "?"."""
    import psutil

    have = psutil.net_if_addrs().items()
    return next((name for name, entries in have if any(e.address.split("%")[0] == address for e in entries)), "?")


def source_address(target: str) -> str:
    """The own address from which a packet to `target` would leave; nothing is sent. Raises OSError: no route."""
    family, _, _, _, where = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(where)
        return sock.getsockname()[0]


def check_network() -> list[Result]:
    """Interfaces, what the variables say of them, and what the host name resolves to."""
    import psutil

    from common.launching import network

    families = (socket.AF_INET, socket.AF_INET6)
    shown = []
    for name in network.interfaces():
        addresses = [a.address.split("%")[0] for a in psutil.net_if_addrs()[name] if a.family in families]
        shown.append(f"{name} {' '.join(a for a in addresses if not a.startswith('fe80'))}".strip())
    found = "; ".join(shown)
    with contextlib.suppress(OSError):
        found += f"; the way out is {interface_of(source_address('192.0.2.1'))}"  # of RFC 5737: nobody's address
    results = []
    try:
        network.check(os.environ)
    except ValueError as error:
        found, _, advice = str(error).rpartition("; ")
        results.append(problem("network", found, advice))
    if unknown := unknown_nccl_interfaces(os.environ.get("NCCL_SOCKET_IFNAME", ""), network.interfaces()):
        found = f"NCCL_SOCKET_IFNAME={os.environ['NCCL_SOCKET_IFNAME']}: no interface is called {unknown}"
        results.append(problem("network", found, f"expected one of {', '.join(network.interfaces())}; or unset it"))
    return (results or [ok("network", found)]) + judge_host_name(resolve(socket.gethostname()))


def unknown_nccl_interfaces(value: str, interfaces: list[str]) -> str:
    """Names in NCCL_SOCKET_IFNAME that match no interface: prefixes; after = whole names; after ^ what to avoid."""
    names = [] if value.startswith("^") else [name for name in value.lstrip("=").split(",") if name]
    exact = value.startswith("=")
    return ", ".join(n for n in names if not any(i == n if exact else i.startswith(n) for i in interfaces))


def resolve(host: str) -> list[str]:
    """Addresses of a host name; none where it does not resolve."""
    with contextlib.suppress(OSError):
        return sorted({entry[4][0] for entry in socket.getaddrinfo(host, None)})
    return []


def judge_host_name(addresses: list[str]) -> list[Result]:
    """Gloo listens on the address of the host name, and falls back to loopback: then other machines cannot reach it."""
    several = count(os.environ.get("SLURM_NNODES"), 1) > 1
    shown = " ".join(addresses) or "nothing"
    if any(not a.startswith(("127.", "::1")) for a in addresses):
        return [ok("host name", f"resolves to {shown}, which other machines can reach if they are in that network")]
    found = f"resolves to {shown}: other machines cannot be joined through it"
    advice = "set GLOO_SOCKET_IFNAME to the interface between the nodes, MASTER_ADDR to an address on it"
    if several and not os.environ.get("GLOO_SOCKET_IFNAME"):
        return [warning("host name", found, advice)]
    return [ok("host name", f"resolves to {shown}: enough on one machine; for several, {advice}")]


def check_ports() -> list[Result]:
    """A port can be had, and torchrun's default port is free."""
    with socket.socket() as sock:
        sock.bind(("", 0))
        sock.listen()
        given = sock.getsockname()[1]
    if os.environ.get("MASTER_PORT") == "29500":
        return [ok("ports", f"{given} could be bound; 29500 is the port of this very launch")]
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("", 29500))
            sock.listen()
        except OSError as error:
            advice = "torchrun --standalone on one machine; a --master-port of your own, or a job's, on several"
            return [warning("ports", f"torchrun's default port 29500 cannot be had: {error.strerror}", advice)]
    return [ok("ports", f"{given} could be bound; torchrun's default port 29500 is free")]


def route(address: str, port: int, host: str, here: str) -> Result:
    """From this host to the first rank of another one, which listens there: which interface, and does it answer?"""
    try:
        own = source_address(address)
        way = interface_of(own)
        with socket.create_connection((address, port), timeout=10):
            pass
    except OSError as error:
        found = f"{here} cannot reach {host} at {address}: {error.strerror or error}"
        return problem("routes", found, "open all ports between the nodes, in both directions")
    found = f"{here} reaches {host} at {address} over {way} ({own})"
    wanted = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if wanted and way not in wanted.split(","):
        found = f"{found}, but GLOO_SOCKET_IFNAME={wanted}"
        return warning("routes", found, "name the interface that leads there")
    return ok("routes", found)
