"""What job files compute, and how they end: run in bash, with stand-ins for srun and scontrol (fake_slurm.py)."""

import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from fake_slurm import OPTION, FakeSlurm, job_files
from launching import ROOT

from common.launching.launch import fail

# A rank that trains until it is asked to stop, then saves.
UNTIL_ASKED = 'until [[ -e $STOP_FILE ]]; do sleep 0.02; done; echo "saved"'


@pytest.fixture
def slurm(tmp_path) -> FakeSlurm:
    return FakeSlurm(tmp_path)


def sourcing(folder: Path, options: str, then: str) -> Path:
    """A job file of one's own that sources job_env.sh."""
    path = folder / "own.sbatch"
    path.write_text(f"#!/bin/bash\n{options}\nsource {ROOT}/slurm/job_env.sh\n{then}\n")
    return path


TWO = "#SBATCH --nodes=2\n#SBATCH --gpus-per-node=2\n#SBATCH --cpus-per-task=4"
SHOWN = ("RANKS_PER_NODE", "RDZV_ID", "RDZV_ENDPOINT", "MASTER_ADDR", "MASTER_PORT", "SRUN_CPUS_PER_TASK",
         "OMP_NUM_THREADS", "STOP_FILE", "NCCL_DEBUG", "HF_HOME", "TORCH_HOME", "DEVICE",
         "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")  # fmt: skip


def learned(slurm: FakeSlurm, options: str = TWO, **environment: str) -> dict[str, str]:
    """What job_env.sh exports."""
    names = "|".join(SHOWN)
    file = sourcing(slurm.folder, options, f"env | grep -E '^({names})=' >{slurm.folder}/learned")
    ended = slurm.run(file, **environment)
    assert ended.code == 0, ended.output
    return dict(line.split("=", 1) for line in (slurm.folder / "learned").read_text().splitlines())


def test_what_a_job_learns(slurm):
    """Port and names derive from the job's number; ranks from its GPUs; threads from its cores."""
    found = learned(slurm, CLUSTER="default", OMP_NUM_THREADS="unset")
    endpoint = f"localhost:{slurm.port}"
    assert found | {"DEVICE": ""} == {
        "RANKS_PER_NODE": "2", "RDZV_ID": f"{slurm.job}-0", "RDZV_ENDPOINT": endpoint, "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(slurm.port), "SRUN_CPUS_PER_TASK": "4", "OMP_NUM_THREADS": "4",
        "STOP_FILE": str(slurm.runs / f"stop-job{slurm.job}"), "NCCL_DEBUG": "WARN", "DEVICE": "",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
    }  # fmt: skip
    again = learned(slurm, SLURM_RESTART_COUNT="2")
    assert again["RDZV_ID"] == f"{slurm.job}-2", "a rank left over from before a requeue could join"
    assert (again["DEVICE"], again["OMP_NUM_THREADS"]) == ("cpu", "1")  # the laptop's profile


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_CPUS_ON_NODE": "1", "OMP_NUM_THREADS": "unset", "CLUSTER": "default"}, {"OMP_NUM_THREADS": "1"}),
        ({"OMP_NUM_THREADS": "3", "CLUSTER": "default"}, {"OMP_NUM_THREADS": "3"}),
        ({"RANKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "unset"}, {"RANKS_PER_NODE": "1"}),
        ({"SLURM_GPUS": "a100:4"}, {"RANKS_PER_NODE": "2"}),  # a total that lies evenly
        ({"SLURM_CPUS_PER_TASK": "unset"}, {"SRUN_CPUS_PER_TASK": None}),
    ],
)
def test_settings_that_a_job_respects(slurm, environment, expected):
    found = learned(slurm, **environment)
    assert {name: found.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("environment", "warned"),
    [
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_GPUS_ON_NODE": "8"}, "8 cores for 8 ranks on a node"),
        ({"SLURM_CPUS_ON_NODE": "7"}, "7 cores for 2 ranks on a node"),
        ({"SLURM_CPUS_ON_NODE": "8"}, None),
        ({"SLURM_CPUS_ON_NODE": "1", "DEVICE": "cpu"}, None),
        ({"SLURM_CPUS_ON_NODE": "unset"}, None),  # what Slurm does not say is no reason to warn
    ],
)
def test_fewer_than_four_cores_a_rank_are_warned_about(slurm, environment, warned):
    """Raising --gpus-per-node alone leaves one core for each rank."""
    ended = slurm.run(sourcing(slurm.folder, TWO, "true"), **{"CLUSTER": "default"} | environment)
    lines = [line for line in ended.output.splitlines() if "warning" in line]
    assert ended.code == 0 and (not lines if warned is None else len(lines) == 1 and warned in lines[0]), ended.output


