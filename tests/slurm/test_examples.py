"""The examples of slurm/ on the cluster: sweep, chain, preemption, salloc, unlike nodes, Jupyter."""

import contextlib
import json
import math
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from equality import SMALL, largest_difference, read_checkpoint, read_rows, read_validation
from launching import ROOT, SCRIPTS, assert_refused, kill_tree, run_command
from slurm_cluster import CLUSTER

pytestmark = pytest.mark.slurm
SHORT = ["--train.steps", "4", "--model.layers", "1"]
# Losses in fp32, summed in another order by each number of ranks: the project's bound for losses.
SAME = 1e-5


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_rows(folder)]


def world(folder: Path) -> tuple[int, list[str]]:
    record = json.loads((folder / "run.json").read_text())
    return record["world_size"], record["hosts"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> list[float]:
    """The losses of one process, without any launcher."""
    runs = tmp_path_factory.mktemp("one")
    command = [sys.executable, "ddp/train.py", *SHORT, "--run_name", "one"]
    run_command(command, RUNS_DIR=str(runs), DEVICE="cpu")
    return losses(runs / "one")


# ------------------------------------------------------------------------------------------------ sweep


def by_index(cluster) -> str:
    """The outputs of an array job, as its file names them."""
    return str(cluster.folder / "%x-%A_%a.out")


@pytest.mark.slow
def test_learning_rate_sweep(cluster, one_process):
    array = cluster.submit("slurm/learning_rate_sweep.sbatch", *SHORT, SBATCH_OUTPUT=by_index(cluster))
    for index in range(4):
        assert "finished after 4 of 4 steps" in cluster.completed(f"{array}_{index}")
    shown = [cluster.show(f"{array}_{index}") for index in range(4)]
    assert sorted(s["StartTime"] for s in shown)[2] >= min(s["EndTime"] for s in shown), "more than two ran at a time"

    folders = sorted((cluster.folder / "runs").glob(f"sweep-{array}-lr*"))
    assert [f.name.partition("-lr")[2] for f in folders] == ["1e-2", "1e-3", "3e-3", "3e-4"]
    for folder in folders:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["optimizer"]["lr"] == float(folder.name.partition("-lr")[2])
    assert losses(folders[2]) == pytest.approx(one_process, abs=SAME)  # 3e-3 is the default
    validation = {folder.name: read_validation(folder)[4] for folder in folders}
    assert len(set(validation.values())) == 4

    done = cluster.on_login("python", "slurm/report.py", *map(str, folders))
    head, *lines = [re.split(r" {2,}", line.strip()) for line in done.stdout.splitlines()]
    assert head[:7] == ["run", "ranks", "launcher", "steps", "first loss", "last loss", "val loss"]
    assert [line[0] for line in lines] == sorted(validation, key=validation.get), "the best first"
    for name, *cells in lines:
        first, *_, last = losses(cluster.folder / "runs" / name)
        assert cells[:6] == ["1", "torchrun", "4", f"{first:.4f}", f"{last:.4f}", f"{validation[name]:.4f}"]


@pytest.mark.slow
def test_sweep_index_out_of_range(cluster):
    array = cluster.submit("--array=7", "slurm/learning_rate_sweep.sbatch", SBATCH_OUTPUT=by_index(cluster))
    assert cluster.end_of(f"{array}_7") == "FAILED"
    output = cluster.output(f"{array}_7")
    assert "error: array index 7; expected 0 to 3; correct --array" in output and "run folder" not in output


@pytest.mark.slow
def test_one_task_of_the_sweep_is_requeued(cluster):
    """One of an array's tasks has the number of the whole array; when it is requeued, the others must go on."""
    long = ["--train.steps", "300", "--model.layers", "1"]
    array = cluster.submit("--array=0-1", "slurm/learning_rate_sweep.sbatch", *long, SBATCH_OUTPUT=by_index(cluster))
    for index in range(2):
        cluster.wait_for(f"{array}_{index}", "RUNNING")
    (namesake,) = [i for i in range(2) if cluster.show(f"{array}_{i}")["JobId"] == array]
    (other,) = {0, 1} - {namesake}
    cluster.wait_for_text(f"{array}_{namesake}", r"step +10 ")
    cluster.on_login("scancel", "--batch", "--signal=USR1", f"{array}_{namesake}")
    assert "resumed from" in cluster.completed(f"{array}_{namesake}", timeout=240)
    cluster.completed(f"{array}_{other}", timeout=240)
    assert cluster.show(f"{array}_{namesake}")["Restarts"] == "1"
    assert cluster.show(f"{array}_{other}")["Restarts"] == "0"


# ------------------------------------------------------------------------------------------------ chain


def chain(cluster, *settings: str) -> tuple[dict[str, str], Path]:
    """Run slurm/chain.sh; returns its three jobs by name, and the run folder that it announced."""
    said = cluster.on_login("slurm/chain.sh", *settings).stdout
    found = re.match(r"train (\d+), evaluate (\d+), report (\d+); run folder (\S+)\n", said)
    return dict(zip(("train", "evaluate", "report"), found.groups()[:3], strict=True)), Path(found[4])


@pytest.mark.slow
def test_chain(cluster):
    jobs, folder = chain(cluster, *SHORT)
    table = cluster.completed(jobs["report"])
    shown = {name: cluster.show(job) for name, job in jobs.items()}
    assert shown["train"]["EndTime"] <= shown["evaluate"]["StartTime"]
    assert shown["evaluate"]["EndTime"] <= shown["report"]["StartTime"]

    result = json.loads((folder / "evaluation.json").read_text())
    # Two ranks added up the run's own loss in smaller batches; sums of fp32 in another order.
    assert result["val_loss"] == pytest.approx(read_validation(folder)[4], abs=1e-6)
    assert (result["checkpoint"], result["steps"], result["tokens"]) == ("step_4", 4, 256 * 128)
    assert result["perplexity_per_byte"] == pytest.approx(2 ** result["bits_per_byte"])
    (line,) = [line.split() for line in table.splitlines() if line.startswith(folder.name)]
    assert line[1:4] == ["2", "torchrun", "4"] and line[6] == f"{result['val_loss']:.4f}"


@pytest.mark.slow
def test_chain_whose_training_fails(cluster):
    """The links behind it are cancelled, and never ran, instead of waiting for ever."""
    jobs, folder = chain(cluster, "--train.steps", "0")
    assert [cluster.end_of(job) for job in jobs.values()] == ["FAILED", "CANCELLED", "CANCELLED"]
    assert "train.steps = 0 cannot work; allowed: at least 1" in cluster.output(jobs["train"])
    assert cluster.output(jobs["evaluate"]) == cluster.output(jobs["report"]) == ""
    assert not folder.exists()


@pytest.fixture
def begun(tmp_path):
    """The folder of a run that has not made a step."""
    folder = tmp_path / "begun"
    folder.mkdir()
    for name, text in {"config.yaml": "seed: 1\n", "run.json": "{}", "metrics.jsonl": ""}.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "found 0 arguments; expected one run folder"),
        (["{tmp}/none"], "none holds no config.yaml; expected the folder of a run"),
        (["{tmp}/begun"], "begun holds no finished checkpoint"),
    ],
)
def test_nothing_to_evaluate(group, tmp_path, begun, arguments, words):
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    assert_refused(group(1)(SCRIPTS.ends, "slurm/evaluate.py", given), words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no run given; expected one or more folders"),
        (["{tmp}/none"], "run.json cannot be read (No such file or directory)"),
        (["{tmp}/begun"], "begun has no steps yet"),
        (["{tmp}/crashed"], "run.json (0 bytes) holds no JSON, as after a crash of the machine; remove it"),
    ],
)
def test_nothing_to_report(tmp_path, begun, arguments, words):
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    (tmp_path / "crashed").mkdir()
    (tmp_path / "crashed" / "run.json").touch()
    done = run_command([sys.executable, "slurm/report.py", *given], check=False)
    assert_refused([(done.returncode, done.stderr)], words)
    assert done.stdout == ""


