"""Every launcher's environment, and what happens when it is wrong."""

import json
import socket

import pytest
from launchers import MPIEXEC, MPIRUN, SRUN, TORCHRUN
from launching import SCRIPTS, OnRanks, free_port

from common import ranks
from common.launching import launch
from common.launching.launch import unused_gpus
from common.ranks import LaunchInfo, choose_device, read_environment

ON_RANKS = OnRanks("tests/common/ranks_on_ranks.py")


def without(environment, *names):
    return {name: value for name, value in environment.items() if name not in names}


def test_torchrun():
    assert read_environment(TORCHRUN) == LaunchInfo(3, 4, 1, 2, "torchrun", "a", 5)


def test_srun_step(monkeypatch):
    monkeypatch.setattr(launch.shutil, "which", lambda name: None)  # as on a machine without scontrol
    place = read_environment(SRUN)
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (2, 4, 0, 2)
    assert (place.launcher, place.master_addr) == ("srun", "node1")
    other_step = read_environment(SRUN | {"SLURM_STEP_ID": "1"})
    assert place.master_port != other_step.master_port  # two steps of one job may share a node
    assert read_environment(SRUN | {"SLURM_PROCID": "3"}).master_port == place.master_port
    assert read_environment(SRUN | {"MASTER_ADDR": "b", "MASTER_PORT": "9"}).master_addr == "b"


def test_an_srun_step_with_unequal_nodes():
    uneven = SRUN | {"SLURM_STEP_TASKS_PER_NODE": "1,3", "MASTER_ADDR": "node1"}
    first = read_environment(uneven | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})
    last = read_environment(uneven | {"SLURM_PROCID": "3", "SLURM_LOCALID": "2", "SLURM_NODEID": "1"})
    assert (first.local_world_size, last.local_rank, last.local_world_size) == (1, 2, 3)


@pytest.mark.parametrize(("nodelist", "host"), [
    ("node[1-2]", "node1"), ("gpu[003,005-7]", "gpu003"), ("a,b", "a"), ("solo", "solo"), ("x,gpu[1-2]", "x"),
])  # fmt: skip
def test_first_host_without_scontrol(monkeypatch, nodelist, host):
    monkeypatch.setattr(launch.shutil, "which", lambda name: None)
    assert launch._first_host(nodelist) == host


