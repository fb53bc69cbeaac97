"""slurm/cluster.py itself: what stands in its docstring, with and without root, and nothing left behind."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import pytest
from launching import ROOT, clean_environment, run_command
from slurm_cluster import CLUSTER, SlurmCluster

pytestmark = pytest.mark.slurm


@pytest.fixture
def own_cluster(cluster, tmp_path):
    """A second cluster beside the session's, for tests that change it. (`cluster` skips where Slurm is missing.)"""
    one = SlurmCluster(f"test-own-{os.getpid()}", tmp_path, nodes=3, gpus=1)
    yield one
    one.down()


def namespaces() -> set[str]:
    """The network namespaces of all processes: one for each machine that is on."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                found.add(os.readlink(entry / "ns/net"))
    return found


@pytest.mark.slow
def test_two_clusters_at_once_and_nothing_left_behind(cluster, tmp_path):
    before = namespaces()
    interfaces = subprocess.run(["/usr/sbin/ip", "-br", "link"], capture_output=True, text=True).stdout
    other = SlurmCluster(f"test-other-{os.getpid()}", tmp_path, nodes=3, gpus=1)
    folder = Path(other.state_folder())
    try:
        job = other.submit("--nodes=3", "--wrap", "srun hostname; sleep 1000 & wait")
        other.wait_for_text(job, "node3")
        assert cluster.on_login("squeue", "-h").stdout == "", "a job of the other cluster"
        assert len(namespaces() - before) == 4
        assert sorted(other.output(job).split()) == ["node1", "node2", "node3"]
    finally:
        other.down()
    assert namespaces() <= before  # the job that was still running included
    assert not folder.exists()
    assert subprocess.run(["/usr/sbin/ip", "-br", "link"], capture_output=True, text=True).stdout == interfaces
    assert "login" in cluster.on_login("hostname").stdout  # the first goes on


def test_nodes_are_machines_of_their_own(cluster):
    script = (
        "hostname; ls /dev/shm | wc -l; touch /dev/shm/mine $TMPDIR/mine-$SLURM_JOB_ID; sleep 1; "
        "ls $TMPDIR/mine-* | wc -l; ps -e | grep -c slurmd$; ip -4 -br addr show eth0 | awk '{print $3}'"
    )
    done = cluster.on_login("srun", "--nodes=2", "--ntasks-per-node=1", "--label", "bash", "-c", script)
    said = {rank: re.findall(rf"^{rank}: (.*)$", done.stdout, re.MULTILINE) for rank in "01"}
    assert said == {"0": ["node1", "0", "1", "1", "10.77.0.1/24"], "1": ["node2", "0", "1", "1", "10.77.0.2/24"]}


def test_any_valid_job_file_runs(cluster, tmp_path):
    """A file as it was written for another site: partition, account, GPU type, modules and all."""
    foreign = tmp_path / "foreign.sbatch"
    foreign.write_text("""#!/bin/bash -l