def test_a_port_that_is_taken_is_passed_over(slurm):
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", slurm.port))
        taken.listen()
        found = learned(slurm)
    assert found["RDZV_ENDPOINT"] == f"localhost:{slurm.port + 1}" and found["MASTER_PORT"] == str(slurm.port + 1)


def test_modules_caches_and_network_of_a_profile(slurm):
    mine = slurm.folder / "mine.sh"
    mine.write_text("MODULES=(cuda/13.0 openmpi) NETWORK_PROFILE=gcp CACHE=/scratch/cache\nexport DEVICE=cpu\n")
    module = 'module() { echo "$*" >"$FAKE_MODULES"; }; export -f module\n'
    told = slurm.folder / "modules"
    file = sourcing(slurm.folder, TWO, "echo $NCCL_IB_DISABLE $HF_HOME $TORCH_HOME")
    file.write_text(file.read_text().replace("source", f"{module}source", 1))
    ended = slurm.run(file, CLUSTER=str(mine), FAKE_MODULES=str(told), HF_HOME="/mine")
    assert ended.output.splitlines()[-1] == "1 /mine /scratch/cache/torch"
    assert told.read_text() == "load cuda/13.0 openmpi\n"


@pytest.mark.parametrize(
    ("message", "environment"),
    [
        ("Slurm does not say how many GPUs a node of this job has; submit it", {"SLURM_GPUS_ON_NODE": "unset"}),
        ("RANKS_PER_NODE=auto is no whole number from 1 on; correct it, or leave it out", {"RANKS_PER_NODE": "auto"}),
        ("RANKS_PER_NODE=0 is no whole number from 1 on", {"RANKS_PER_NODE": "0"}),
        ("RANKS_PER_NODE=-1 is no whole number from 1 on", {"RANKS_PER_NODE": "-1"}),
        ("RANKS_PER_NODE=a[$(touch x)] is no whole number", {"RANKS_PER_NODE": "a[$(touch x)]"}),
        ("RANKS_PER_NODE=many is no whole number", {"SLURM_GPUS_ON_NODE": "gpu:many"}),
        ("RESTARTS=some is no whole number from 0 on", {"RESTARTS": "some"}),
        ("CLUSTER=nowhere: there is no slurm/profiles/nowhere.sh; there are: aws-efa.sh", {"CLUSTER": "nowhere"}),
        ("there is no environment with torch in /no/such/environment", {"VENV": "/no/such/environment"}),
        ("--gpus=3 does not lie evenly on 2 nodes", {"SLURM_GPUS": "3"}),
        ("STAGE_ENV=1 copies an environment made by venv", {"STAGE_ENV": "1", "VENV": "{empty}"}),
        ("this is no Slurm job; submit the file with sbatch", {"SLURM_JOB_ID": "unset"}),
        ("profile {modules} loads modules (cuda), and there is no command module", {"CLUSTER": "{modules}"}),
        ("the run folder {modules} cannot be made; set RUNS_DIR", {"RUNS_DIR": "{modules}"}),
    ],
)
def test_one_line_for_settings_that_cannot_work(slurm, tmp_path, message, environment):
    empty, modules = tmp_path / "empty", tmp_path / "modules.sh"
    (empty / "bin").mkdir(parents=True)  # looks like an environment, but venv has not made it
    for program in ("python", "torchrun"):
        (empty / "bin" / program).symlink_to(Path(sys.executable).parent / program)
    modules.write_text("MODULES=(cuda)\n")
    places = {"empty": empty, "modules": modules}
    given = {name: value.format(**places) for name, value in environment.items()}
    ended = slurm.run(sourcing(tmp_path, TWO, "echo went on"), **given)
    lines = [line for line in ended.output.splitlines() if line.startswith("job_env")]
    assert ended.code == 2 and "went on" not in ended.output
    assert len(lines) == 1 and lines[0].startswith(f"job_env: error: {message.format(**places)}"), ended.output