@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
def test_evaluation_is_that_of_the_run(group, tmp_path, precision):
    """One process, batches of another size, the checkpoint of two ranks: the loss is the one that the run reported.

    fp64 within 1e-12; fp32 in another order of sums; bf16 within a rounding of 2^-8, and not in fp32.
    """
    run = tmp_path / "run"
    places = ["--runs_dir", str(tmp_path), "--run_name", "run", "--train.precision", precision]
    group(2)(SCRIPTS.train, "ddp/train.py", [*SMALL, "--train.steps", "2", *places, "--data.validation_samples", "26"])
    (printed,) = group(1)(SCRIPTS.printed, "slurm/evaluate.py", [str(run)])
    result = json.loads((run / "evaluation.json").read_text())
    bound = {"fp64": 1e-12, "fp32": 1e-6, "bf16": 1e-2}[precision]
    assert result["val_loss"] == pytest.approx(read_validation(run)[2], abs=bound)
    assert (result["checkpoint"], result["steps"], result["tokens"]) == ("step_2", 2, 26 * 16)
    assert result["bits_per_byte"] == pytest.approx(result["val_loss"] / math.log(2), rel=1e-12)
    assert result["perplexity_per_byte"] == pytest.approx(math.exp(result["val_loss"]), rel=1e-12)
    words = f"run after 2 steps: validation loss {result['val_loss']:.4f}, {result['bits_per_byte']:.4f} bits per byte"
    assert words in printed and f"perplexity {result['perplexity_per_byte']:.2f} per byte, over 416 bytes" in printed