#SBATCH --partition=workq
#SBATCH --account=k1234
#SBATCH --qos=high
#SBATCH --constraint="v100&gpu"
#SBATCH --reservation=training
#SBATCH --licenses=matlab:2
#SBATCH --gres=gpu:a100:2
#SBATCH -N 2
#SBATCH --ntasks-per-node=2
#SBATCH --mem=120G
#SBATCH --cpus-per-task=16
#SBATCH --exclusive
#SBATCH --hint=nomultithread
#SBATCH --mail-type=ALL
#SBATCH --mail-user=someone@example.org
set -e
module load cuda/12.4
srun --cpu-bind=cores --gpus-per-node=a100:2 bash -c 'echo rank $SLURM_PROCID gpus $CUDA_VISIBLE_DEVICES'
""")
    done = cluster.on_login("sbatch", str(foreign))
    for option in ("partition=workq", "account=k1234", "qos=high", "reservation=training", "licenses=matlab:2"):
        assert f"--{option}: this cluster has none, left out" in done.stderr
    output = cluster.completed(done.stdout.split()[-1])
    assert sorted(re.findall(r"rank .*", output)) == [f"rank {rank} gpus 0,1" for rank in range(4)]
    assert "module load cuda/12.4: this cluster has no modules; left out" in output


def test_kill_and_start_node(own_cluster):
    own_cluster("kill-node", "2")
    again = own_cluster("kill-node", "2")  # no harm done
    assert again.returncode == 0
    own_cluster("start-node", "2")
    states = own_cluster.on_login("sinfo", "--noheader", "--Node", "--format=%N %t").stdout.splitlines()
    assert set(map(str.strip, states)) == {"node1 idle", "node2 idle", "node3 idle"}, (
        "start-node ended before the node was back"
    )
    done = own_cluster.on_login("srun", "--nodes=3", "hostname")
    assert sorted(done.stdout.split()) == ["node1", "node2", "node3"]
    assert own_cluster("start-node", "2", check=False).stderr == "error: node2 is on\n"
    assert "there is no node 4" in own_cluster("kill-node", "4", check=False).stderr


@pytest.mark.slow
def test_throttle(own_cluster):
    """The token bucket is in place, holds bytes back, outlives a reboot of the node, and goes away again."""

    def bucket(node: str) -> dict:
        shown = own_cluster.on_login("srun", "-w", node, "tc", "-s", "-j", "qdisc", "show", "dev", "eth0").stdout
        return json.loads(shown)[0]

    send = "import socket; s = socket.create_connection(('node2', 9)); s.sendall(bytes(4 << 20))"
    receive = "import socket; l = socket.create_server(('', 9)); c, _ = l.accept(); n = 0\n"
    receive += "while b := c.recv(1 << 20): n += len(b)\nprint(n)"
    assert bucket("node1")["kind"] != "tbf"
    own_cluster("throttle", "--rate", "100mbit")
    assert "limit on each node's network: 100mbit" in own_cluster("status").stdout
    pair = f'[ $SLURM_PROCID = 1 ] && exec python3 -c "{receive}" || {{ sleep 1; exec python3 -c "{send}"; }}'
    done = own_cluster.on_login("srun", "--nodes=2", "--nodelist=node[1-2]", "bash", "-c", pair)
    assert done.stdout.strip() == str(4 << 20)
    slow = bucket("node1")
    assert (slow["kind"], slow["options"]["rate"]) == ("tbf", 100_000_000 // 8)
    assert slow["bytes"] > 4 << 20 and slow["overlimits"] > 0
    own_cluster("kill-node", "1")
    own_cluster("start-node", "1")
    assert bucket("node1")["kind"] == "tbf"
    own_cluster("throttle", "--rate", "none")
    assert bucket("node1")["kind"] != "tbf"


@pytest.mark.slow
def test_forward_reaches_a_server_in_a_job(cluster):
    job = cluster.submit("--wrap", "hostname; exec python3 -m http.server 8765 --directory slurm/profiles")
    cluster.wait_for_text(job, "node")
    node = cluster.show(job)["BatchHost"]
    forward = subprocess.Popen(
        [*CLUSTER, "--name", cluster.name, "forward", f"{node}:8765", "--port", "0"],
        stdout=subprocess.PIPE, text=True, env=clean_environment(),
    )  # fmt: skip
    try:
        url = forward.stdout.readline().split()[0]
        for _ in range(50):
            with contextlib.suppress(OSError):
                assert b"laptop.sh" in urllib.request.urlopen(url, timeout=5).read()
                break
        else:
            pytest.fail(f"nothing answered at {url}")
    finally:
        forward.kill()
        forward.communicate()
        cluster.on_login("scancel", job)
        cluster.end_of(job)


def test_accounting_of_finished_jobs(cluster):
    job = cluster.submit("--job-name=short", "--wrap", "true")
    cluster.completed(job)
    done = cluster.on_login("sacct", "--completion", "--noheader", "--parsable2", "--format", "jobid,jobname,state")
    assert f"{job}|short|COMPLETED" in done.stdout.splitlines()


def test_exit_code_and_arguments_pass_through_exec(cluster):
    done = cluster.on_login("bash", "-c", 'echo "$0|$1"; exit 7', "a b", "--c d", check=False)
    assert (done.returncode, done.stdout) == (7, "a b|--c d\n")


@pytest.mark.slow
def test_without_root(cluster):
    """An ordinary user starts a cluster, runs a job as himself, kills a node, and leaves nothing."""
    if os.geteuid() != 0:
        pytest.skip("these tests run without root already: all others have shown it")
    if not os.access("/usr/bin/python3", os.X_OK):
        pytest.skip("no /usr/bin/python3 that another user could run")
    allowed = subprocess.run(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "unshare", "-Ur", "true"])
    if allowed.returncode != 0:
        pytest.skip("this kernel lets only root create user namespaces")
    before = namespaces()
    folder = Path(tempfile.mkdtemp(prefix="rootless-", dir="/tmp"))
    folder.chmod(0o1777)
    shutil.copy(ROOT / "slurm" / "cluster.py", folder)
    script = f"""set -ex
    cd {folder}
    cluster() {{ /usr/bin/python3 cluster.py --name rootless "$@"; }}
    cluster up --nodes 2 --gpus-per-node 2
    cluster exec srun --nodes=2 --gpus-per-node=2 bash -c 'echo $(id -u) on $(hostname) gpus $CUDA_VISIBLE_DEVICES'
    cluster kill-node 2
    cluster throttle --rate 1gbit
    cluster start-node 2
    cluster exec sbatch --wait --nodes=2 --output={folder}/out --wrap 'srun hostname'
    sort {folder}/out
    cluster down
    """
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    try:
        done = run_command([*user, "bash", "-c", script], timeout=100, XDG_STATE_HOME=str(folder), HOME=str(folder))
        assert sorted(done.stdout.splitlines()[2:4]) == ["65534 on node1 gpus 0,1", "65534 on node2 gpus 0,1"]
        assert done.stdout.splitlines()[-2:] == ["node1", "node2"]
        assert sorted(path.name for path in folder.iterdir()) == ["cluster.py", "out"]
    finally:
        if (folder / "slurm-cluster").exists():
            down = ["/usr/bin/python3", str(folder / "cluster.py"), "--name", "rootless", "down"]
            subprocess.run([*user, "env", f"XDG_STATE_HOME={folder}", *down])
        shutil.rmtree(folder)
    assert namespaces() <= before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exec", "squeue"], "no cluster 'nobody' is up; start one: make cluster-up, or python slurm/cluster.py up"),
        (["kill-node", "1"], "no cluster 'nobody' is up"),
        (["status"], "no cluster 'nobody' is up"),
        (["up", "--nodes", "0"], "--nodes 0; expected 1 to 200"),
        (["up", "--gpus-per-node", "65"], "--gpus-per-node 65; expected 0 to 64"),
    ],
)
def test_bad_input(arguments, message):
    done = run_command([*CLUSTER, "--name", "nobody", *arguments], check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_bad_name_and_down_without_up():
    done = run_command([*CLUSTER, "--name", "../x", "up"], check=False)
    assert done.returncode == 2 and "cluster name '../x'; expected" in done.stderr
    assert run_command([*CLUSTER, "--name", "nobody", "down"]).stdout == ""


@pytest.mark.parametrize("command", [["up"], ["exec", "true"], ["down"]])
@pytest.mark.parametrize(("prepare", "words"), [
    ("ln -s victim slurm-cluster", "slurm-cluster is a link, or not yours alone"),
    ("mkdir -m 0755 slurm-cluster", "slurm-cluster is a link, or not yours alone"),
    ("mkdir -m 0700 slurm-cluster; ln -s ../victim slurm-cluster/nobody", "slurm-cluster/nobody is a link"),
    ("mkdir -m 0700 slurm-cluster; chmod 0777 .", "can be changed by other users"),
])  # fmt: skip
def test_files_that_another_user_can_have_made(tmp_path, command, prepare, words):
    victim = tmp_path / "victim" / "nobody"
    victim.mkdir(parents=True)
    (victim / "count").write_text("0\n")
    subprocess.run(["bash", "-c", prepare], cwd=tmp_path, check=True)
    done = run_command([*CLUSTER, "--name", "nobody", *command], check=False, XDG_STATE_HOME=str(tmp_path))
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert (victim / "count").exists()


def test_a_process_that_only_has_the_number_is_left_alone(tmp_path):
    """As after a reboot: the record names a process number, and another program has it now."""
    folder = tmp_path / "slurm-cluster" / "nobody"
    folder.mkdir(mode=0o700, parents=True)
    folder.parent.chmod(0o700)
    with subprocess.Popen(["sleep", "infinity"]) as other:
        network = os.readlink(f"/proc/{other.pid}/ns/net")
        (folder / "count").write_text("0\n")
        (folder / "login.machine").write_text(f"{other.pid} {network} 1 sleep infinity\n")
        assert run_command([*CLUSTER, "--name", "nobody", "down"], XDG_STATE_HOME=str(tmp_path)).returncode == 0
        assert other.poll() is None
        other.kill()
    assert not folder.parent.exists()


def test_says_what_to_install(tmp_path):
    script = (
        f"import os, runpy, shutil, sys; os.environ['PATH'] = {str(tmp_path)!r}; sys.argv[1:] = ['up']\n"
        # The script looks into /usr/sbin as well. Without the rest of PATH it finds neither sbatch nor unshare.
        "runpy.run_path('slurm/cluster.py', run_name='__main__')"
    )
    done = run_command([sys.executable, "-c", script], check=False, CLUSTER_NAME="nobody")
    assert done.returncode == 2
    assert "not installed: " in done.stderr and "sbatch" in done.stderr and "slurm-client" in done.stderr
    assert "apt-get install" in done.stderr and done.stderr.count("\n") == 1


def test_where_namespaces_are_forbidden(cluster):
    if os.geteuid() != 0:
        pytest.skip("only root can give up the capability that namespaces need")
    command = ["setpriv", "--bounding-set=-sys_admin", *CLUSTER, "--name", "forbidden", "up"]
    done = run_command(command, check=False)
    assert done.returncode == 2
    assert "unshare failed: Operation not permitted. It needs Linux, and root or the right to" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (Path(cluster.state_folder()).parent / "forbidden").exists()


def test_up_twice(cluster):
    done = cluster("up", check=False)
    assert done.returncode == 2 and "is up already" in done.stderr
    assert cluster.on_login("hostname").stdout == "login\n"