def test_from_another_folder(slurm, tmp_path):
    ended = slurm.run(sourcing(tmp_path, TWO, "echo went on"), cwd=tmp_path)
    assert (ended.code, ended.output.count("\n")) == (2, 1)
    assert "submit it from the repository root" in ended.output


# --------------------------------------------------------------------------------------- before and beside the ranks


def test_the_bandwidth_gate_comes_first_and_stops_a_slow_job(slurm, tmp_path):
    """Its exit code 3 is the job's, and no rank of the training is started behind it."""
    file = sourcing(tmp_path, TWO, "srun train")
    ended = slurm.run(file, BANDWIDTH_GATE="20")
    gate, training = ended.of("srun")
    assert training == ["train"] and ended.code == 0
    assert gate[:4] == ["--kill-on-bad-exit=1", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    assert gate[4:7] == ["torchrun", "--nnodes=2", "--nproc-per-node=2"]
    assert f"--rdzv-id={slurm.job}-0-gate" in gate and f"--rdzv-endpoint=localhost:{slurm.port}" in gate
    words = ["collectives/bandwidth.py", "--collective", "all_reduce", "--minimum_gbytes_per_second", "20"]
    assert gate[-len(words) :] == words

    slow = 'echo "[rank 0] error: the fabric is too slow: 1 GB/s" >&2; exit 1'
    ended = slurm.run(file, BANDWIDTH_GATE="20", FAKE_SRUN=slow)
    assert ended.code == 3 and len(ended.of("srun")) == 1
    assert "bandwidth_gate: [rank 0] error: the fabric is too slow: 1 GB/s\n" in ended.output
    ended = slurm.run(file, BANDWIDTH_GATE="20", FAKE_SRUN="echo broken >&2; exit 9")
    assert ended.code == 9 and "broken" in ended.output and len(ended.of("srun")) == 1


def test_the_memory_logger_runs_beside_and_is_ended(slurm, tmp_path):
    ended = slurm.run(sourcing(tmp_path, TWO, "wait; exit 5"), MEMORY_LOG="7")
    (logger,) = ended.of("srun")
    assert logger[:4] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--overlap"]
    folder = str(slurm.runs / f"memory-job{slurm.job}")
    assert logger[4:] == ["python", "slurm/memory_logger.py", "--output", folder, "--interval", "7"]
    assert ended.of("scancel") == [["--quiet", "--signal=TERM", slurm.job]]
    assert ended.code == 5, "ending the logger must not change the job's exit code"


# ------------------------------------------------------------------------------------------------- how a job ends


@pytest.mark.parametrize("code", [0, 7])
def test_supervise_gives_the_exit_code_and_leaves_no_stop_file(slurm, tmp_path, code):
    slurm.runs.mkdir()
    (slurm.runs / f"stop-job{slurm.job}").touch()  # left over: it would stop the new ranks at their first step
    look = f'[[ ! -e $STOP_FILE ]] || echo "left over"; : >$STOP_FILE; exit {code}'
    ended = slurm.run(sourcing(tmp_path, TWO, "supervise srun a 'b c'"), FAKE_SRUN=look)
    assert ended.code == code and "left over" not in ended.output
    assert ended.of("srun") == [["a", "b c"]] and ended.of("scontrol") == [["show", "hostnames", "list"]]
    assert not list(slurm.runs.iterdir())


ARRAY = {"SLURM_ARRAY_JOB_ID": "900", "SLURM_ARRAY_TASK_ID": "2"}


@pytest.mark.parametrize(
    ("number", "after", "environment", "requeued"),
    [
        (signal.SIGUSR1, "", {}, "{job}"),
        (signal.SIGUSR1, "", ARRAY, "900_2"),  # the number of one task is that of the whole array, too
        (signal.SIGUSR1, "; exit 4", {}, None),  # nothing was saved: once more from the start would lose it again
        (signal.SIGTERM, "", {}, None),  # preempted or cancelled: Slurm itself decides
    ],
    ids=["USR1", "USR1 to a task of an array", "USR1, and the ranks fail", "TERM"],
)
def test_a_signal_lets_the_ranks_save_and_requeues(slurm, tmp_path, number, after, environment, requeued):
    file = sourcing(tmp_path, TWO, "supervise srun train")
    ended = slurm.signalled(number, file, FAKE_SRUN=UNTIL_ASKED + after, **environment)
    name = signal.Signals(number).name
    assert f"job_env: {name}: the ranks are asked to save and stop\nsaved\n" in ended.output
    calls = [words for words in ended.of("scontrol") if words[0] == "requeue"]
    assert calls == ([["requeue", requeued.format(job=slurm.job)]] if requeued else [])
    assert ended.code == (-signal.SIGTERM if requeued else 4 if after else 0)
    assert not list(slurm.runs.iterdir()), "the stop file would stop the requeued job at once"


SAVES = "mkdir -p {runs}/{name}/checkpoints/step_5; touch {runs}/{name}/checkpoints/step_5/manifest.json"


@pytest.mark.parametrize(
    ("name", "then", "environment", "requeued"),
    [
        ("ddp-train-job{job}", "exit 1", {"RESTARTS": "2"}, True),
        ("ddp-train-job{job}", "exit 1", {"RESTARTS": "2", "SLURM_RESTART_COUNT": "1"}, True),
        ("ddp-train-job{job}", "exit 1", {"RESTARTS": "2", "SLURM_RESTART_COUNT": "2"}, False),  # often enough
        ("ddp-train-job{job}", "exit 1", {}, False),  # not asked for
        ("ddp-train-job{job}", "exit 0", {"RESTARTS": "2"}, False),
        ("ddp-train-job{job}", "exit 2", {"RESTARTS": "2"}, False),  # the user's mistake
        ("ddp-train-job{job}", "touch $MISTAKE_FILE; exit 1", {"RESTARTS": "2"}, False),  # the same, under torchrun
        ("ddp-train-job1", "exit 1", {"RESTARTS": "2"}, False),  # another job's checkpoint
        ("mine", "exit 1", {"RESTARTS": "2", "NAMED": "1"}, True),
    ],
)
def test_a_job_that_failed_with_progress_is_requeued(slurm, tmp_path, name, then, environment, requeued):
    name = name.format(job=slurm.job)
    command = "supervise srun train" + (" --run_name mine" if "NAMED" in environment else "")
    saves = SAVES.format(runs=slurm.runs, name=name)
    ended = slurm.run(sourcing(tmp_path, TWO, command), FAKE_SRUN=f"sleep 0.05; {saves}; {then}", **environment)
    calls = [words for words in ended.of("scontrol") if words[0] == "requeue"]
    assert calls == ([["requeue", slurm.job]] if requeued else []), ended.output
    assert ended.code == (-signal.SIGTERM if requeued else int(then[-1]))
    assert [path.name for path in slurm.runs.iterdir()] == [name], "a mark of this attempt would tell on the next"


def test_a_job_that_failed_without_progress_is_not_requeued(slurm, tmp_path):
    """The checkpoint is there, and older than this start: the job would fail again where it just has."""
    old = slurm.runs / f"ddp-train-job{slurm.job}" / "checkpoints" / "step_5" / "manifest.json"
    old.parent.mkdir(parents=True)
    old.touch()
    os.utime(old, (time.time() - 60,) * 2)
    ended = slurm.run(sourcing(tmp_path, TWO, "supervise srun train"), FAKE_SRUN="exit 1", RESTARTS="3")
    assert ended.code == 1 and "no checkpoint is newer than this start" in ended.output
    assert not [words for words in ended.of("scontrol") if words[0] == "requeue"]


def test_a_mistake_of_the_user_leaves_a_mark_for_the_job(tmp_path, monkeypatch, capsys):
    """torchrun ends with 1, whatever its ranks ended with."""
    monkeypatch.setenv("MISTAKE_FILE", str(tmp_path / "mark"))
    for code in (1, 2):
        with pytest.raises(SystemExit):
            fail("a mistake", code)
        assert (tmp_path / "mark").exists() == (code == 2)


@pytest.mark.parametrize("after", ["", "; exit 4"])
def test_preemption_file_saves_and_requeues(slurm, after):
    ended = slurm.signalled(signal.SIGUSR1, "slurm/preemption.sbatch", FAKE_SRUN=UNTIL_ASKED + after)
    assert "preemption: Slurm wants the nodes back; the ranks are asked to save and stop\nsaved\n" in ended.output
    assert ended.of("scontrol") == ([] if after else [["requeue", slurm.job]])
    assert ended.code == (4 if after else ended.code)
    assert not list(slurm.runs.iterdir())


# ----------------------------------------------------------------------------------------------- what a file starts

OWN_TEST = {"slurm/jupyter.sbatch", "slurm/heterogeneous.sbatch"}
GIVEN = {"slurm/learning_rate_sweep.sbatch": {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "900"}}


@pytest.mark.parametrize("file", [file for file in job_files() if file not in OWN_TEST])
def test_a_job_file_starts_its_ranks_and_keeps_their_exit_code(slurm, file):
    """As many ranks as GPUs, all of them in one group, the arguments passed on, and a failure is the job's."""
    answers = {"FAKE_SRUN": "echo ok; exit 7", "FAKE_MPIRUN": "exit 7"}
    ended = slurm.run(file, "--train.steps", "a b", **answers, **GIVEN.get(file, {}))
    assert ended.code == 7, ended.output
    (words,) = ended.of("srun", "mpirun")
    options = dict(OPTION.findall((ROOT / file).read_text()))
    nodes, tasks, gpus = (int(options.get(name) or 1) for name in ("nodes", "ntasks-per-node", "gpus-per-node"))
    if ended.calls[-1][0] == "mpirun":
        assert words[:4] == ["-np", str(nodes * gpus), "--bind-to", "none"] and tasks == gpus
    else:
        assert words[0] == "--kill-on-bad-exit=1", "the other ranks would wait until the time limit"
    if "torchrun" in words:
        assert tasks == 1 and f"--nproc-per-node={gpus}" in words
        together = {f"--nnodes={nodes}", f"--rdzv-id={slurm.job}-0", f"--rdzv-endpoint=localhost:{slurm.port}",
                    "--rdzv-backend=c10d"}  # fmt: skip
        assert together <= set(words) or (nodes == 1 and "--standalone" in words), words
    elif gpus > 1:
        assert tasks == gpus
    if not file.startswith("prerequisites/"):
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        assert words[at + 1 : at + 3] == ["--train.steps", "a b"]
        assert (ROOT / words[at]).is_file()


TRAINS = [file for file in job_files() if re.search("^supervise |scontrol requeue", (ROOT / file).read_text(), re.M)]


@pytest.mark.parametrize("file", TRAINS)
def test_a_training_survives_its_time_limit(file):
    """Slurm warns the shell that has the trap, may start the job again, and then appends to its output."""
    text = (ROOT / file).read_text()
    assert re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", text, re.MULTILINE)
    first = text.split("#SBATCH hetjob")
    assert all(re.search(r"^#SBATCH --requeue$", part, re.MULTILINE) for part in first)
    assert re.search(r"^#SBATCH --open-mode=append$", text, re.MULTILINE)


def test_the_trainings_are_known():
    lessons = ("ddp", "fsdp", "deepspeed", "lightning", "from_scratch", "model_parallel")
    own = ("learning_rate_sweep", "mpi", "one_task_per_device", "preemption", "heterogeneous")
    expected = {f"{lesson}/{nodes}.sbatch" for lesson in lessons for nodes in ("single_node", "multi_node")}
    assert set(TRAINS) >= expected | {f"slurm/{name}.sbatch" for name in own}


def test_torchrun_waits_as_long_as_the_job_says(monkeypatch):
    """The variable is torch's; a release that forgets it would kill ranks in the middle of a checkpoint."""
    from torch.distributed.launcher.api import LaunchConfig

    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    assert LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1).shutdown_timeout == 600


