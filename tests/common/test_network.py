"""common/launching/network.py: what each profile sets, what it leaves alone, and what it refuses."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from launching import Group, OnRanks

from common.launching import network
from slurm.network import LEFT_ALONE, PREFIXES

ON_RANKS = OnRanks("tests/common/network_on_ranks.py")
ROOT = Path(__file__).resolve().parents[2]
DIAGNOSTICS = {"TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE", "NCCL_DEBUG"}
REAL = network.interfaces()[0]


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(PREFIXES)}
    line = [sys.executable, *arguments]
    return subprocess.run(line, cwd=ROOT, env=clean | variables, capture_output=True, text=True, timeout=120)


def command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return python("slurm/network.py", *arguments, **variables)


def test_default_sets_diagnostics_and_no_tuning():
    environment: dict[str, str] = {}
    assert network.apply(environment=environment) == environment
    assert set(environment) == DIAGNOSTICS


@pytest.mark.parametrize("profile", network.PROFILES)
def test_every_profile_works_here_has_reasons_and_contradicts_nothing(profile):
    rows = network.rows(profile)
    assert len({v.name for v in rows}) == len(rows)
    chosen = network.apply(profile, {"RUNS_DIR": "/scratch/runs"})
    assert chosen.pop("TORCH_FR_DUMP_TEMP_FILE") == "/scratch/runs/flight_recorder_rank"
    assert chosen.items() < {v.name: v.value for v in rows}.items()
    assert len(chosen) == len(rows) - 1
    assert set(network.DIAGNOSTICS) <= set(rows)
    assert all(v.value and v.what and v.why for v in rows)
    assert not {v.name for v in rows} & {v.name for v in LEFT_ALONE}


def test_gcp_and_ethernet_stay_within_nccls_64_sockets():
    for profile in ("gcp", "ethernet"):
        values = network.apply(profile, {})
        assert 1 < int(values["NCCL_SOCKET_NTHREADS"]) * int(values["NCCL_NSOCKS_PERTHREAD"]) <= 64


def test_what_the_user_has_set_stays():
    environment = {"NCCL_SOCKET_NTHREADS": "2", "NCCL_DEBUG": "", "TORCH_NCCL_TRACE_BUFFER_SIZE": "50",
                   "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/mine"}  # fmt: skip
    before = dict(environment)
    chosen = network.apply("ethernet", environment)
    assert set(chosen) == {"TORCH_NCCL_DUMP_ON_TIMEOUT", "NCCL_IB_DISABLE", "NCCL_NSOCKS_PERTHREAD"}
    assert environment == {**before, **chosen}
    assert network.apply("ethernet", environment) == {}


REFUSED = [
    ("default", {"GLOO_SOCKET_IFNAME": "^lo"}, r"no interface '\^lo'.*syntax of NCCL_SOCKET_IFNAME"),
    ("default", {"GLOO_SOCKET_IFNAME": f"={REAL}"}, "syntax of NCCL_SOCKET_IFNAME"),
    ("default", {"GLOO_SOCKET_IFNAME": f"{REAL},nic9"}, f"no interface 'nic9'.*expected .*{REAL}"),
    ("default", {"GLOO_SOCKET_IFNAME": f" {REAL}"}, f"no interface ' {REAL}'"),
    ("default", {"NCCL_IB_DISABLE": "true"}, "NCCL_IB_DISABLE='true'.*0 or 1"),
    ("infiniband", {"NCCL_IB_DISABLE": "1"}, "NCCL_NET=IB demands.*unset NCCL_IB_DISABLE"),
    ("default", {"NCCL_IB_DISABLE": "1", "NCCL_NET": "ib"}, "NCCL_NET=IB demands"),
    ("ethernet", {"NCCL_SOCKET_NTHREADS": "17"}, r"17 × NCCL_NSOCKS_PERTHREAD=4 is 68 .*allows 64"),
    ("infinband", {}, "no network profile is called 'infinband'.*did you mean infiniband"),
    ("aws_efa", {}, "did you mean aws-efa"),
    ("qqq", {}, "expected default, laptop, ethernet"),
]


@pytest.mark.parametrize(("profile", "variables", "message"), REFUSED)
def test_what_cannot_work_is_refused_in_one_line_and_nothing_is_set(profile, variables, message):
    environment = dict(variables)
    with pytest.raises(ValueError, match=message) as refused:
        network.apply(profile, environment)
    assert "\n" not in str(refused.value)
    assert environment == variables


@pytest.mark.parametrize(
    ("profile", "variables"),
    [
        ("default", {"GLOO_SOCKET_IFNAME": ",".join(network.interfaces())}),
        ("default", {"GLOO_SOCKET_IFNAME": "", "NCCL_IB_DISABLE": ""}),
        ("default", {"NCCL_SOCKET_IFNAME": "^lo,docker"}),  # for NCCL this syntax is right
        ("ethernet", {"NCCL_SOCKET_NTHREADS": "16"}),  # 16 × 4 = 64, the most NCCL allows
        ("aws-efa", {"NCCL_IB_DISABLE": "1"}),  # without effect there, and explained
        ("infiniband", {"NCCL_IB_DISABLE": "0"}),
    ],
)
def test_what_works_is_not_refused(profile, variables):
    network.apply(profile, dict(variables))


def test_gloo_itself_agrees_about_interfaces():
    candidates = [*network.interfaces(), "^lo", f"={REAL}", "nic9", f" {REAL}"]
    for name in candidates:
        try:
            dist.ProcessGroupGloo.create_device(interface=name)
            gloo_accepts = True
        except RuntimeError:
            gloo_accepts = False
        try:
            network.check({"GLOO_SOCKET_IFNAME": name})
            we_accept = True
        except ValueError:
            we_accept = False
        assert we_accept == gloo_accepts, name


def test_a_group_made_after_apply_sees_the_variables(tmp_path):
    """The flight recorder keeps 5 of 20 collectives when the profile says 5, and torch writes them to the folder of
    the runs: apply() is not too late, and the names are those that torch reads.

    On a rank of its own: torch makes its recorder once in a process.
    """
    one = Group(1)
    try:
        assert one(ON_RANKS.remembered_collectives, "5", 20, str(tmp_path)) == [5]
    finally:
        one.stop()


def test_export_lines_can_be_evaluated_by_a_shell():
    lines = command("--profile", "aws-efa", NCCL_DEBUG="INFO").stdout.splitlines()
    assert all(re.fullmatch(r"export [A-Z0-9_]+=\S+", line) for line in lines)
    script = 'eval "$1"; printf "%s %s" "$NCCL_NET" "${NCCL_DEBUG-unset}"'
    shell = ["sh", "-c", script, "sh", "\n".join(lines)]
    clean = {"PATH": os.environ["PATH"]}
    assert subprocess.run(shell, env=clean, capture_output=True, text=True).stdout == "Libfabric unset"


def test_explain_names_every_variable_who_set_it_and_why():
    run = command(
        "--profile", "gcp", "--explain",
        COLUMNS="150", NCCL_DEBUG="INFO", NCCL_NET_GDR_LEVEL="2", NCCL_SOME_NEW_SWITCH="7",
    )  # fmt: skip
    assert run.returncode == 0
    cells = {line.split()[0]: re.split(r"\s{2,}", line) for line in run.stdout.splitlines() if line[0] != " "}
    assert {v.name for v in (*network.rows("gcp"), *LEFT_ALONE)} <= set(cells)
    assert cells["NCCL_IB_DISABLE"][1:3] == ["1", "gcp"]
    assert cells["NCCL_DEBUG"][1:3] == ["INFO", "you (gcp: WARN)"]
    assert cells["NCCL_NET_GDR_LEVEL"][1:3] == ["2", "you"]
    assert cells["NCCL_SOME_NEW_SWITCH"][1:3] == ["7", "you"]
    assert cells["NCCL_ALGO"][1] == "nobody"
    assert max(map(len, run.stdout.splitlines())) <= 150


@pytest.mark.parametrize("more", [(), ("--explain",)])
def test_the_command_reports_a_mistake_in_one_line_with_exit_code_2(more):
    run = command(*more, GLOO_SOCKET_IFNAME="^lo")
    assert run.returncode == 2
    assert re.fullmatch(r"error: GLOO_SOCKET_IFNAME=\^lo: .*\n", run.stderr)
    assert bool(run.stdout) == bool(more)  # the table helps to see what is wrong; export lines would not
