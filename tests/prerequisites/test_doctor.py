"""The doctor as users start it: alone, under torchrun, with ranks that differ, and with everything wrong at once."""

import json
import re
import shutil
import socket
import subprocess
import sys

import pytest
from launching import ROOT, OnRanks, clean_environment, free_port, kill_tree, run_command

DOCTOR = str(ROOT / "prerequisites" / "doctor.py")
EVERY_CHECK = {
    "python", "cores", "limits", "packages", "imports", "shadows", "torch", "gpus", "network", "host name", "ports",
    "shared memory", "memory", "run folder", "data folder", "slurm", "tokens",
}  # fmt: skip
LINE = re.compile(r"(ok|warning|problem) +([a-zA-Z-]+(?:,? [a-zA-Z]+)?) +(\S.*)")
AS_ANOTHER_HOST = """
import os, socket, sys
socket.sethostname("other-host")
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def names(text: str) -> set[str]:
    """The checks that have a line in the doctor's output."""
    return {match[2].strip() for match in map(LINE.fullmatch, text.splitlines()) if match}


def start(*arguments: str, command: tuple[str, ...] = (sys.executable, DOCTOR), **variables: str) -> subprocess.Popen:
    """One rank, started by hand: its variables are its own."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = clean_environment(DEVICE="cpu") | variables
    return subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment, text=True, **pipes)


def rank_variables(rank: int, size: int, port: int) -> dict[str, str]:
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {name: str(value) for name, value in values.items()} | {"MASTER_ADDR": "127.0.0.1"}


def ends(processes: list[subprocess.Popen], timeout: float = 200) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; none may outlive the timeout."""
    try:
        return [(*process.communicate(timeout=timeout), process.returncode)[::-1] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                kill_tree(process.pid)


def another_host() -> tuple[str, ...]:
    """A command that starts Python under another host name, in a namespace; empty where that is not allowed."""
    for options in ([], ["--user", "--map-root-user"]):
        prefix = ["unshare", "--uts", *options, sys.executable, "-c", AS_ANOTHER_HOST]
        if shutil.which("unshare") and subprocess.run([*prefix, "-c", ""], capture_output=True).returncode == 0:
            return tuple(prefix)
    return ()


# ---------------------------------------------------------------------------------------------------------- alone


def test_alone_it_prints_every_check_and_finds_no_problem(tmp_path):
    result = run_command([sys.executable, DOCTOR], RUNS_DIR=str(tmp_path / "runs"), DEVICE="cpu")
    assert names(result.stdout) == EVERY_CHECK, result.stdout
    assert "problem  " not in result.stdout
    assert result.stdout.splitlines()[-1].endswith(" 0 problem(s)")
    assert not list(tmp_path.iterdir())  # what it measured with is gone, and it made no run folder


@pytest.fixture(scope="module")
def everything_wrong(tmp_path_factory):
    """The JSON of a doctor whose surroundings are wrong in as many ways as fit into one run, and its exit code."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "file").write_text("a run folder cannot be made below a file")
    (folder / "path" / "safetensors").mkdir(parents=True)
    (folder / "path" / "safetensors" / "__init__.py").write_text("")
    (folder / "path" / "torchvision").mkdir()
    (folder / "path" / "torchvision" / "__init__.py").write_text(
        "print('packages may print')\nraise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    (folder / "path" / "psutil").mkdir()
    for name, version in (("ruff", "0.0.1"), ("tqdm", "1.2.3")):
        metadata = folder / "path" / f"{name}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    home = folder / "home"
    home.mkdir()
    (home / ".netrc").write_text("machine api.wandb.ai login user password wandb-secret-key")
    (home / ".netrc").chmod(0o644)
    occupied = socket.socket()
    occupied.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        occupied.bind(("", 29500))
        occupied.listen()
    except OSError:
        pass  # then somebody else holds it, which is the same to the doctor
    result = run_command(
        [sys.executable, DOCTOR, "--json"],
        check=False,
        PYTHONPATH=str(folder / "path"),
        RUNS_DIR=str(folder / "file" / "runs"),
        HOME=str(home),
        HF_TOKEN="hf-secret-token",
        GLOO_SOCKET_IFNAME="nic9",
        NCCL_SOCKET_IFNAME="nic8",
        OMP_NUM_THREADS="4096",
        VIRTUAL_ENV=str(folder),
        SLURM_JOB_ID="7",
        SLURM_JOB_GPUS="0,1",
        SLURM_CPUS_PER_TASK="8",
        CUDA_VISIBLE_DEVICES="97,98",  # no machine has so many: the same on machines with GPUs
    )
    occupied.close()
    return result


WRONG = [
    ("python", "warning", r"is active"),
    ("packages", "warning", r"ruff 0\.0\.1 is installed, \S+ is pinned; pip install ruff=="),
    ("packages", "warning", r"tqdm 1\.2\.3 is installed"),
    ("imports", "problem", r"safetensors is loaded from \S*path/safetensors/__init__\.py, in place of .*PYTHONPATH"),
    ("imports", "problem", r"tqdm is loaded from \S*site-packages\S*, in place of tqdm 1\.2\.3 in \S*path"),
    (
        "imports",
        "problem",
        r"nms does not exist: torch \S+ and torchvision \S+ are not built for each other.*one index",
    ),
    ("gpus", "problem", r"GPUs are allocated \(SLURM_JOB_GPUS=0,1 CUDA_VISIBLE_DEVICES=97,98\).*DEVICE=cpu"),
    ("network", "problem", r"GLOO_SOCKET_IFNAME=nic9: .* no interface 'nic9'"),
    ("network", "problem", r"NCCL_SOCKET_IFNAME=nic8: no interface is called nic8"),
    ("ports", "warning", r"29500 cannot be had.*--standalone"),
    ("cores", "warning", r"OMP_NUM_THREADS=4096.*fewer ranks"),
    ("run folder", "problem", r"file/runs: Not a directory.*RUNS_DIR"),
    ("job", "warning", r"SRUN_CPUS_PER_TASK is not set.*export SRUN_CPUS_PER_TASK"),
    ("tokens", "warning", r"others can read \S+\.netrc; chmod 600"),
    ("tokens", "ok", r"W&B: \S+\.netrc; Hugging Face: HF_TOKEN"),
]


@pytest.mark.parametrize(("name", "status", "pattern"), WRONG)
def test_what_is_wrong_is_named_with_advice(everything_wrong, name, status, pattern):
    rows = [row for row in json.loads(everything_wrong.stdout)["checks"] if row["name"] == name]
    said = [f"{row['found']}; {row['advice']}" for row in rows if row["status"] == status]
    assert [text for text in said if re.search(pattern, text)], rows


def test_json_is_complete_and_holds_no_secret(everything_wrong):
    answer = json.loads(everything_wrong.stdout)
    assert everything_wrong.returncode == answer["exit_code"] == 1
    assert {row["name"] for row in answer["checks"]} >= EVERY_CHECK - {"ports"} | {"job"}
    for row in answer["checks"]:
        assert row.keys() == {"name", "status", "found", "advice", "host", "rank"}
        assert bool(row["advice"]) == (row["status"] != "ok"), row
        assert "\n" not in row["found"] + row["advice"]
    assert "secret" not in everything_wrong.stdout + everything_wrong.stderr
    assert "Traceback" not in everything_wrong.stderr


@pytest.mark.parametrize("variables", [{}, rank_variables(0, 2, 1), rank_variables(1, 2, 1)], ids=["alone", "0", "1"])
def test_without_any_package_it_still_speaks(variables):
    bare = [sys.executable, "-S", DOCTOR]  # -S: no site-packages, so neither torch nor psutil
    result = run_command(bare, check=False, timeout=30, **variables)
    assert result.returncode == 1
    if variables.get("RANK") == "1":
        assert len(result.stderr.splitlines()) == 1 and "local rank 1 cannot join" in result.stderr
    else:
        assert re.search(r"problem +torch +torch is not installed; make venv", result.stdout)
        assert re.search(r"problem +network +cannot be checked without the package psutil", result.stdout)
        assert names(result.stdout) >= EVERY_CHECK - {"gpus", "host name"}
    assert "Traceback" not in result.stderr


def test_a_half_set_environment_is_one_line():
    result = run_command([sys.executable, DOCTOR], check=False, timeout=30, RANK="x", WORLD_SIZE="2")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and "half-set torchrun environment" in result.stderr


@pytest.mark.parametrize("arguments", [["--data", "nowhere"], ["--timeout", "0"], ["--nonsense"]])
def test_wrong_usage_is_exit_code_2(arguments):
    result = run_command([sys.executable, DOCTOR, *arguments], check=False, timeout=30)
    assert result.returncode == 2
    assert "error: " in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr


# -------------------------------------------------------------------------------------------------------- together


@pytest.mark.slow
def test_two_ranks_meet_under_torchrun(launch):
    result = launch(DOCTOR, nproc=2)
    assert names(result.stdout) == EVERY_CHECK | {"all-reduce, Gloo", "device"}
    assert "2 ranks summed 8 MiB exactly" in result.stdout
    assert "Differences between ranks: none" in result.stdout
    assert result.stdout.count("imports") == 1  # the first rank of a host speaks for the host


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory):
    """Three ranks; the last one has other settings and, where namespaces are allowed, another host name."""
    port, other = free_port(), another_host()
    folder = str(tmp_path_factory.mktemp("three") / "runs")
    processes = []
    for rank in range(3):
        variables = rank_variables(rank, 3, port) | {"RUNS_DIR": folder}
        if rank == 2:
            variables |= {"OMP_NUM_THREADS": "3", "NCCL_ALGO": "Ring", "DEVICE": "auto", "CUDA_VISIBLE_DEVICES": "97"}
        command = (*other, DOCTOR) if rank == 2 and other else (sys.executable, DOCTOR)
        processes.append(start("--json", command=command, **variables))
    return ends(processes), bool(other)


def test_a_problem_of_one_rank_is_the_exit_code_of_all(three_ranks):
    (first, *others), _ = three_ranks
    assert [code for code, *_ in (first, *others)] == [1, 1, 1], first
    assert all(out == "" for _, _, out in others)  # rank 0 alone prints
    answer = json.loads(first[2])
    assert answer["world_size"] == 3 and answer["exit_code"] == 1
    [row] = [row for row in answer["checks"] if row["name"] == "device" and row["status"] == "problem"]
    assert row["rank"] == 2 and "CUDA_VISIBLE_DEVICES=97" in row["found"]
    assert {row["rank"] for row in answer["checks"] if row["name"] == "cores"} == {0, 1, 2}


def test_differences_between_ranks_are_shown(three_ranks):
    (first, *_), _ = three_ranks
    answer = json.loads(first[2])
    expected = {
        "OMP_NUM_THREADS": {"1": [0, 1], "3": [2]},
        "NCCL_ALGO": {"not set": [0, 1], "Ring": [2]},
        "DEVICE": {"cpu": [0, 1], "auto": [2]},
    }
    assert expected.items() <= answer["differences"].items()
    assert answer["common"]["torch"] and answer["common"]["Python"]
    texts = [row["found"] for row in answer["checks"] if row["name"] == "difference" and row["status"] == "warning"]
    assert "OMP_NUM_THREADS: 1 (ranks 0, 1), 3 (rank 2)" in texts


def test_hosts_are_examined_and_reach_each_other(three_ranks):
    (first, *_), several = three_ranks
    if not several:
        pytest.skip("a second host name needs unshare(1) and the right to use it")
    rows = json.loads(first[2])["checks"]
    here = socket.gethostname()
    assert {row["host"]: row["rank"] for row in rows if row["name"] == "imports"} == {here: 0, "other-host": 2}
    assert sorted(row["found"].split(" at ")[0] for row in rows if row["name"] == "routes") == sorted(
        [f"{here} reaches other-host", f"other-host reaches {here}"]
    )
    assert [row["status"] for row in rows if row["name"] == "shared folder"] == ["ok"]


@pytest.mark.slow
def test_a_rank_that_never_comes_is_one_line(tmp_path):
    rank = start("--timeout", "3", **rank_variables(0, 2, free_port()))
    [(code, err, out)] = ends([rank], timeout=30)
    lines = [line for line in err.splitlines() if "error: " in line]
    assert code == 2 and len(lines) == 1, err
    assert "could not join the others" in lines[0] and "within 3 s" in lines[0]
    assert not out and "Traceback" not in err


def test_a_wrong_interface_stops_a_rank_before_it_joins():
    rank = start(GLOO_SOCKET_IFNAME="nic9", **rank_variables(0, 2, free_port()))
    [(code, err, _)] = ends([rank], timeout=30)
    assert code == 2 and len(err.splitlines()) == 1
    assert "no interface 'nic9'" in err


@pytest.mark.parametrize("lie", [0, 1])
def test_a_wrong_sum_is_a_problem(group, lie):
    answers = group(2)(OnRanks("tests/prerequisites/doctor_on_ranks.py").sums, lie)
    assert [status for status, _ in answers] == (["problem"] * 2 if lie else ["ok"] * 2)
    assert all("1,048,576 of 1,048,576 sums are wrong" in found for _, found in answers) == bool(lie)