def test_several_nodes_checks_both_launchers(slurm):
    """The second part starts one torchrun a node, and the third measures."""
    ended = slurm.run("prerequisites/checks/several_nodes.sbatch", FAKE_SRUN="echo ok fact")
    assert ended.code == 0 and ended.output.splitlines()[-1] == "PASSED several_nodes"
    ranks, launcher, bandwidth = ended.of("srun")
    assert ranks[1:] == ["python", "prerequisites/checks/check_devices.py"]
    assert {"--ntasks=2", "--ntasks-per-node=1", "--nnodes=2", "--nproc-per-node=2"} <= set(launcher)
    assert "collectives/bandwidth.py" in bandwidth


@pytest.mark.parametrize(("index", "rate"), [(0, "3e-4"), (1, "1e-3"), (2, "3e-3"), (3, "1e-2")])
def test_each_task_of_the_sweep_has_its_learning_rate(slurm, index, rate):
    task = {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_ARRAY_JOB_ID": "900"}
    (words,) = slurm.run("slurm/learning_rate_sweep.sbatch", "--seed", "3", **task).of("srun")
    assert (
        words[-7:] == ["ddp/train.py", "--seed", "3", "--optimizer.lr", rate, "--run_name", f"sweep-900-lr{rate}"][-7:]
    )


def test_the_sweep_has_as_many_tasks_as_rates(slurm):
    text = (ROOT / "slurm" / "learning_rate_sweep.sbatch").read_text()
    assert "#SBATCH --array=0-3%2\n" in text
    ended = slurm.run("slurm/learning_rate_sweep.sbatch", SLURM_ARRAY_TASK_ID="4", SLURM_ARRAY_JOB_ID="900")
    assert ended.code == 2 and "error: array index 4; expected 0 to 3; correct --array" in ended.output
    assert ended.of("srun") == []


def test_unlike_nodes_meet_in_one_group(slurm):
    """Three nodes with two GPUs and one: torchruns of 2 and 1 ranks in the same rendezvous of three."""
    parts = {"SLURM_GPUS_PER_NODE_HET_GROUP_0": "a100:2", "SLURM_GPUS_PER_NODE_HET_GROUP_1": "1",
             "SLURM_JOB_NUM_NODES_HET_GROUP_0": "2", "SLURM_JOB_NUM_NODES_HET_GROUP_1": "1",
             "FAKE_SRUN": "exit 7"}  # fmt: skip
    ended = slurm.run("slurm/heterogeneous.sbatch", "--seed", "3", **parts)
    assert ended.code == 7
    (words,) = ended.of("srun")
    at = words.index(":")
    assert words[0] == "--kill-on-bad-exit=1"
    meeting = ["--nnodes=3", "--rdzv-backend=c10d", f"--rdzv-id={slurm.job}-0",
               f"--rdzv-endpoint=localhost:{slurm.port}"]  # fmt: skip
    for part, group, ranks in ((words[1:at], 0, 2), (words[at + 1 :], 1, 1)):
        assert part == [f"--het-group={group}", "torchrun", *meeting, f"--nproc-per-node={ranks}", "ddp/train.py",
                        "--seed", "3"]  # fmt: skip
    ended = slurm.run("slurm/heterogeneous.sbatch", SLURM_GPUS_PER_NODE_HET_GROUP_0="2")
    assert ended.code == 2 and "this is no job of two parts with GPUs in both" in ended.output


def test_a_chain_waits_for_each_link(slurm):
    """evaluate waits for train, report for evaluate; all three are told the same run folder."""
    number = 'echo "$(($(tr -dc "\\036" <"$FAKE_CALLS" | wc -c) * 10))"'  # 10, 20, 30: one for each call so far
    ended = slurm.run("slurm/chain.sh", "--seed", "3", FAKE_SBATCH=number)
    assert ended.code == 0, ended.output
    train, evaluate, report = ended.of("sbatch")
    run = train[train.index("--run_name") + 1]
    assert train[:4] == ["--parsable", "ddp/single_node.sbatch", "--seed", "3"] and "--runs_dir" in train
    behind = ["--parsable", "--kill-on-invalid-dep=yes"]
    assert evaluate == [*behind, "--dependency=afterok:10", "slurm/evaluate.sbatch", f"{slurm.runs}/{run}"]
    assert report == [*behind, "--dependency=afterok:20", "slurm/report.sbatch", f"{slurm.runs}/{run}"]
    assert ended.output.startswith(f"train 10, evaluate 20, report 30; run folder {slurm.runs}/{run}\n")
    ended = slurm.run("slurm/chain.sh", FAKE_SBATCH="exit 1")
    assert ended.code == 1 and len(ended.of("sbatch")) == 1, "nothing is submitted behind a job that was refused"


def test_interactive_steps_start_one_node_then_all(slurm):
    options = {"SLURM_NNODES": "2", "SLURM_GPUS_PER_NODE": "a100:2", "FAKE_HOSTS": "localhost node2"}
    ended = slurm.run("slurm/interactive.sh", "--seed", "3", **options)
    assert ended.code == 0 and "1 process on" in ended.output, ended.output
    look, one, every = ended.of("srun")
    assert look[:3] == ["--nodes=2", "--ntasks-per-node=1", "--label"]
    names = [f"interactive-{slurm.job}-{which}" for which in ("one-node", "all-nodes")]
    assert one == ["--nodes=1", "--ntasks=1", "--kill-on-bad-exit=1", "torchrun", "--standalone", "--nproc-per-node=2",
                   "ddp/train.py", "--seed", "3", "--run_name", names[0]]  # fmt: skip
    assert every == ["--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "torchrun", "--nnodes=2",
                     "--nproc-per-node=2", "--rdzv-backend=c10d", f"--rdzv-id={slurm.job}-0",
                     f"--rdzv-endpoint=localhost:{slurm.port}", "ddp/train.py", "--seed", "3", "--run_name",
                     names[1]]  # fmt: skip


@pytest.mark.parametrize("how", [signal.SIGTERM, None])
def test_a_notebook_server_ends_with_its_job(slurm, tmp_path, how):
    """Whichever of the two servers ends first, or scancel, ends the job; the token is in no command line."""
    programs = tmp_path / "venv" / "bin"
    programs.mkdir(parents=True)
    last = "exec sleep 98" if how else f"until [[ -e {tmp_path}/jupyter ]]; do sleep 0.02; done; exit 6"
    answers = {"python": f'exec {sys.executable} "$@"', "torchrun": "exit 1"}
    for program, then in (("jupyter", "exec sleep 99"), ("tensorboard", last)):
        said = tmp_path / program
        answers[program] = f'echo "$@" $JUPYTER_TOKEN >{said}.new; mv {said}.new {said}\n{then}'
    for program, text in answers.items():
        (programs / program).write_text(f"#!/bin/bash\n{text}\n")
        (programs / program).chmod(0o755)
    process = slurm.start("slurm/jupyter.sbatch", VENV=str(tmp_path / "venv"))
    deadline = time.monotonic() + 60
    while how and not all((tmp_path / program).exists() for program in ("jupyter", "tensorboard")):
        assert process.poll() is None and time.monotonic() < deadline, slurm.end(process).output
        time.sleep(0.02)
    if how:
        time.sleep(0.1)  # the shell is then in its wait
        os.kill(process.pid, how)
    ended = slurm.end(process)
    assert ended.code == (128 + how if how else 6), ended.output
    token = re.search(rf"JupyterLab:  http://localhost:{slurm.port}/lab\?token=(\w{{48}})\n", ended.output)[1]
    words = (tmp_path / "jupyter").read_text().split()
    assert words[-1] == token and not any(token in word for word in words[:-1])
    assert {f"--port={slurm.port}", "--ip=localhost", "--ServerApp.port_retries=0"} <= set(words)
    assert f"-L {slurm.port}:localhost:{slurm.port} -L {slurm.port + 1}:localhost:{slurm.port + 1}" in ended.output
    assert f"--port={slurm.port + 1}" in (tmp_path / "tensorboard").read_text()
