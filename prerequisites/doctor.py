"""Is this machine, this environment, this set of nodes ready for the lessons? One line a check, and what to do.

    python prerequisites/doctor.py                                   # here: a few seconds, `0 problems` at the end
    torchrun --nproc-per-node=2 prerequisites/doctor.py              # two ranks meet and compare themselves
    srun --nodes=4 --ntasks-per-node=1 python prerequisites/doctor.py     # and so do the nodes of a cluster

`ok`: as it should be. `warning`: it works, but slowly, or not everywhere. `problem`: something will fail. Exit code 0
without problems, 1 with, 2 for wrong usage and when the ranks do not find each other; the same on all ranks that met.
What concerns one machine alone is examined in `doctor_checks.py`; the network and the ranks here.
"""

from __future__ import annotations  # so that an old Python gets as far as being told that it is too old

import argparse
import contextlib
import datetime
import io
import json
import os
import platform
import re
import socket
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # `common`, even where it is not installed; never first

import doctor_checks as checks
from doctor_checks import Result, ok, output, problem, warning

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
COMPARED = ("NCCL_", "GLOO_", "TORCH_", "CUDA_", "OMP_")  # variables that ranks should agree on
MUST_AGREE = ("torch", "CUDA of torch", "NCCL")  # another wire format, or another collective algorithm: hangs
MAY_DIFFER = ("CUDA_VISIBLE_DEVICES",)  # Slurm may show every task a GPU of its own
OLD = sys.version_info < (3, 11)
GATHER_MINUTES = 15  # the slowest node's file system decides how long the others wait


def checks_of_rank(sharing: int | None = None) -> list[tuple]:
    """(name, function) of what may differ from process to process. `sharing`: ranks on the same cores, if known."""
    cores = partial(checks.check_cores, sharing)
    return [("python", checks.check_python), ("cores", cores), ("limits", checks.check_limits)]


def checks_of_host(options: argparse.Namespace) -> list[tuple]:
    """(name, function) of what one process examines for all on its machine."""
    return [
        ("packages", checks.check_packages),
        ("imports", checks.check_imports),
        ("shadows", checks.check_shadows),
        ("torch", checks.check_torch),
        ("network", check_network),
        ("ports", check_ports),
        ("shared memory", checks.check_shared_memory),
        ("memory", checks.check_memory),
        ("folders", partial(checks.check_folders, options.runs, options.data)),
        ("slurm", checks.check_slurm),
        ("tokens", checks.check_tokens),
    ]


def examine(some: list[tuple]) -> list[Result]:
    """Run checks; one that crashes becomes a problem with its name, and the others go on."""
    results = []
    for name, function in some:
        try:
            results += function()
        except ModuleNotFoundError as error:
            results.append(problem(name, f"cannot be checked without the package {error.name}", "make venv"))
        except Exception as error:
            found = f"this check crashed: {type(error).__name__}: {' '.join(str(error).split())}"
            results.append(problem(name, found, "report it, with the output of doctor.py --json"))
    return results


# ---------------------------------------------------------------------------------------------------------- network


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

    from common import network

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
    several = checks.count(os.environ.get("SLURM_NNODES"), 1) > 1
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


# ------------------------------------------------------------------------------------------------- ranks together


