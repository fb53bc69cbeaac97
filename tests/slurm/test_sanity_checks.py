"""The sanity checks as jobs: all pass on a healthy cluster, and each fault makes the right one fail."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launching import ROOT, clean_environment, free_port, run_command
from slurm_cluster import CLUSTER

pytestmark = pytest.mark.slurm
RUN_CHECKS = "prerequisites/run_checks.py"
CHECKS = ["user_space", "data_set", "file_system", "one_device", "several_devices", "several_nodes"]


def run_checks(cluster, *arguments: str, code: int = 0, timeout: float = 280, **environment: str):
    """Run the launcher on the login node; returns (rows of its table by check, all that it printed)."""
    command = (sys.executable, RUN_CHECKS, *arguments)
    done = cluster.on_login(*command, check=False, timeout=timeout, **environment)
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert "Traceback" not in done.stderr
    rows = {}
    for line in done.stdout.splitlines():
        if (cells := re.split(r" {2,}", line)) and cells[0] in CHECKS:
            rows[cells[0]] = (cells + [""] * 5)[1:5]  # job, state, nodes, reason
    return rows, said


def states(rows: dict[str, list[str]]) -> dict[str, str]:
    return {check: state for check, (_, state, _, _) in rows.items()}


def facts(cluster, job: str) -> list[str]:
    """The lines of a job's output without the one of job_env.sh."""
    lines = cluster.output(job).splitlines()
    assert lines[0].startswith("job_env: job ")
    return lines[1:]


@pytest.mark.slow
def test_all_pass_on_a_healthy_cluster(cluster):
    rows, said = run_checks(cluster)
    assert list(rows) == CHECKS, said
    assert set(states(rows).values()) == {"COMPLETED"}, said
    assert said.splitlines()[-1] == "6 passed, 0 failed"
    for check, (job, _, nodes, reason) in rows.items():
        lines = facts(cluster, job)
        assert lines[-1] == f"PASSED {check}" and reason == ""
        assert not [line for line in lines if line.startswith(("problem", "FAILED"))]
        assert nodes == "node[1-2]" or check in ("one_device", "several_devices")

    output = {check: " ".join(cluster.output(rows[check][0]).split()) for check in CHECKS}
    assert "packages are those of the login node [node1]" in output["user_space"]
    assert "all 9 facts are as they should be [node2]" in output["user_space"]
    assert re.search(r"standard library's sources: \d+ files, .* on node1, node2", output["data_set"])
    for writer, reader in (("node1", "node2"), ("node2", "node1")):
        assert (
            f"the file that {writer} wrote to {cluster.folder}/runs was there at once on {reader}"
            in (output["file_system"])
        )
    assert re.search(r"1 started by python \(1 on node\d\), asked for 1 × 1 GPUs = 1", output["one_device"])
    # Once under each launcher, and the bandwidth of both collectives at both sizes.
    counts = {"several_devices": "asked for 1 × 2 GPUs = 2", "several_nodes": "asked for 2 × 2 GPUs = 4"}
    for check, asked in counts.items():
        ranks = asked[-1]
        for launcher in ("srun", "torchrun"):
            assert len(re.findall(rf"{ranks} started by {launcher} \([^)]*\), {asked}", output[check])) == 1
        assert output[check].count(f"the parts of all {ranks} ranks arrived, over Gloo") == 4
        assert output[check].count("2 visible, 2 allocated, asked for 2") == int(ranks)  # each node, each launcher
        assert len(re.findall(r"all ranks all_(?:reduce|gather) (?:65,536|16,777,216)", output[check])) == 4
    assert output["several_nodes"].count("ranks on 2 (node1, node2), asked for 2") == 2


@pytest.mark.slow
def test_fewer_ranks_than_gpus(cluster):
    rows, said = run_checks(
        cluster, "--only", "several_devices,one_device", "--", "--ntasks-per-node=1", code=1
    )  # fmt: skip
    assert states(rows) == {"several_devices": "FAILED", "one_device": "COMPLETED"}
    assert re.match(r"ranks 1 started by python \(1 on node\d\), asked for 1 × 2 GPUs = 2", rows["several_devices"][3])
    lines = facts(cluster, rows["several_devices"][0])
    assert lines[-1].startswith("FAILED several_devices: ranks 1 started")
    assert sum(line.startswith("problem") for line in lines) == 1
    assert "1 passed, 1 failed" in said


@pytest.mark.slow
def test_data_that_is_not_there(cluster):
    rows, _ = run_checks(cluster, "--only", "data_set,one_device", code=1, DATA="/no/such/data")
    assert states(rows) == {"data_set": "FAILED", "one_device": "COMPLETED"}
    assert rows["data_set"][3].startswith("reading /no/such/data: No such file or directory, on node1, node2; correct")