def test_report_of_runs_made_by_hand(tmp_path):
    """The lowest validation loss first; the median rate leaves the first step out; an evaluation counts before a run's
    own last loss; a row that is half written does not count."""
    for name, first, own, evaluated in (("a", 5.0, 3.5, None), ("b", 4.0, 4.5, 2.25), ("c", 4.0, None, None)):
        (tmp_path / name).mkdir()
        record = {"world_size": 2, "launcher": "srun", "unit": "tokens"}
        (tmp_path / name / "run.json").write_text(json.dumps(record))
        rows = [{"step": i, "loss": first - i / 2, "tokens_per_second": [1, 7000, 9000, 8000][i],
                 "peak_memory_bytes": [1, 3, 2, 1][i] * 2**29} for i in range(4)]  # fmt: skip
        rows += [{"step": 2, "val_loss": 9.0}, {"step": 4, "val_loss": own}] if own else []
        lines = [json.dumps(row) for row in rows] + ['{"step": 4, "loss": 0.1']
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines))
        if evaluated:
            (tmp_path / name / "evaluation.json").write_text(json.dumps({"val_loss": evaluated}))
    folders = [str(tmp_path / name) for name in "cab"]
    done = run_command([sys.executable, "slurm/report.py", *folders])
    assert [re.split(r" {2,}", line.strip()) for line in done.stdout.splitlines()] == [
        ["run", "ranks", "launcher", "steps", "first loss", "last loss", "val loss", "tokens/s", "peak GiB"],
        ["b", "2", "srun", "4", "4.0000", "2.5000", "2.2500", "8,000", "1.50"],
        ["a", "2", "srun", "4", "5.0000", "3.5000", "3.5000", "8,000", "1.50"],
        ["c", "2", "srun", "4", "4.0000", "2.5000", "-", "8,000", "1.50"],
    ]


# ------------------------------------------------------------------------------------------------ preemption


@pytest.mark.slow
@pytest.mark.alone
def test_preempted_requeued_finished(cluster):
    """The urgent job is the same training, which nobody disturbs: both must end with the same weights."""
    steps = 120
    settings = ["--train.steps", str(steps), "--model.layers", "1", "--train.check_replicas_every", "0"]
    job = cluster.submit("--partition=preemptible", "--nodelist=node1", "slurm/preemption.sbatch", *settings)
    cluster.wait_for_text(job, r"step +0 ")
    urgent = cluster.submit("--nodelist=node1", "ddp/single_node.sbatch", *settings)
    cluster.completed(urgent)
    text = cluster.completed(job)

    assert (cluster.show(job)["Restarts"], cluster.show(urgent)["Restarts"]) == ("1", "0")
    assert text.count("preemption: Slurm wants the nodes back") == 1
    assert "*** STEP" not in text, "Slurm ended the training; it should have had the time to save and end by itself"
    stopped = int(re.search(r"stopped after (\d+) of", text)[1])
    assert 0 < stopped < steps and f"checkpoints/step_{stopped}: {stopped} steps done" in text
    assert not (cluster.folder / "runs" / f"stop-job{job}").exists()
    disturbed, other = cluster.run_folder(job), cluster.run_folder(urgent)
    assert [row["step"] for row in read_rows(disturbed)] == list(range(steps)), "every step once"
    assert losses(disturbed) == losses(other)  # two ranks: the sum of two gradients has one order only
    assert largest_difference(read_checkpoint(disturbed, steps), read_checkpoint(other, steps)) == 0


# ------------------------------------------------------------------------------------------------ salloc


@pytest.mark.slow
def test_interactive_steps(cluster, one_process):
    salloc = ["salloc", "--nodes=2", "--gpus-per-node=2", "slurm/interactive.sh"]
    done = cluster.on_login(*salloc, *SHORT, timeout=150)
    job = re.search(r"Granted job allocation (\d+)", done.stderr)[1]
    assert "0: node1 has GPUs 0,1\n" in done.stdout and "1: node2 has GPUs 0,1\n" in done.stdout
    assert "\n1 process on login\n" in done.stdout
    one, both = (cluster.folder / "runs" / f"interactive-{job}-{which}" for which in ("one-node", "all-nodes"))
    assert world(one) == (2, ["node1"]) and world(both) == (4, ["node1", "node2"])
    assert losses(one) == pytest.approx(one_process, abs=SAME)
    assert losses(both) == pytest.approx(one_process, abs=SAME)
    assert cluster.end_of(job) == "COMPLETED"  # the nodes were given back