def facts(environment: dict[str, str]) -> dict[str, str]:
    """What all ranks should have alike, by name. `environment`: as the launcher left it. Imports torch."""
    import torch

    found = {name: checks.installed(name) or "missing" for name in checks.MODULES}
    found |= {"torch": torch.__version__, "CUDA of torch": str(torch.version.cuda)}
    found |= {"Python": platform.python_version(), "environment": sys.prefix, "kernel": platform.release()}
    found |= {"architecture": platform.machine(), "cores": str(checks.cores()[0])}
    code, commit = output(["git", "-C", str(checks.ROOT), "rev-parse", "--short=10", "HEAD"])
    found["commit"] = "unknown" if code else commit
    with contextlib.suppress(ImportError):
        import psutil

        found["memory, GiB"] = f"{psutil.virtual_memory().total / checks.GIB:.0f}"
    if about := checks.read(Path("/proc/driver/nvidia/version")):
        found["driver"] = (re.search(r"\s(\d+\.[\d.]+)\s", about) or ["", "unknown"])[1]
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["GPUs"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    variables = {name: value for name, value in environment.items() if name.startswith(COMPARED) or name == "DEVICE"}
    return found | variables


def compare(of_ranks: list[dict[str, str]]) -> tuple[dict[str, str], dict[str, dict[str, list[int]]]]:
    """(facts that all ranks share, for every other one: value → the ranks that have it)."""
    shared, different = {}, {}
    for name in sorted({name for one in of_ranks for name in one}):
        values: dict[str, list[int]] = {}
        for rank, one in enumerate(of_ranks):
            values.setdefault(one.get(name, "not set"), []).append(rank)
        if len(values) == 1:
            shared[name] = next(iter(values))
        else:
            different[name] = values
    return shared, different


def judge_difference(name: str, values: dict[str, list[int]]) -> Result:
    """A difference between ranks as a result."""
    found = f"{name}: " + ", ".join(
        f"{value or '(empty)'} ({number('rank', ranks)})" for value, ranks in values.items()
    )
    if name in MAY_DIFFER:
        return ok("difference", found)
    advice = "let all ranks use the same environment and the same settings"
    return (problem if name in MUST_AGREE else warning)("difference", found, advice)


def number(what: str, these: list) -> str:
    """`rank 2`, `ranks 0, 1`."""
    return f"{what}{'s' * (len(these) != 1)} {', '.join(map(str, these))}"


def all_reduce(rank: int, size: int, device: str, group=None) -> Result:
    """Sum one million numbers over the ranks, twice, and compare with the sum that arithmetic gives."""
    import torch
    import torch.distributed as dist

    name = f"all-reduce, {'NCCL' if device.startswith('cuda') else 'Gloo'}"
    places = torch.arange(2**20, dtype=torch.int64, device=device)
    expected = places * size + size * (size - 1) // 2  # rank r gives places + r
    for _ in range(2):  # the first also opens the connections
        start = time.perf_counter()
        values = places + rank
        dist.all_reduce(values, group=group)
        wrong = int((values != expected).sum())  # on a GPU this waits for the sum
        seconds = time.perf_counter() - start
    if wrong:
        found = f"{wrong:,} of {len(values):,} sums are wrong on rank {rank}"
        return problem(name, found, "trust no training here: examine network, driver and memory")
    if rank:
        return ok(name, "")  # rank 0 speaks for those that agree
    return ok(name, f"{size} ranks summed 8 MiB exactly, in {seconds * 1e3:.1f} ms")


def device_of_rank(ranks, place) -> tuple[str, list[Result]]:
    """("cuda:0", "cpu" or "", results): the device that the lessons would choose, by the lessons' own rules."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            device = str(ranks.choose_device("auto", place))
    except SystemExit:
        found, _, advice = said.getvalue().strip().partition("error: ")[2].rpartition("; ")
        return "", [problem("device", found, advice)]
    return device, [ok("device", device)]


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


def meet(me, hosts: list[str], master: str) -> list[Result]:
    """Every pair of hosts connects, first rank to first rank. All ranks call it; `master`: where rank 0 listens."""
    here, first = hosts[me.rank], hosts.index(hosts[me.rank]) == me.rank
    results = []
    with socket.create_server(("", 0), backlog=len(hosts)) as listener:
        mine = None
        if first:
            try:
                mine = (source_address(master), listener.getsockname()[1])
            except OSError as error:
                advice = "look at the line on network; MASTER_ADDR must be an address that all nodes reach"
                results.append(problem("routes", f"{here} has no route to {master}: {error.strerror or error}", advice))
        addresses = {host: there for host, there in zip(hosts, me.all_gather(mine), strict=True) if there}
        others = [(*there, host, here) for host, there in addresses.items() if host != here] if first else []
        with ThreadPoolExecutor(32) as pool:  # else a few silent hosts would use up the time that the others wait
            results += pool.map(lambda other: route(*other), others)
        me.barrier()  # all have called before anyone stops listening
    return results


def shared_folder(me, hosts: list[str], runs: Path) -> list[Result]:
    """Is the run folder the same one on all hosts? Rank 0 puts a file there, the others look for it."""
    mark = ""
    if me.is_main:
        place = checks.existing(runs)
        mark = str(place / f".doctor-{os.getpid()}-{time.time_ns()}")
        with contextlib.suppress(OSError):  # the check of the folder says why
            Path(mark).touch()
    mark = me.broadcast(mark)
    deadline = time.monotonic() + 10  # network file systems remember for seconds what was not there
    while not (seen := os.path.exists(mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    blind = sorted({host for host, sees in zip(hosts, me.all_gather(seen), strict=True) if not sees})
    if me.is_main:
        Path(mark).unlink(missing_ok=True)
        if blind:
            found = f"what rank 0 writes to {Path(mark).parent} is not seen on {', '.join(blind)}"
            return [problem("shared folder", found, "put runs (RUNS_DIR) on a file system that all nodes mount")]
        return [ok("shared folder", f"{Path(mark).parent} is the same on all {len(set(hosts))} hosts")]
    return []


def together(options: argparse.Namespace, ranks) -> int:
    """All ranks of a launcher examine themselves; rank 0 prints. Returns the exit code, equal on all ranks."""
    import torch.distributed as dist

    environment, place = dict(os.environ), ranks.read_environment()
    me = ranks.join("cpu", options.timeout, compare=False)  # differences are shown below, all of them
    os.environ["LOCAL_WORLD_SIZE"] = str(me.local_world_size)  # only torchrun says it
    try:
        patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=GATHER_MINUTES))
        hosts = me.all_gather(socket.gethostname())
        results = [all_reduce(me.rank, me.world_size, "cpu")]
        if len(set(hosts)) > 1:
            results += meet(me, hosts, os.environ["MASTER_ADDR"]) + shared_folder(me, hosts, options.runs)
        device, found = device_of_rank(ranks, place)
        my_cores = (hosts[me.rank], checks.affinity())  # srun may give each task cores of its own
        results += found + examine(checks_of_rank(me.all_gather(my_cores).count(my_cores)))
        if hosts.index(hosts[me.rank]) == me.rank:
            results += examine(checks_of_host(options))
        reports: list = [None] * me.world_size
        dist.all_gather_object(reports, (results, facts(environment), device), group=patient)
        if all(device.startswith("cuda") for _, _, device in reports):
            reports = over_nccl(me, device, options, hosts, reports, patient)
        code = finish(options, me, hosts, reports)
        me.leave()
    except RuntimeError as error:
        ranks.fail(f"rank {me.rank} lost the others: {str(error).splitlines()[0]}; see what the other ranks say")
    return code


def over_nccl(me, device: str, options: argparse.Namespace, hosts: list[str], reports: list, group) -> list:
    """The reports, with the all-reduce between GPUs. Where NCCL hangs, rank 0 prints what is known, and all end."""
    import torch.distributed as dist

    name = "all-reduce, NCCL"

    def give_up(found: str) -> None:
        late = problem(name, found, "NCCL_DEBUG=INFO shows where it waits; python slurm/network.py --explain")
        finish(options, me, hosts, [(old + [late], *rest) for old, *rest in reports])
        sys.stdout.flush()
        os._exit(1)  # this may be a thread, while the main one hangs in NCCL

    timer = threading.Timer(options.timeout, give_up, [f"no answer within {options.timeout:g} s"])
    timer.start()
    try:
        nccl = dist.new_group(backend="nccl", timeout=datetime.timedelta(minutes=GATHER_MINUTES))
        mine = all_reduce(me.rank, me.world_size, device, nccl)
    except (RuntimeError, ValueError) as error:
        mine = problem(name, str(error).splitlines()[0], "run again with NCCL_DEBUG=INFO")
    timer.cancel()
    every: list = [None] * me.world_size
    try:
        dist.all_gather_object(every, mine, group=group)
    except RuntimeError:
        give_up("another rank gave it up")
    return [(old + [new], *rest) for (old, *rest), new in zip(reports, every, strict=True)]


# --------------------------------------------------------------------------------------------------------- output


def finish(options: argparse.Namespace, me, hosts: list[str], reports: list) -> int:
    """Print the reports of all ranks on rank 0. Returns the exit code."""
    shared, different = compare([facts_of_rank for _, facts_of_rank, _ in reports])
    found = [(result, rank) for rank, (results, *_) in enumerate(reports) for result in results if result.found]
    found += [(judge_difference(name, values), 0) for name, values in different.items()]
    if me.is_main and options.json:
        print_json(found, hosts, {"world_size": me.world_size, "common": shared, "differences": different})
    elif me.is_main:
        many = len(set(hosts))
        print(f"{me.world_size} ranks on {many} host{'s' * (many != 1)}, started by {me.launcher}\n")
        print("\n".join(merged([pair for pair in found if pair[0].name != "difference"], hosts)))
        print("\nThe same on all ranks:")
        alike = "; ".join(f"{name} {value}" for name, value in shared.items())
        print(textwrap.fill(alike, 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))
        print("\nDifferences between ranks:" + ("" if different else " none"))
        print("".join(f"{line(result)}\n" for result, _ in found if result.name == "difference"))
        print(summary(list(dict.fromkeys(result for result, _ in found))), flush=True)  # as many as lines
    return exit_code([result for result, _ in found])


def merged(found: list[tuple[Result, int]], hosts: list[str]) -> list[str]:
    """A line for each result, which says whose it is where not all have it. Many equal verdicts are cut short."""
    lines = []
    reported: dict[str, set[int]] = {}
    groups: dict[tuple[str, str], dict[Result, list[int]]] = {}
    for result, rank in found:
        reported.setdefault(result.name, set()).add(rank)
        groups.setdefault((result.name, result.status), {}).setdefault(result, []).append(rank)
    for (name, status), variants in groups.items():
        shown = list(variants.items())
        if status == "ok" and len(shown) > 4:
            shown = shown[:1]
        for result, ranks in shown:
            whole = set(ranks) == reported[name]
            names = sorted({hosts[rank] for rank in ranks})
            per_host = len(reported[name]) == len(set(hosts)) > 1
            lines.append(
                line(result) + ("" if whole else f"  [{', '.join(names) if per_host else number('rank', ranks)}]")
            )
        if len(shown) < len(variants):
            lines.append(line(ok(name, f"… and {len(variants) - 1} more, all ok")))
    return lines


def line(result: Result) -> str:
    advice = f"; {result.advice}" if result.advice else ""
    return f"{result.status:8} {result.name:14} {result.found}{advice}".rstrip()


def summary(results: list[Result]) -> str:
    """The last line: how many of each."""
    count = {status: sum(result.status == status for result in results) for status in ("ok", "warning", "problem")}
    return f"doctor: {count['ok']} ok, {count['warning']} warning(s), {count['problem']} problem(s)"


def exit_code(results: list[Result]) -> int:
    return int(any(result.status == "problem" for result in results))


def print_json(found: list[tuple[Result, int]], hosts: list[str], more: dict) -> None:
    rows = [{**vars(result), "host": hosts[rank], "rank": rank} for result, rank in found]
    print(json.dumps({"checks": rows, "exit_code": exit_code([r for r, _ in found]), **more}, indent=1), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="doctor.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--json", action="store_true", help="one JSON object in place of lines")
    add("--runs", type=Path, default=Path(os.environ.get("RUNS_DIR", "runs")), help="run folder (RUNS_DIR, else runs)")
    add("--data", type=Path, default=Path("data"), help="folder of your data (default: data)")
    add("--timeout", type=float, default=60, help="seconds to wait for a missing rank (default: 60)")
    options = parser.parse_args()
    if options.timeout <= 0:
        parser.error(f"--timeout {options.timeout:g} is no time to wait; give seconds above 0")
    if options.data != Path("data") and not options.data.is_dir():
        parser.error(f"--data {options.data}: there is no such folder")
    return options


def main() -> int:
    """The exit code: 0 without problems, 1 with."""
    options = parse_arguments()
    host, local = socket.gethostname(), os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    launched = any(name in os.environ for name in LAUNCHED) or os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"
    results = []
    if OLD:
        results = checks.check_python()
    elif launched and checks.installed("torch"):
        try:
            from common import ranks
        except Exception as error:  # of any kind: torch is broken, and the checks will say how
            advice = "the line on torch says more; until then ranks cannot join"
            results = [problem("ranks", f"cannot import common.ranks: {type(error).__name__}", advice)]
        else:
            return together(options, ranks)
    if launched and local != "0":
        print(f"problem: local rank {local} cannot join the others; see the first rank of {host}", file=sys.stderr)
        return 1
    if not OLD:
        results += examine(checks_of_rank() + checks_of_host(options))
    if options.json:
        print_json([(result, 0) for result in results], [host], {"world_size": 1, "common": {}, "differences": {}})
    else:
        print("\n".join(map(line, results)))
        print(f"\n{summary(results)}", flush=True)
    return exit_code(results)


if __name__ == "__main__":
    sys.exit(main())
