"""What the doctor makes of what it reads: parsers and verdicts, one by one."""

import argparse
import ast
import os
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "prerequisites"))

import doctor_checks
import doctor_folders
import doctor_gpus
import doctor_limits
import doctor_network
import doctor_output
import doctor_packages
import doctor_results
import doctor_slurm
from doctor_results import Result, ok, problem, warning

ROOT = Path(__file__).resolve().parents[2]
SMI = """
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 570.86.15              Driver Version: 570.86.15      CUDA Version: 12.8     |
"""
TORCH = {"version": "2.15.0", "cuda": "12.6", "hip": None, "nccl_version": "2.27.5", "gpus": [], "memory": [],
         "bf16": False, "sum": 8.0}  # fmt: skip
GPUS = {**TORCH, "gpus": ["A", "A"], "memory": [80 * 2**30] * 2, "bf16": True}


@pytest.mark.parametrize("path", [path.name for path in sorted((ROOT / "prerequisites").glob("doctor*.py"))])
def test_an_old_python_gets_as_far_as_being_told(path):
    """Its syntax is Python 3.8's, and annotations are not evaluated; so main() runs, and check_python speaks."""
    code = (ROOT / "prerequisites" / path).read_text()
    ast.parse(code, feature_version=(3, 8))
    assert "from __future__ import annotations" in code