@pytest.mark.slow
def test_shell_of_salloc(cluster):
    """Without a command salloc opens a shell on the first node; plain python is one process there, srun all tasks."""
    python = f"{sys.executable} -c 'import common.ranks as r; print(r.read_environment())'"
    typed = f"{python}; hostname; srun hostname; exit\n"
    salloc = ["script", "--quiet", "--return", "--command", "salloc --nodes=2 --gpus-per-node=2", "/dev/null"]
    done = cluster.on_login("bash", "-c", 'printf %s "$1" | "${@:2}"', "_", typed, *salloc, SHELL="/bin/bash")
    assert "LaunchInfo(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher='python'" in done.stdout
    assert sorted(re.findall(r"^node\d", done.stdout, re.MULTILINE)) == ["node1", "node1", "node2"]


# ------------------------------------------------------------------------------------------------ unlike nodes


@pytest.mark.slow
def test_heterogeneous(cluster, one_process):
    job = cluster.submit("slurm/heterogeneous.sbatch", *SHORT)
    cluster.completed(job)
    assert world(cluster.run_folder(job)) == (3, ["node1", "node2"])
    assert losses(cluster.run_folder(job)) == pytest.approx(one_process, abs=SAME)


# ------------------------------------------------------------------------------------------------ Jupyter


@contextlib.contextmanager
def forwarded(cluster, target: str):
    """The address on this machine that leads to HOST:PORT of the cluster."""
    command = [*CLUSTER, "--name", cluster.name, "forward", target, "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield re.match(r"(http://localhost:\d+) leads to", process.stdout.readline())[1]
    finally:
        kill_tree(process.pid)
        process.wait()
        process.stdout.close()


def request(url: str, token: str = "", method: str = "GET") -> tuple[int, str]:
    """Status and text of an answer; a server that is not up yet gets a minute."""
    headers = {"Authorization": f"token {token}"} if token else {}
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers, method=method), timeout=20) as got:
                return got.status, got.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)


@pytest.mark.slow
@pytest.mark.parametrize("ended_by", ["scancel", "the Shut Down of JupyterLab"])
def test_jupyter(cluster, tmp_path, ended_by):
    job = cluster.submit("slurm/jupyter.sbatch", JUPYTER_RUNTIME_DIR=str(tmp_path))
    text = cluster.wait_for_text(job, r"TensorBoard: http")
    port, token = re.search(r"JupyterLab:  http://localhost:(\d+)/lab\?token=(\w+)\n", text).groups()
    board_port = re.search(r"TensorBoard: http://localhost:(\d+)\n", text)[1]
    assert f"ssh -N -L {port}:node1:{port} -L {board_port}:node1:{board_port} " in text and "@login\n" in text
    (output,) = cluster.folder.glob(f"jupyter-{job}.out")
    assert output.stat().st_mode & 0o777 == 0o600

    with forwarded(cluster, f"node1:{port}") as notebook, forwarded(cluster, f"node1:{board_port}") as board:
        assert request(f"{notebook}/api/contents/slurm", token)[0] == 200
        for wrong in ("", "0" * len(token)):
            status, answer = request(f"{notebook}/api/contents/slurm", wrong)
            assert status == 403 and "job_env.sh" not in answer
        assert "TensorBoard" in request(board)[1]
        assert json.loads(request(f"{board}/data/environment")[1])["data_location"] == str(cluster.folder / "runs")
        servers = r"jupyter-lab|bin/tensorboard"
        assert len(cluster.pids("node1", servers)) == 2
        assert cluster.pids("node1", token) == [], "the token stands in a command line, for all to read"
        if ended_by == "scancel":
            cluster.on_login("scancel", job)
        else:
            assert request(f"{notebook}/api/shutdown", token, "POST")[0] == 200
    assert cluster.end_of(job) == ("CANCELLED" if ended_by == "scancel" else "COMPLETED")
    deadline = time.monotonic() + 30
    while (left := cluster.pids("node1", servers)) and time.monotonic() < deadline:
        time.sleep(0.2)  # the job is CANCELLED while Slurm still waits for its processes
    assert left == []