@pytest.mark.slow
def test_data_that_differ_between_nodes(cluster):
    """A folder on each node's own disk; one node's copy has another last byte in one file."""
    state = Path(cluster.state_folder())
    for number in (1, 2):
        folder = state / f"disk-node{number}" / "data"
        folder.mkdir()
        (folder / "a.bin").write_bytes(bytes(1000))
        (folder / "b.bin").write_bytes(bytes(999) + bytes([number]))
    rows, _ = run_checks(cluster, "--only", "data_set", code=1, DATA=str(state / "local" / "data"))
    assert states(rows) == {"data_set": "FAILED"}
    assert "not the same" in rows["data_set"][3]
    found = [line for line in facts(cluster, rows["data_set"][0]) if line.startswith("problem")]
    assert len(found) == 2 and all("2 files, 0.0 MB" in line for line in found)


@pytest.mark.slow
def test_run_folder_that_is_not_shared(cluster):
    local = f"{cluster.state_folder()}/local/runs"
    rows, _ = run_checks(cluster, "--only", "file_system,one_device", code=1, RUNS_DIR=local)
    assert states(rows) == {"file_system": "FAILED", "one_device": "COMPLETED"}
    assert re.match(rf"sharing the file that node1 wrote to {local} is not there on node2", rows["file_system"][3])


@pytest.mark.slow
def test_run_folder_that_cannot_be_written(cluster):
    rows, _ = run_checks(cluster, "--only", "file_system", code=1, RUNS_DIR="/proc")  # there, and takes no files
    assert states(rows) == {"file_system": "FAILED"}
    assert re.match(r"writing node1 cannot write /proc/\.check-\d+/rank-0: ", rows["file_system"][3])


@pytest.mark.slow
def test_environment_that_is_not_there(cluster):
    rows, _ = run_checks(cluster, "--only", "user_space", code=1, VENV="/no/such/environment")
    assert states(rows) == {"user_space": "FAILED"}
    assert "there is no environment with torch in /no/such/environment" in rows["user_space"][3]
    last = cluster.output(rows["user_space"][0]).splitlines()[-1]
    assert last == "FAILED user_space: the job could not be prepared; the line above says why"


@pytest.mark.parametrize(
    ("option", "refused"),
    [
        (["--nodes", "5"], {"user_space", "data_set", "file_system", "several_nodes"}),
        (["--gpus-per-node", "3"], {"several_devices", "several_nodes"}),
    ],
    ids=["nodes", "gpus"],
)
def test_impossible_requests_are_refused_at_once(cluster, option, refused):
    rows, said = run_checks(cluster, *option, code=1, timeout=30)
    assert {check for check, state in states(rows).items() if state == "REFUSED"} == refused
    assert {job for job, *_ in rows.values()} == {"-"}  # none was submitted
    last = said.splitlines()[-1]
    assert last.startswith(f"refused by Slurm: {', '.join(c for c in CHECKS if c in refused)}; asked for")
    assert " ".join(option) in last


@pytest.mark.slow
def test_a_job_that_can_never_start(cluster):
    failing = cluster.submit("--wrap", "exit 1")
    assert cluster.end_of(failing) == "FAILED"
    for option, why in (("--hold", "JobHeldUser"), (f"--dependency=afterok:{failing}", "DependencyNeverSatisfied")):
        rows, _ = run_checks(cluster, "--only", "one_device", "--", option, code=1, timeout=30)
        job, state, _, reason = rows["one_device"]
        assert (state, reason) == ("NEVER STARTS", f"Slurm's reason: {why}")
        assert cluster.end_of(job) == "CANCELLED"


@pytest.mark.slow
def test_a_job_without_a_verdict_has_not_passed(cluster, tmp_path):
    """COMPLETED is not enough: here another script runs, and the check's file is only its argument."""
    script = tmp_path / "other.sh"
    for text, reason in (
        ("echo all is well", "no verdict; it ends with: all is well"),
        ("echo PASSED another_check", "no verdict; it ends with: PASSED another_check"),
        ("echo PASSED one_device; exit 1", "no verdict; it ends with: PASSED one_device"),
        ("echo FAILED one_device: no; echo PASSED one_device", "no"),
    ):
        script.write_text(f"#!/bin/bash\n{text}\n")
        rows, _ = run_checks(cluster, "--only", "one_device", "--", str(script), code=1)
        assert rows["one_device"][1] == ("FAILED" if "exit 1" in text else "COMPLETED")
        assert rows["one_device"][3] == reason