def test_an_old_python_is_a_problem(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    [result] = doctor_packages.check_python()
    assert result.status == "problem" and "3.11 or newer" in result.advice


def test_pins_are_those_of_the_requirement_files():
    pinned = doctor_packages.pins("requirements-lesson.txt", "requirements.txt")
    assert pinned["torch"] and pinned["scikit-learn"] and pinned["types-PyYAML"]
    assert set(doctor_packages.MODULES) <= set(pinned), "a package that is imported must be pinned"
    lines = [line for f in ("-lesson", "") for line in (ROOT / f"requirements{f}.txt").read_text().splitlines()]
    assert len(pinned) == sum("==" in line.split("#")[0] for line in lines)


def test_versions_of_one_release_are_equal():
    assert doctor_packages.release("2.15.0+cu132") == doctor_packages.release("2.15.0") == "2.15.0"


def test_an_import_that_kills_python_does_not_stop_the_others(tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text("import os\nos.abort()")
    (tmp_path / "fine.py").write_text("__version__ = '1'")
    (tmp_path / "quitter.py").write_text("raise SystemExit(0)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answers = doctor_packages.import_all(["fine", "deadly", "quitter", "json", "absent_package"])
    assert answers["fine"] == {"file": str(tmp_path / "fine.py"), "version": "1"}
    assert answers["deadly"] == {"error": "the import killed Python (exit status -6)"}
    assert answers["quitter"]["error"].startswith("SystemExit")
    assert answers["json"]["file"] and "ModuleNotFoundError" in answers["absent_package"]["error"]


def test_an_import_that_hangs_is_given_up(tmp_path, monkeypatch):
    (tmp_path / "sleeper.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor_packages.import_all(["sleeper"], timeout_s=1) == {
        "sleeper": {"error": "the import took longer than 1 s"}
    }


def test_common_of_another_checkout_is_a_problem():
    [result] = doctor_packages.judge_imports({}, {"common": {"file": "/elsewhere/common/__init__.py"}}, {})
    assert result.status == "problem" and "/elsewhere/common" in result.found


def test_files_that_hide_a_library(tmp_path):
    assert [result.status for result in doctor_packages.check_shadows(tmp_path)] == ["ok"]
    for path in ("jax/__init__.py", "ddp/torch.py", "tests/deepspeed/__init__.py", "lightning/train.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    found = [
        result.found.split()[0] for result in doctor_packages.check_shadows(tmp_path) if result.status == "problem"
    ]
    assert found == ["ddp/torch.py", "jax/__init__.py", "tests/deepspeed/__init__.py"]


@pytest.mark.parametrize(("text", "expected"), [
    (SMI, ("570.86.15", "12.8")),
    ("| NVIDIA-SMI 580.1  KMD Version: 580.1  CUDA UMD Version: 13.2 |", ("", "13.2")),
    ("| NVIDIA-SMI 580.95.05   Driver Version: 580.95.05   CUDA Version: N/A |", ("580.95.05", "")),
    ("", ("", "")),
])  # fmt: skip
def test_driver_and_cuda_of_nvidia_smi(text, expected):
    assert doctor_gpus.driver_of(text) == expected


@pytest.mark.parametrize(("torch", "smi", "environment", "status", "words"), [
    (TORCH, None, {}, "ok", "on the CPU"),
    (TORCH, None, {"SLURM_JOB_GPUS": "0,1", "DEVICE": "cpu"}, "ok", "DEVICE=cpu"),
    (TORCH, None, {"SLURM_JOB_GPUS": "0,1"}, "problem", "GPUs are allocated (SLURM_JOB_GPUS=0,1)"),
    (TORCH, None, {"CUDA_VISIBLE_DEVICES": "0"}, "problem", "--nv"),
    (TORCH, None, {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, "ok", "on the CPU"),
    (TORCH, SMI, {}, "problem", "see nvidia-smi"),
    ({**TORCH, "cuda": None}, SMI, {}, "problem", "built without CUDA"),
    ({**TORCH, "cuda": "13.0"}, SMI, {}, "problem", "torch wants CUDA 13.0: update the driver"),
    (GPUS, SMI, {"SLURM_JOB_GPUS": "0,1"}, "ok", "2 × A (80 GiB); driver 570.86.15 for CUDA up to 12.8; NCCL 2.27.5"),
    ({**GPUS, "bf16": False}, SMI, {}, "warning", "fp16"),
    ({**GPUS, "gpus": ["A", "B"]}, SMI, {}, "warning", "slowest"),
    ({**GPUS, "sum": 7.0}, SMI, {}, "problem", "gave 7.0"),
])  # fmt: skip
def test_verdict_on_gpus(torch, smi, environment, status, words):
    [result] = doctor_gpus.judge_gpus(torch, smi, environment)
    assert result.status == status
    assert words in f"{result.found}; {result.advice}"


@pytest.mark.parametrize(("value", "unknown"), [
    ("", ""), ("^lo,docker", ""), ("et", ""), ("eth0", ""), ("=eth0", ""), ("=eth", "eth"), ("ib,eth", "ib"),
])  # fmt: skip
def test_interfaces_that_nccl_would_not_find(value, unknown):
    assert doctor_network.unknown_nccl_interfaces(value, ["lo", "eth0", "eth1"]) == unknown


@pytest.mark.parametrize(("addresses", "nodes", "interface", "status"), [
    (["10.0.0.3", "127.0.1.1"], "2", "", "ok"),
    (["127.0.1.1"], "1", "", "ok"),
    (["127.0.1.1", "::1"], "2", "", "warning"),
    ([], "2", "", "warning"),
    (["127.0.1.1"], "2", "eth0", "ok"),
])  # fmt: skip
def test_verdict_on_the_host_name(monkeypatch, addresses, nodes, interface, status):
    monkeypatch.setenv("SLURM_NNODES", nodes)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    [result] = doctor_network.judge_host_name(addresses)
    assert result.status == status
    assert "GLOO_SOCKET_IFNAME" in result.found + result.advice or addresses[0] == "10.0.0.3"


def test_a_route_says_who_answers_and_over_which_interface(monkeypatch):
    with socket.socket() as listening, socket.socket() as closed:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        closed.bind(("127.0.0.1", 0))  # bound, so that nobody else has it, but not listening
        good = doctor_network.route(*listening.getsockname(), "b", "a")
        bad = doctor_network.route(*closed.getsockname(), "c", "a")
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
        other = doctor_network.route(*listening.getsockname(), "b", "a")
    assert good.status == "ok" and good.found.startswith("a reaches b at 127.0.0.1 over lo")
    assert bad.status == "problem" and "a cannot reach c" in bad.found
    assert other.status == "warning" and "GLOO_SOCKET_IFNAME=eth7" in other.found


def test_too_little_shared_memory(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(64 * 2**20, 0, 64 * 2**20))  # Docker's default
    [result] = doctor_limits.check_shared_memory(str(tmp_path))
    assert result.status == "warning" and "--ipc=host" in result.advice


@pytest.mark.parametrize(("limits", "words"), [
    ({"RLIMIT_NOFILE": 1024}, "ulimit -n"), ({"RLIMIT_NPROC": 500}, "ulimit -u"),
    ({"RLIMIT_STACK": 2**31}, "ulimit -s"),
])  # fmt: skip
def test_low_limits_are_named(monkeypatch, limits, words):
    numbers = {getattr(doctor_limits.resource, name): value for name, value in limits.items()}
    infinite = doctor_limits.resource.RLIM_INFINITY
    monkeypatch.setattr(doctor_limits.resource, "getrlimit", lambda kind: (numbers.get(kind, infinite), infinite))
    [result] = doctor_limits.check_limits()
    assert result.status == "warning" and words in result.advice


@pytest.mark.parametrize(("threads", "ranks", "values", "status"), [
    ("1", "4", ["max 100000"], "ok"),
    ("2", "4", [], "warning"),
    ("1", "4", ["200000 100000", "max 100000"], "warning"),  # version 2: two cores' worth of time
    ("1", "4", ["200000"], "warning"),  # version 1
    ("1", "4", ["-1"], "ok"),
    ("two", "1", [], "problem"),
    ("0", "1", [], "problem"),
    ("", "1", ["200000 100000"], "ok"),
    ("", "4", [], "warning"),  # each rank would take all cores
])  # fmt: skip
def test_cores_against_ranks_and_threads(monkeypatch, threads, ranks, values, status):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    monkeypatch.setattr(doctor_limits, "cgroup_value", lambda *files: values)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    [result] = doctor_limits.check_cores()
    assert result.status == status, result


def test_the_memory_limit_of_a_cgroup_counts(monkeypatch):
    monkeypatch.setattr(doctor_limits, "cgroup_value", lambda *files: ["max", str(2**30)])
    [result] = doctor_limits.check_memory()
    assert result.status == "warning" and "cgroup limit 1.0 GiB" in result.found


def test_the_kind_of_a_file_system(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text("/dev/a / ext4 rw 0 0\nserver:/h /home nfs4 rw 0 0\n/dev/b /home/my\\040disk xfs rw 0 0\n")
    kinds = [
        doctor_folders.file_system(Path(p), str(mounts)) for p in ("/tmp", "/home/me/runs", "/home/my disk/x", "/homes")
    ]
    assert kinds == ["ext4", "nfs4 (network)", "xfs", "ext4"]
    assert doctor_folders.file_system(Path("/"), str(tmp_path / "absent")) == "unknown file system"


@pytest.mark.parametrize(("speeds", "free_gib", "status"), [
    ((500.0, 500.0, 0.1), 100, "ok"), ((5.0, 500.0, 0.1), 100, "warning"), ((500.0, 500.0, 50.0), 100, "warning"),
    ((500.0, 500.0, 0.1), 1, "warning"),
])  # fmt: skip
def test_verdict_on_a_folder(tmp_path, monkeypatch, speeds, free_gib, status):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor_folders, "measure", lambda folder: speeds)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free_gib * 2**30))
    [result] = doctor_folders.check_folder("run folder", tmp_path / "not" / "yet" / "there")
    assert result.status == status and str(tmp_path) in result.found


def test_measuring_writes_reads_and_cleans_up(tmp_path):
    assert all(value > 0 for value in doctor_folders.measure(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["large"]
    assert (tmp_path / "large").stat().st_size == 64 * 2**20


JOB = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "8"}


@pytest.mark.parametrize(("environment", "status", "words"), [
    (JOB, "ok", "7: 2 node(s); here 1 task(s), 8 GPU(s)"),
    (JOB | {"SLURM_TASKS_PER_NODE": "8(x2)"}, "ok", "8 task(s), 8 GPU(s)"),
    (JOB | {"SLURM_TASKS_PER_NODE": "4,2"}, "warning", "--ntasks-per-node equal to --gpus-per-node"),
    (JOB | {"SLURM_GPUS_ON_NODE": "gpu:8", "SLURM_CPUS_PER_TASK": "4"}, "warning", "export SRUN_CPUS_PER_TASK"),
    (JOB | {"SLURM_CPUS_PER_TASK": "4", "SRUN_CPUS_PER_TASK": "4"}, "ok", "4 cores"),
    (JOB | {"SLURM_CPUS_PER_TASK": "4", "SLURM_STEP_ID": "0"}, "ok", "4 cores"),
])  # fmt: skip
def test_verdict_on_a_job(environment, status, words):
    [result] = doctor_slurm.judge_job(environment)
    assert result.status == status and words in result.found + result.advice


def test_outside_a_job_there_is_nothing_to_say():
    assert doctor_slurm.judge_job({"SLURM_CONF": "x"}) == []


def test_partitions_in_words():
    text = "gpu* up 4 gpu:8\ncpu up 2 (null)\n"  # sinfo of Slurm 22.05 with the doctor's --format
    assert doctor_slurm.partitions(text) == "gpu* (up, 4 nodes, gpu:8), cpu (up, 2 nodes, no GPUs)"


def test_partitions_of_several_clusters():
    """As sinfo prints them with SLURM_CLUSTERS or in a federation; a line of another form is shown as it is."""
    text = "CLUSTER: alpha\ngpu* up 4 gpu:a100:4(S:0-1)\n\nCLUSTER: beta\nCLUSTER: gamma\ncpu up 2 (null)\nodd line\n"
    shown = "alpha: gpu* (up, 4 nodes, gpu:a100:4(S:0-1)); beta: none; gamma: cpu (up, 2 nodes, no GPUs), odd line"
    assert doctor_slurm.partitions(text) == shown
    assert doctor_slurm.partitions("") == "none"


@pytest.mark.parametrize(("value", "number"), [
    ("2", 2), ("a100:2", 2), ("gpu:a100:2(S:0-1)", 2), ("1g.10gb:4", 4), ("2(x3),1", 2), (" 8 ", 8),
    (None, 7), ("", 7), ("x", 7), ("-1", 7), ("²", 7), ("1.5", 7), ("9" * 5000, 7),
])  # fmt: skip
def test_numbers_of_launchers(value, number):
    assert doctor_results.count(value, 7) == number


VARIABLES = ("LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "SLURM_NNODES", "SLURM_STEP_TASKS_PER_NODE", "SLURM_GPUS_ON_NODE",
             "SLURM_CPUS_PER_TASK", "MASTER_PORT", "VIRTUAL_ENV", "NETRC", "HF_HOME", "HF_TOKEN_PATH", "HOME",
             "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_DISABLE", "DEVICE")  # fmt: skip


@pytest.mark.parametrize("value", ["", " ", "x", "-1", "0", "1,2", "2(x2)", "auto", "²", "/", "/no/such", "9" * 5000])
def test_no_check_crashes(monkeypatch, tmp_path, value):
    """Whatever the variables hold, whatever sinfo and a .netrc say."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sinfo", "sbatch", "srun", "squeue", "scancel", "git"):
        (programs / name).write_bytes(b"#!/bin/sh\nprintf 'CLUSTER: \\351\\n\\nx\\na b c d e\\n'\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/bin:/usr/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for name in VARIABLES:
        monkeypatch.setenv(name, value)
    slow = ("packages", "imports", "shadows", "torch", "folders")
    every = doctor_checks.checks_of_rank() + doctor_checks.checks_of_host(
        argparse.Namespace(runs=Path("x"), data=Path("x"))
    )
    results = doctor_checks.examine([(name, check) for name, check in every if name not in slow])
    assert len(results) >= 10
    assert not [result.found for result in results if "crashed" in result.found]


def test_a_netrc_that_is_not_utf_8_is_read(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    (tmp_path / ".netrc").write_bytes(b"machine api.wandb.ai password \xe9\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert f"W&B: {tmp_path}/.netrc" in doctor_slurm.check_tokens(tmp_path)[0].found


def test_a_machine_without_slurm_is_fine(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor_slurm.judge_slurm() == ok("slurm", "not on this machine; torchrun works without")


@pytest.mark.parametrize(("name", "secret"), [
    (".env", True), ("a/.env.local", True), (".env.example", False), ("wandb.token", True), ("a/.netrc", True),
    ("a/key.pem", True), ("tokens.py", False), ("environment.yml", False), ("tokenizer.json", False),
])  # fmt: skip
def test_names_of_files_that_hold_secrets(name, secret):
    assert doctor_slurm.looks_like_token(name) == secret


def test_a_tracked_secret_is_named(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HF_HOME", "HF_TOKEN_PATH", "NETRC", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / ".env").write_text("WANDB_API_KEY=very-secret")
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    none, tracked = doctor_slurm.check_tokens(home=tmp_path, root=tmp_path)
    assert none == ok("tokens", "W&B: no token, none needed; Hugging Face: no token, none needed")
    assert tracked.status == "warning" and "git tracks deploy/.env" in tracked.found
    assert "very-secret" not in str(tracked)


def test_this_repository_tracks_no_secret():
    assert not [result for result in doctor_slurm.check_tokens() if "git tracks" in result.found]


def test_facts_that_differ_are_told_with_their_ranks():
    shared, different = doctor_output.compare([{"a": "1", "b": "x"}, {"a": "1"}, {"a": "1", "b": "y"}])
    assert shared == {"a": "1"}
    assert different == {"b": {"x": [0], "not set": [1], "y": [2]}}


@pytest.mark.parametrize(("name", "status"), [
    ("torch", "problem"), ("NCCL", "problem"), ("OMP_NUM_THREADS", "warning"), ("CUDA_VISIBLE_DEVICES", "ok"),
])  # fmt: skip
def test_how_bad_a_difference_is(name, status):
    result = doctor_output.judge_difference(name, {"1": [0, 2], "": [1]})
    assert result.status == status
    assert result.found == f"{name}: 1 (ranks 0, 2), (empty) (rank 1)"


def test_lines_say_whose_they_are():
    hosts = ["a", "a", "b"]
    both = [(ok("cores", "2"), rank) for rank in range(3)]
    one = [(ok("device", "cpu"), 0), (ok("device", "cpu"), 1), (problem("device", "none", "mend"), 2)]
    per_host = [(ok("ports", "1"), 0), (warning("ports", "2", "do"), 2)]
    assert [" ".join(line.split()) for line in doctor_output.merged(both + one + per_host, hosts)] == [
        "ok cores 2",
        "ok device cpu [ranks 0, 1]",
        "problem device none; mend [rank 2]",
        "ok ports 1 [a]",
        "warning ports 2; do [b]",
    ]


def test_many_equal_verdicts_are_cut_short():
    found = [(ok("memory", f"{rank} GiB"), rank) for rank in range(9)]
    lines = doctor_output.merged(found, [f"node{rank}" for rank in range(9)])
    assert len(lines) == 2 and "0 GiB" in lines[0] and "8 more, all ok" in lines[1]


def test_a_check_that_crashes_is_a_problem_and_the_next_one_goes_on():
    def crash() -> list[Result]:
        raise RuntimeError("two\nlines")

    first, second = doctor_checks.examine([("a", crash), ("b", lambda: [ok("b", "fine")])])
    assert first.status == "problem" and first.name == "a" and "RuntimeError: two lines" in first.found
    assert second == ok("b", "fine")
    assert doctor_output.exit_code([first, second]) == 1 and doctor_output.exit_code([second]) == 0
    assert doctor_output.exit_code([warning("c", "slow", "wait")]) == 0