def test_plain_python_inside_a_slurm_allocation_is_one_process():
    assert read_environment(without(SRUN, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID", "SLURM_PROCID")).world_size == 1
    batch_script = SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    assert read_environment(batch_script) == LaunchInfo(0, 1, 0, 1, "python")


def test_torchrun_inside_an_srun_step_is_torchrun():
    assert read_environment(SRUN | TORCHRUN).launcher == "torchrun"


@pytest.mark.parametrize("mpi", [MPIRUN, MPIEXEC], ids=["mpirun", "mpiexec"])
def test_mpi_inside_an_srun_step_is_mpi(mpi):
    """On the second node of three: the step is that of MPI's helpers, one a node, which srun has started."""
    helper = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
    assert read_environment(helper | mpi) == read_environment(mpi)


def test_mpirun_and_mpiexec():
    place = read_environment(MPIRUN)
    assert (place.rank, place.world_size, place.local_rank, place.launcher) == (1, 2, 1, "mpirun")
    assert place.master_addr == "localhost"
    assert place.master_port != read_environment(MPIRUN | {"PMIX_NAMESPACE": "job-2"}).master_port
    place = read_environment(MPIEXEC)
    assert (place.rank, place.world_size, place.launcher) == (0, 2, "mpiexec")


@pytest.mark.parametrize("left", [
    {}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": "0"}, {"MASTER_PORT": "tcp://10.0.0.1:80"},
    # srun --ntasks=1 --mpi=pmi2, and without Slurm
    {"PMI_RANK": "0", "PMI_SIZE": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    {"PMI_RANK": "0", "PMI_SIZE": "1"}, {"PMI_SIZE": "1"},
])  # fmt: skip
def test_one_process(left):
    assert read_environment(left) == LaunchInfo(0, 1, 0, 1, "python")


@pytest.mark.parametrize("left", [
    {"RANK": "0"}, {"LOCAL_RANK": "3"}, {"RANK": "0", "LOCAL_RANK": "0"}, {"RANK": ""},  # of another job's shell
    {"PMI_RANK": "0", "PMI_SIZE": "1"}, {"PMI_RANK": "2", "PMI_SIZE": "4"}, {"PMI_RANK": "2"},  # srun --mpi=pmi2
    {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
])  # fmt: skip
def test_a_step_is_complete_by_itself(left):
    """A variable that was left in the shell which submitted the job is no launcher's."""
    assert read_environment(SRUN | {"MASTER_ADDR": "node1"} | left).rank == 2
    assert read_environment(SRUN | {"MASTER_ADDR": "node1"} | left).launcher == "srun"


def test_cray_pals():
    pals = {"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4", "PALS_LOCAL_RANKID": "1"}
    where = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    assert read_environment(pals | where) == LaunchInfo(5, 8, 1, 4, "mpiexec", "node1", 29500)
    one = {"PMI_RANK": "0", "PMI_SIZE": "2", "PALS_LOCAL_RANKID": "0", "PALS_LOCAL_SIZE": "2"}
    assert (read_environment(one).local_world_size, read_environment(one).master_addr) == (2, "localhost")


@pytest.mark.parametrize(("environment", "words"), [
    ({"RANK": "0"}, ["WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT", "RANK=0"]),
    ({"WORLD_SIZE": "2"}, ["missing RANK"]),
    (without(TORCHRUN, "MASTER_PORT"), ["missing MASTER_PORT"]),
    (TORCHRUN | {"RANK": "x"}, ["RANK='x'", "whole number"]),
    (TORCHRUN | {"LOCAL_WORLD_SIZE": "x"}, ["LOCAL_WORLD_SIZE='x'", "whole number"]),
    (TORCHRUN | {"RANK": "4"}, ["rank 4 of 4", "RANK=4, WORLD_SIZE=4"]),
    (TORCHRUN | {"MASTER_PORT": "http"}, ["MASTER_PORT='http'"]),
    (without(SRUN, "SLURM_LOCALID"), ["SLURM_LOCALID"]),
    (SRUN | {"WORLD_SIZE": "2"}, ["WORLD_SIZE=2", "4 tasks"]),
    (without(MPIRUN, "OMPI_COMM_WORLD_LOCAL_RANK"), ["OMPI_COMM_WORLD_LOCAL_RANK"]),
    (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "4"}, ["several nodes", "MASTER_ADDR"]),
    (without(MPIEXEC, "MPI_LOCALRANKID"), ["MPI_LOCALRANKID"]),
])  # fmt: skip
def test_half_set(capsys, environment, words):
    with pytest.raises(SystemExit) as ended:
        read_environment(environment)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines


class FakeCuda:
    """Stands for `torch.cuda` with a number of visible GPUs; there are none on the machine that runs this test."""

    def __init__(self, count):
        self.count, self.current = count, None

    def is_available(self):
        return self.count > 0

    def device_count(self):
        return self.count

    def set_device(self, index):
        self.current = index


@pytest.mark.parametrize(("gpus", "place", "shared", "index"), [
    (4, LaunchInfo(6, 8, 2, 4, "torchrun"), "0", 2),
    (1, LaunchInfo(6, 8, 2, 4, "srun"), "0", 0),  # --gpus-per-task=1: each task sees its own GPU as number 0
    (1, LaunchInfo(0, 1, 0, 1, "python"), "0", 0),
    (1, LaunchInfo(2, 3, 2, 3, "torchrun"), "1", 0),
    (2, LaunchInfo(3, 4, 3, 4, "torchrun"), "1", 1),
])  # fmt: skip
def test_which_gpu(monkeypatch, gpus, place, shared, index):
    monkeypatch.delenv("DEVICE", raising=False)
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", shared)
    cuda = FakeCuda(gpus)
    monkeypatch.setattr(ranks.torch, "cuda", cuda)
    assert choose_device("auto", place).index == index == cuda.current


@pytest.mark.parametrize(("wanted", "gpus", "place", "environment", "words"), [
    ("auto", 1, LaunchInfo(1, 2, 1, 2, "torchrun"), {}, ["local rank 1", "1 visible GPU", "DEVICE=cpu", "MULTI_RANK"]),
    ("auto", 2, LaunchInfo(2, 3, 2, 3, "srun"), {}, ["local rank 2", "2 visible GPU"]),
    ("cuda", 0, LaunchInfo(0, 1, 0, 1, "python"), {}, ["device=cuda", "no GPU"]),
    ("auto", 0, LaunchInfo(0, 1, 0, 1, "python"), {"SLURM_JOB_GPUS": "0,1"}, ["SLURM_JOB_GPUS=0,1", "DEVICE=cpu"]),
    ("auto", 0, LaunchInfo(0, 1, 0, 1, "python"), {"CUDA_VISIBLE_DEVICES": "GPU-1234"}, ["GPU-1234", "DEVICE=cpu"]),
    ("tpu", 0, LaunchInfo(0, 1, 0, 1, "python"), {}, ["tpu", "auto, cpu, cuda"]),
])  # fmt: skip
def test_no_gpu_for_this_rank(monkeypatch, capsys, wanted, gpus, place, environment, words):
    monkeypatch.delenv("DEVICE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks.torch, "cuda", FakeCuda(gpus))
    with pytest.raises(SystemExit):
        choose_device(wanted, place)
    line = capsys.readouterr().err
    assert all(word in line for word in words), line


def test_gpus_that_only_the_driver_sees(monkeypatch, capsys, tmp_path):
    """An error where the GPUs are ours; Slurm or the user may have hidden them."""
    monkeypatch.setattr(ranks.torch, "cuda", FakeCuda(0))
    monkeypatch.delenv("DEVICE", raising=False)
    assert [unused_gpus(env, tmp_path) for env in ({}, {"SLURM_JOB_ID": "1"})] == [0, 0]
    (tmp_path / "0000:01:00.0").mkdir()
    hidden = ({"SLURM_JOB_ID": "1"}, {"CUDA_VISIBLE_DEVICES": ""})
    assert [unused_gpus(env, tmp_path) for env in ({}, *hidden)] == [1, 0, 0]
    assert unused_gpus({}, tmp_path / "no driver") == 0
    monkeypatch.setattr(ranks, "unused_gpus", lambda environment: 1)
    with pytest.raises(SystemExit):
        choose_device("auto", LaunchInfo(0, 1, 0, 1, "python"))
    assert "the driver shows 1 GPU(s) but CUDA finds none" in capsys.readouterr().err
    monkeypatch.setenv("DEVICE", "cpu")
    assert choose_device("auto", LaunchInfo(0, 1, 0, 1, "python")).type == "cpu"


def test_device_from_the_cluster_profile(monkeypatch):
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setenv("SLURM_JOB_GPUS", "0,1")  # fake GPUs of the laptop cluster: allocated, but not there
    assert choose_device("auto", LaunchInfo(0, 1, 0, 1, "python")).type == "cpu"


@pytest.mark.parametrize("value", ["", "-1", " -1", "NoDevFiles", "none", "void"])
def test_hidden_gpus_are_not_allocated_ones(monkeypatch, value):
    """Some versions of Slurm say NoDevFiles where a job has no GPUs."""
    monkeypatch.delenv("DEVICE", raising=False)
    monkeypatch.setattr(ranks.torch, "cuda", FakeCuda(0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert choose_device("auto", LaunchInfo(0, 1, 0, 1, "python")).type == "cpu"


def test_a_script_for_one_process_refuses_two(group):
    for code, stderr in group(2)(SCRIPTS.ends, "ddp/single_device.py", ["--train.steps", "1"]):
        assert code == 2
        assert "is a script for one process, but torchrun started 2" in stderr


def test_every_rank_tells_torchrun_what_ended_it(group, tmp_path):
    """The line of a mistake goes into the file from which torchrun takes its root cause."""
    for rank, (code, stderr) in enumerate(group(2)(ON_RANKS.fails_with_error_file, str(tmp_path), "a mistake")):
        assert (code, stderr) == (2, f"[rank {rank}] error: a mistake\n")
        said = json.loads((tmp_path / f"error_{rank}.json").read_text())["message"]
        assert said["message"] == said["extraInfo"]["py_callstack"] == "a mistake"


@pytest.mark.parametrize("size", [2, 3])
def test_what_one_rank_finds_ends_all(group, size):
    """Whether rank 0 finds it or the last one: all end, with the same words."""
    for who in (0, size - 1):
        assert {answer[0] for answer in group(size)(ON_RANKS.one_has_a_problem, who)} == {2}
        assert all(f"rank {who} has it" in words for _, words in group(size)(ON_RANKS.one_has_a_problem, who))
    assert group(size)(ON_RANKS.one_has_a_problem, None) == [(0, "")] * size
    assert group(size)(ON_RANKS.gathered) == [(list(range(size)), "of rank 0")] * size


def test_the_first_rank_answers_for_all_or_ends_all(group):
    assert group(3)(ON_RANKS.first_answers, False) == [(0, "", ["called on rank 0"])] * 3
    for code, words, answers in group(3)(ON_RANKS.first_answers, True):
        assert (code, answers) == (2, [])
        assert "error: not possible on rank 0" in words


def test_restarted_ranks_are_refused_with_the_agents_store(group):
    """Gloo would try the addresses of the dead ones; with a store of their own ranks may join."""
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    [(code, words)] = group(1)(ON_RANKS.joins, agent | {"TORCHELASTIC_RESTART_COUNT": "1"}, 60)
    assert code == 2
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in words
    alone = {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(free_port())}
    assert group(1)(ON_RANKS.joins, alone | {"TORCHELASTIC_RESTART_COUNT": "1"}, 60) == [(0, "")]


def test_joining_applies_the_network_profile_first(group):
    """NCCL and Gloo read their variables when the group is made."""
    assert group(1)(ON_RANKS.variables_at_start, "ethernet") == [{"NCCL_IB_DISABLE": "1", "NCCL_DEBUG": "WARN"}]


def test_groups_of_a_mesh_wait_as_long_as_the_settings_say(group):
    assert group(2)(ON_RANKS.timeout_of_a_group, 17.0) == [17.0] * 2


def rank_0_of_2(port):
    return {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}  # fmt: skip


def test_port_in_use(group):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        [(code, words)] = group(1)(ON_RANKS.joins, rank_0_of_2(port), 20)
    assert code == 2
    assert f"port 127.0.0.1:{port} is in use" in words


NCCL_ERROR = """NCCL error in: ProcessGroupNCCL.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO for details)
ncclUnhandledCudaError: Call to CUDA function failed.
Last error:
Cuda failure 2 'out of memory'
Exception raised from create at NCCLUtils.cpp:94 (most recent call first):
frame #0: c10::Error::Error"""


def test_the_cause_that_nccl_names_is_in_the_line():
    """It stands below the first line; the host and the port are not to blame."""
    line = ranks.why_not_joined(LaunchInfo(1, 2, 1, 2, "torchrun", "a", 5), NCCL_ERROR, 9)
    assert line.startswith("rank 1 of 2: NCCL could not start") and "'out of memory'; check nvidia-smi" in line
    assert "a:5" not in line and "frame #0" not in line


def test_a_rank_that_never_comes(group):
    [(code, words)] = group(1)(ON_RANKS.joins, rank_0_of_2(free_port()), 1)
    assert code == 2
    assert "rank 0 of 2 could not join the others" in words
    assert "within 1 s" in words