@pytest.mark.parametrize(
    ("part", "code", "last"),
    [
        ("echo ok fact", 0, "PASSED some"),
        ("echo ok fact; exit 3", 3, "FAILED some: exit code 3: bash -c echo ok fact; exit 3"),
        ("echo problem  disk  full; exit 1", 1, "FAILED some: disk full"),
        ("echo problem  disk  full", 1, "FAILED some: disk full"),  # it says so, and ends with 0
        ("true", 1, "FAILED some: found no output; expected facts from: bash -c true"),
        ("echo ok; echo '[rank 1] error: no GPU' >&2; exit 2", 2, "FAILED some: [rank 1] error: no GPU"),
        ("python -c 1/0", 1, "FAILED some: ZeroDivisionError: division by zero"),
    ],
)
def test_the_last_line_agrees_with_the_exit_code(part, code, last):
    script = 'check=some; source prerequisites/checks/verdict.sh; trap - EXIT; step bash -c "$1"; passed'
    done = run_command(["bash", "-c", script, "_", part], 30, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (code, last)


@pytest.mark.slow
def test_cancelled_at_the_timeout_and_at_ctrl_c(cluster):
    rows, _ = run_checks(cluster, "--only", "several_nodes,file_system", "--timeout", "1", code=1)
    assert set(states(rows).values()) == {"CANCELLED"}
    assert {cluster.end_of(job) for job, *_ in rows.values()} == {"CANCELLED"}

    options = ["--only", "several_nodes", "--", f"--job-name=interrupted-{free_port()}"]
    environment = {"RUNS_DIR": str(cluster.folder / "runs"), "VENV": sys.prefix}
    process = subprocess.Popen(
        [*CLUSTER, "--name", cluster.name, "exec", sys.executable, RUN_CHECKS, *options],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=clean_environment(**environment, SBATCH_OUTPUT=str(cluster.folder / "%x-%j.out")),
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not cluster.on_login("squeue", "-h", f"--name={options[-1].partition('=')[2]}").stdout:
        assert time.monotonic() < deadline, "it never submitted the job"
        time.sleep(0.2)
    (launcher,) = [p for p in psutil.Process(process.pid).children(recursive=True) if RUN_CHECKS in p.cmdline()[:2]]
    launcher.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    job = re.search(r"several_nodes +(\d+) +CANCELLED .*interrupted", said)
    assert job, said
    assert cluster.end_of(job[1]) == "CANCELLED"


def test_called_wrongly():
    cases = {
        "--only one-device": "expected some of user_space, data_set",
        "--nodes 1": "expected two nodes or more",
        "--gpus-per-node 0": "a GPU or more on each",
        "--timeout 0": "seconds above 0",
    }
    for arguments, words in cases.items():
        done = run_command([sys.executable, RUN_CHECKS, *arguments.split()], 30, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ") and words in line
    done = run_command([sys.executable, RUN_CHECKS], 30, check=False, PATH="/nowhere")
    assert (done.returncode, done.stdout) == (2, "") and "no sbatch" in done.stderr


# ------------------------------------------------- what no cluster without GPUs can show: the verdicts by themselves


@pytest.fixture
def devices(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "prerequisites" / "checks"))
    import check_devices

    return check_devices


def sight(devices, host: str, device: str, visible: str = "ab", allocated: int = 2, listed: int = 2):
    return devices.Sight(host, allocated, listed, tuple(visible), device)


def problems(devices, sights, nodes=1, gpus=2) -> list[str]:
    return [result.name for result in devices.judge(sights, nodes, gpus, "srun") if result.status == "problem"]


def test_counts_and_devices_are_judged(devices):
    def see(*arguments, **more):
        return sight(devices, *arguments, **more)

    assert problems(devices, [see("n1", "a"), see("n1", "b")]) == []
    assert problems(devices, [see("n1", "a"), see("n1", "a")]) == ["devices"]  # two ranks share a GPU
    blind = {"visible": "a", "listed": 2}  # Slurm gave two, CUDA finds one
    assert problems(devices, [see("n1", "a", **blind), see("n1", "a", **blind)]) == ["GPUs", "GPUs", "devices"]
    own = {"listed": 1}  # each task sees but its own
    assert problems(devices, [see("n1", "a", "a", **own), see("n1", "b", "b", **own)]) == []
    assert problems(devices, [see("n1", "a"), see("n1", "b"), see("n2", "a"), see("n2", "b")], nodes=2) == []
    assert problems(devices, [see("n1", "a"), see("n1", "b")] * 2, nodes=2) == ["nodes", "ranks", "devices"]
    one = [see("n1", "a"), see("n1", "b"), see("n2", "a", allocated=1), see("n2", "b", allocated=1)]
    assert problems(devices, one, nodes=2) == ["GPUs"]
    uneven = [see("n1", "a"), see("n1", "b"), see("n1", "c", "abc"), see("n2", "a")]
    assert problems(devices, uneven, nodes=2) == ["ranks", "GPUs", "GPUs"]


def test_versions_are_judged(devices):
    import check_user_space

    login = {"torch": "2.15.0", "numpy": "2.4.0"}
    assert [r.status for r in check_user_space.judge_versions(login, dict(login))] == ["ok"]
    (result,) = check_user_space.judge_versions(login, {"torch": "2.14.0"})
    assert result.status == "problem"
    assert "torch 2.14.0, there 2.15.0; numpy missing, there 2.4.0" in result.found
