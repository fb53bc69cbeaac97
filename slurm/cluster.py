"""A real Slurm cluster on one Linux machine: practise sbatch on a laptop, and test every job before the queue does.

    python slurm/cluster.py up --nodes 2 --gpus-per-node 2     # in about a second; make cluster-up
    python slurm/cluster.py exec sbatch ddp/multi_node.sbatch  # as on a login node: sbatch, squeue, srun, scancel …
    python slurm/cluster.py exec                               # a shell on the login node
    python slurm/cluster.py kill-node 2                        # pull the plug; start-node 2 boots it again
    python slurm/cluster.py throttle --rate 1gbit              # a slow network between the nodes, so that it shows
    python slurm/cluster.py forward node1:8888                 # reach a notebook in a job from your browser
    python slurm/cluster.py status
    python slurm/cluster.py down                               # nothing stays behind; make cluster-down

Slurm's own daemons run here, not an imitation. Each node is a set of Linux namespaces: it has a host name, a network
card (a virtual cable to a switch on the login node), processes, a local disk and shared memory of its own, and shares
all other files and the cores with your machine. GPUs are make-believe: Slurm counts and allocates them, and programs
run on the CPU. Works as root, and without where users may create namespaces. Needs only Python and Debian's packages.
"""

import argparse
import asyncio
import contextlib
import glob
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

DEFAULT = "tutorial"
NETWORK = "10.77.0"  # exists only inside the namespaces: it can meet neither your network nor another cluster's
TOOLS = {
    "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "ip": "iproute2", "tc": "iproute2",
    "unshare": "util-linux", "nsenter": "util-linux",
}  # fmt: skip
ROOT = os.geteuid() == 0
os.environ["PATH"] += os.pathsep + "/usr/sbin" + os.pathsep + "/sbin"

SLURM_CONF = """\
ClusterName={name}
SlurmctldHost=login({network}.254)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
# A requeued job waits until its old credential has expired: 120 s by default. Shorter than a launch on a busy machine
# may take, and tasks are refused.
AuthInfo=cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
PlugStackConfig={folder}/plugstack.conf
TaskProlog={folder}/task_prolog
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
# There is no accounting database; `sacct --completion` reads this file.
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed.txt
{filter}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_min_interval=0
LaunchParameters=use_interactive_step
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
GresTypes=gpu
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
MessageTimeout=10
KillWait=5
MinJobAge=86400
NodeName=DEFAULT CPUs={cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=2000000
NodeName=DEFAULT {gres} State=UNKNOWN
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=preemptible Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
"""

# Job files written for other clusters run here as they are: what only exists there is taken out, and said so.
CLI_FILTER = """\
local function replaced(options, option, known, default)
  local value = options[option]
  if value == nil or value == "" then return end
  for name in string.gmatch(value, "[^,]+") do
    if known[name] then
      options[option] = name
      return
    end
  end
  slurm.log_info("--%s=%s: this cluster has none, left out", option, value)
  options[option] = default
end

function slurm_cli_pre_submit(options, offset)
  replaced(options, "partition", {gpu = true, preemptible = true}, "gpu")
  for _, option in ipairs({"account", "bb", "constraint", "licenses", "qos", "reservation", "wckey"}) do
    replaced(options, option, {}, "")
  end
  for _, option in ipairs({"gpus", "gpus-per-node", "gpus-per-socket", "gpus-per-task"}) do
    if options[option] then  -- a100:4 is 4 here, and a100 is 1
      options[option] = string.match(":" .. options[option], ":(%d+)$") or "1"
    end
  end
  if options["gres"] then
    options["gres"] = string.gsub(options["gres"], "gpu:[%a_][%w_.-]*", "gpu")
  end
  return slurm.SUCCESS
end

function slurm_cli_setup_defaults(options, early) return slurm.SUCCESS end
function slurm_cli_post_submit(offset, job, step) return slurm.SUCCESS end
"""


def stop(message: str) -> NoReturn:
    """End with one line for a mistake that the user can mend; exit code 2."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


def run(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess:
    """Run a command of the set-up and return it; raise OSError with its last line of complaint when it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if check and done.returncode != 0:
        why = (done.stderr or done.stdout).strip().splitlines()
        raise OSError(f"{' '.join(map(str, command))}: {why[-1] if why else f'exit code {done.returncode}'}")
    return done


def user_name() -> str:
    """Who runs this, whatever the environment says; the number where the system has no name for it."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def state_folder() -> Path:
    """Return the folder of this user's clusters, which only this user can write, and which need not exist.

    What stands in it is run, killed and removed, by root as well. So it is none that another user could have made.
    """
    home = os.path.realpath(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"))
    folder = Path(home, "slurm-cluster")
    for above in folder.parents:
        with contextlib.suppress(FileNotFoundError):
            found = above.stat()
            if found.st_uid not in (0, os.getuid()) or found.st_mode & 0o1002 == 0o002:
                stop(f"{above} can be changed by other users; set XDG_STATE_HOME to a folder of yours")
    return folder


def require_own(folder: Path) -> None:
    """End with one line if something is there that is no folder of this user alone."""
    with contextlib.suppress(FileNotFoundError):
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            stop(f"{folder} is a link, or not yours alone (mode 0700); look at it, remove it, and start again")


class Machine:
    """The login node or a compute node: namespaces that live as long as their first process.

    The first process only sleeps; as process 1 of its own process namespace it takes all others with it when it dies,
    like a power switch. It ignores SIGCHLD so that the kernel buries orphans, which Slurm would otherwise wait for.
    """

    def __init__(self, cluster: "Cluster", name: str) -> None:
        self.cluster, self.name = cluster, name
        self.record = cluster.folder / f"{name}.machine"

    @property
    def pid(self) -> int:
        """The first process, as this machine's kernel numbers it; 0 when the machine is off."""
        try:
            pid, *identity = self.record.read_text().split()
            return int(pid) if identity == _identity(int(pid)) else 0
        except (OSError, ValueError):
            return 0

    def start(self) -> None:
        """Create the namespaces, and in them the host name, local disk, shared memory and loopback interface."""
        login = self.cluster.login
        if ROOT:
            enter, own = [], []
        elif self.name == "login":  # the user namespace in which an ordinary user may make networks
            enter, own = [], ["--user", "--map-root-user"]
        else:
            enter, own = ["nsenter", "-t", str(login.pid), "--user", "--preserve-credentials"], []
        unshare = ["unshare", *own, "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        first = ["env", "--ignore-signal=CHLD", "sleep", "infinity"]
        with open(self.cluster.folder / f"{self.name}.log", "w") as log:
            holder = subprocess.Popen(
                [*enter, *unshare, *first], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 10
        while (pid := _sleeping_child(holder.pid)) is None:
            if holder.poll() is not None or time.monotonic() > deadline:
                raise OSError(Path(log.name).read_text().strip() or f"{self.name} did not start within 10 s")
            time.sleep(0.01)
        self.record.write_text(" ".join([str(pid), *_identity(pid)]) + "\n")

        folder = self.cluster.folder
        disk = folder / f"disk-{self.name}"
        disk.mkdir(exist_ok=True)
        self.setup("mount", "--bind", folder / "hosts", "/etc/hosts")
        self.setup("mount", "--bind", disk, folder / "local")
        self.setup("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/dev/shm")
        self.setup("hostname", self.name)
        self.setup("ip", "link", "set", "lo", "up")

    def setup(self, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess:
        """Run a command with the right to change this machine's network and mounts. It sees the host's processes."""
        user = [] if ROOT else ["--user", "--preserve-credentials"]
        return run("nsenter", "-t", str(self.pid), *user, "--net", "--uts", "--mount", *command, check=check)

    def command(self, *command: str) -> list[str]:
        """The command line that runs `command` on this machine as its user, in the current folder."""
        inside = ["nsenter", "-t", str(self.pid), "--net", "--uts", "--mount", "--pid", f"--wd={os.getcwd()}"]
        if not ROOT:  # back from the namespace's root to the user's own name, as whom jobs are to run
            user = ["unshare", "--user", f"--map-user={os.getuid()}", f"--map-group={os.getgid()}"]
            inside += ["--user", "--preserve-credentials", *user]
        return [*inside, "--", *command]

    def kill(self) -> None:
        """Switch off: the kernel ends every process of the machine; then its network is gone as well."""
        if not (pid := self.pid):
            return
        process = os.pidfd_open(pid)  # from here on, this process and no later one of that number
        if self.pid:
            signal.pidfd_send_signal(process, signal.SIGKILL)
        os.close(process)
        deadline = time.monotonic() + 10
        while self.pid and time.monotonic() < deadline:
            time.sleep(0.01)
        self.record.unlink(missing_ok=True)


def _identity(pid: int) -> list[str]:
    """What tells a machine's first process from others: its network, start time (ticks since boot) and command."""
    network = os.readlink(f"/proc/{pid}/ns/net")
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return [network, started, *Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]]


def _sleeping_child(parent: int) -> int | None:
    """The child of `parent` once it has become `sleep`, or None."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                name, after = (entry / "stat").read_text().rpartition(")")[::2]
                if int(after.split()[1]) == parent and name.endswith("(sleep"):
                    return int(entry.name)
    return None


class Cluster:
    """A login node, which also runs the controller and the switch, and compute nodes node1, node2, …"""

    def __init__(self, name: str) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,30}", name):
            stop(f"cluster name {name!r}; expected up to 31 lower-case letters, digits and hyphens")
        self.name = name
        self.folder = state_folder() / name
        require_own(self.folder.parent)
        require_own(self.folder)
        self.login = Machine(self, "login")

    @property
    def nodes(self) -> list[Machine]:
        """The compute nodes, whether on or off."""
        count = int((self.folder / "count").read_text())
        return [Machine(self, f"node{i}") for i in range(1, count + 1)]

    def node(self, number: int) -> Machine:
        """Node `number`, counted from 1."""
        self.require_up()
        if not 1 <= number <= len(self.nodes):
            stop(f"there is no node {number}; cluster {self.name} has nodes 1 to {len(self.nodes)}")
        return self.nodes[number - 1]

    def require_up(self) -> None:
        """End with one line unless the cluster is up."""
        if not self.login.pid:
            stop(f"no cluster {self.name!r} is up; start one: make cluster-up, or python slurm/cluster.py up")

    def environment(self) -> dict[str, str]:
        """What a shell on the login node knows. Its GPUs cannot compute, hence DEVICE=cpu."""
        env = {
            "SLURM_CONF": f"{self.folder}/slurm.conf",
            "SLURM_CLUSTER_LOCAL": f"{self.folder}/local",
            "CLUSTER": "laptop",
            "DEVICE": "cpu",
            # Job files of real clusters load modules; a message is better than "command not found".
            "BASH_FUNC_module%%": '() { echo "module $*: this cluster has no modules; left out" >&2\n}',
        }
        if ROOT:  # Open MPI's mpirun refuses to run as root unless told twice
            env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        return {**env, **{k: v for k, v in os.environ.items() if k in ("CLUSTER", "DEVICE", "BASH_FUNC_module%%")}}

    def write_configuration(self, nodes: int, gpus: int, cpus: int) -> None:
        """Write slurm.conf and its companions into the cluster's folder."""
        folder, numbers = self.folder, range(1, nodes + 1)
        version = re.findall(r"\d+", run("slurmd", "-V").stdout)
        plugins = [
            f"{place}/cli_filter_lua.so" for place in ("/usr/lib*/*/slurm*", "/usr/lib*/slurm*", "/usr/local/lib/slurm")
        ]
        lua = any(glob.glob(pattern) for pattern in plugins)
        files = {
            "slurm.conf": SLURM_CONF.format(
                name=self.name, network=NETWORK, folder=folder, cpus=cpus,
                user=user_name(),
                filter="CliFilterPlugins=lua" if lua else "",
                gres=f"Gres=gpu:{gpus}" if gpus else "",
                nodes="\n".join(f"NodeName=node{i} NodeAddr={NETWORK}.{i}" for i in numbers),
            ),
            "gres.conf": f"AutoDetect=off\nNodeName=node[1-{nodes}] Name=gpu File={folder}/gpus/nvidia[0-{gpus - 1}]\n"
            if gpus
            else "",
            # Without control groups: not every machine lets an ordinary user make them.
            "cgroup.conf": f"CgroupPlugin={'disabled' if version >= ['24', '05'] else 'cgroup/v1'}\n",
            "mpi.conf": f"PMIxCliTmpDirBase={folder}/local\n",
            "plugstack.conf": "",
            "cli_filter.lua": CLI_FILTER,
            "task_prolog": f"#!/bin/sh\necho export TMPDIR={folder}/local\n",
            "hosts": "127.0.0.1 localhost\n::1 localhost\n" + "".join(
                # Programs that listen on IPv6 see an IPv4 peer under its mapped address, and ask for that one's name.
                f"{NETWORK}.{number} {name}\n::ffff:{NETWORK}.{number} {name}.cluster\n"
                for number, name in [(254, "login"), *((i, f"node{i}") for i in numbers)]
            ),
            "count": f"{nodes}\n",
        }  # fmt: skip
        for name in ("state", "local", "gpus", *(f"spool-node{i}" for i in numbers)):
            (folder / name).mkdir()
        for i in range(gpus):  # Slurm wants a device file for each GPU; these lead to /dev/null
            (folder / "gpus" / f"nvidia{i}").symlink_to("/dev/null")
        for name, text in files.items():
            (folder / name).write_text(text)
        (folder / "task_prolog").chmod(0o755)

    def up(self, nodes: int, gpus: int, cpus: int) -> None:
        """Start the login node with the controller, then all nodes; returns when every node is idle."""
        if self.login.pid:
            stop(f"cluster {self.name!r} is up already; end it with down, or give another one a --name")
        require_tools()
        if len(str(self.folder)) > 70:  # Slurm's sockets lie below, and their paths take 108 characters
            stop(f"{self.folder} is too long a path for Slurm's sockets; set XDG_STATE_HOME to a shorter one")
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self.folder.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.parent.mkdir(mode=0o700, exist_ok=True)
            self.folder.mkdir(mode=0o700)
        except OSError as error:
            stop(f"{self.folder}: {error.strerror}; set XDG_STATE_HOME to a folder of yours")
        try:
            self.write_configuration(nodes, gpus, cpus)
            self.login.start()
            for command in (
                "ip link add switch type bridge",
                f"ip addr add {NETWORK}.254/24 dev switch",
                "ip link set switch up",
            ):
                self.login.setup(*command.split())
            self.daemon(self.login, "slurmctld", "-c")
            for node in self.nodes:
                self.start_node(node)
            self.wait_until_idle()
        except OSError as error:
            lines = [line for log in self.folder.glob("*.log") for line in log.read_text().splitlines()]
            said = next((f" ({line})" for line in lines if "error:" in line), "")
            self.down()
            stop(f"the cluster did not start: {error}{said}. {WHERE_IT_RUNS}")

    def start_node(self, node: Machine) -> None:
        """Boot a node, connect it to the switch, start its slurmd."""
        number = node.name.removeprefix("node")
        node.start()
        cable = f"cable{number}"
        card = f"eth0 address 02:00:00:00:00:{int(number):02x}"  # which stays when the node is booted again
        self.login.setup(*f"ip link add {cable} type veth peer name {card} netns {node.pid}".split())
        self.login.setup(*f"ip link set {cable} master switch up".split())
        node.setup(*f"ip addr add {NETWORK}.{number}/24 dev eth0".split())
        node.setup("ip", "link", "set", "eth0", "up")
        if (self.folder / "rate").exists():
            self.throttle_node(node, (self.folder / "rate").read_text())
        self.daemon(node, "slurmd", "-N", node.name)

    def start_node_again(self, node: Machine, timeout_s: float = 90) -> None:
        """Boot a node that was switched off, and wait until jobs may start on it: a second, or a minute.

        slurmctld sends what a dead node has not answered once more after a minute. That may be the end of a step, and a
        job that was requeued meanwhile has a step of the same number: the node takes no jobs until the queue is empty.
        """
        self.ask("scontrol", "update", f"NodeName={node.name}", "State=DRAIN", "Reason=boots")
        self.start_node(node)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            queued = re.search(r"Agent queue size: *(\d+)", self.ask("sdiag"))
            if not queued or queued[1] == "0":
                break
            time.sleep(0.2)
        self.ask("scontrol", "update", f"NodeName={node.name}", "State=RESUME")
        self.wait_until_idle()

    def daemon(self, machine: Machine, *command: str) -> None:
        """Start one of Slurm's daemons on a machine; it puts itself into the background."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        environment["SLURM_CONF"] = f"{self.folder}/slurm.conf"
        with open(self.folder / f"{machine.name}.log", "a") as log:
            done = subprocess.run(
                machine.command(*command), env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/"
            )
        if done.returncode != 0:
            last = Path(log.name).read_text().strip().splitlines()
            raise OSError(f"{command[0]} on {machine.name}: {last[-1] if last else f'exit code {done.returncode}'}")

    def wait_until_idle(self, timeout_s: float = 20) -> None:
        """Wait until every node that is on has registered. Raises OSError after `timeout_s` seconds."""
        wanted, deadline, states = {node.name for node in self.nodes if node.pid}, time.monotonic() + timeout_s, ""
        while time.monotonic() < deadline:
            states = self.ask("sinfo", "-h", "-N", "-o", "%N %t")
            ready = {line.split()[0] for line in states.splitlines() if line.split()[1] in ("idle", "mix", "alloc")}
            if wanted <= ready:
                return
            time.sleep(0.05)
        raise OSError(
            f"nodes not ready within {timeout_s:g} s: {' '.join(states.split()) or 'no answer from slurmctld'};"
        )

    def ask(self, *command: str) -> str:
        """Output of a Slurm command on the login node; empty when it fails."""
        environment = os.environ | self.environment()
        done = subprocess.run(self.login.command(*command), env=environment, capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else ""

    def throttle_node(self, node: Machine, rate: str) -> None:
        """Limit what a node sends by a token bucket. Its queue is long: a short one would drop, and TCP would crawl."""
        if rate == "none":
            node.setup(*["tc", "qdisc", "del", "dev", "eth0", "root"], check=False)
        else:
            node.setup(*f"tc qdisc replace dev eth0 root tbf rate {rate} burst 256kb limit 16mb".split())

    def down(self) -> None:
        """Switch everything off and remove the folder."""
        if (self.folder / "count").exists():
            for machine in [*self.nodes, self.login]:
                machine.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()


WHERE_IT_RUNS = (
    "It needs Linux, and root or the right to create user namespaces (sysctl kernel.unprivileged_userns_clone=1, "
    "kernel.apparmor_restrict_unprivileged_userns=0); elsewhere run it in a privileged container or a virtual machine, "
    "or use the Docker Compose cluster"
)


def require_tools() -> None:
    """End with one line that says what to install unless everything is there."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if sys.platform != "linux":
        stop(f"Slurm on one machine: this is {sys.platform}. {WHERE_IT_RUNS}")
    if missing:
        packages = " ".join(dict.fromkeys(TOOLS[tool] for tool in missing))
        stop(
            f"not installed: {', '.join(missing)}; Debian and Ubuntu: apt-get install --no-install-recommends "
            f"{packages} (and systemctl disable --now slurmctld slurmd, which the packages start); other systems: "
            "packages of the same names, or the Docker Compose cluster"
        )


async def relay(listening: socket.socket, host: str, port: int) -> None:
    """Connect everyone who comes to the listening socket with host:port, until interrupted."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while block := await reader.read(65536):
                writer.write(block)
                await writer.drain()
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there_writer = await asyncio.open_connection(host, port)
        except OSError as error:
            print(f"{host}:{port}: {error.strerror}; is the job running, and does it listen there?", file=sys.stderr)
            writer.close()
            return
        await asyncio.gather(copy(reader, there_writer), copy(there_reader, writer))

    server = await asyncio.start_server(connect, sock=listening)
    await server.serve_forever()


def forward(cluster: Cluster, target: str, port: int | None) -> None:
    """Listen on this machine's loopback, and connect from the login node: what `ssh -L` does on a real cluster."""
    cluster.require_up()
    host, _, there = target.partition(":")
    if not there.isdigit():
        stop(f"forward {target!r}; expected HOST:PORT, such as node1:8888")
    listening = socket.socket()
    try:
        listening.bind(("127.0.0.1", int(there) if port is None else port))
    except OSError as error:
        stop(f"port {there if port is None else port} on this machine: {error.strerror}; choose another with --port")
    listening.listen()
    os.set_inheritable(listening.fileno(), True)  # bound here, it goes on listening here when we enter the namespace
    print(f"http://localhost:{listening.getsockname()[1]} leads to {target} until Ctrl-C", flush=True)
    user = [] if ROOT else ["--user", "--preserve-credentials"]
    enter = [
        "nsenter",
        "-t",
        str(cluster.login.pid),
        *user,
        "--net",
        "--mount",
    ]  # not its processes: a kill must reach us
    os.execvp(enter[0], [*enter, sys.executable, __file__, "relay", str(listening.fileno()), host, there])


def main() -> None:
    """The command line. Ends with 2 after one line for a mistake, else with the exit code of what it ran."""
    parser = argparse.ArgumentParser("slurm/cluster.py", description=__doc__.splitlines()[0])
    parser.add_argument("--name", default=os.environ.get("CLUSTER_NAME", DEFAULT), help="one of several clusters")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up = commands.add_parser("up", help="start it")
    up.add_argument("--nodes", type=int, default=2, help="compute nodes, 1 to 200 (default 2)")
    up.add_argument("--gpus-per-node", type=int, default=2, help="make-believe GPUs on each (default 2)")
    up.add_argument("--cpus-per-node", type=int, default=256, help="cores that each pretends to have (default 256)")
    commands.add_parser("down", help="end it")
    commands.add_parser("status", help="nodes, network and jobs")
    execute = commands.add_parser("exec", help="run a command on the login node; without one, a shell")
    execute.add_argument("argv", nargs=argparse.REMAINDER, metavar="CMD …")
    for name, text in (("kill-node", "switch a node off"), ("start-node", "switch it on again")):
        commands.add_parser(name, help=text).add_argument("number", type=int, metavar="N")
    throttle = commands.add_parser("throttle", help="limit what each node can send")
    throttle.add_argument("--rate", required=True, help="such as 1gbit or 300mbit; none takes the limit away")
    forwarding = commands.add_parser("forward", help="make HOST:PORT of a node reachable on this machine")
    forwarding.add_argument("target", metavar="HOST:PORT")
    forwarding.add_argument("--port", type=int, help="the port here (default: the same; 0: a free one)")
    if sys.argv[1:2] == ["relay"]:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(relay(socket.socket(fileno=int(sys.argv[2])), sys.argv[3], int(sys.argv[4])))
        return
    options = parser.parse_args()
    cluster = Cluster(options.name)

    if options.command == "up":
        for name, value, least, most in (
            ("--nodes", options.nodes, 1, 200),
            ("--gpus-per-node", options.gpus_per_node, 0, 64),
            ("--cpus-per-node", options.cpus_per_node, 1, 4096),
        ):
            if not least <= value <= most:
                stop(f"{name} {value}; expected {least} to {most}")
        cluster.up(options.nodes, options.gpus_per_node, options.cpus_per_node)
        print(f"cluster {cluster.name}: {options.nodes} nodes with {options.gpus_per_node} GPUs each, make-believe")
        print(f"log in with: python slurm/cluster.py {f'--name {cluster.name} ' * (cluster.name != DEFAULT)}exec")
    elif options.command == "down":
        cluster.down()
    elif options.command == "exec":
        cluster.require_up()
        inner = cluster.login.command(*(options.argv or [os.environ.get("SHELL", "/bin/bash")]))
        os.execvpe(inner[0], inner, os.environ | cluster.environment())
    elif options.command == "kill-node":
        cluster.node(options.number).kill()
    elif options.command == "start-node":
        node = cluster.node(options.number)
        if node.pid:
            stop(f"{node.name} is on")
        cluster.start_node_again(node)
    elif options.command == "throttle":
        cluster.require_up()
        if options.rate != "none" and not re.fullmatch(r"[1-9]\d*(kbit|mbit|gbit)", options.rate):
            stop(f"--rate {options.rate!r}; expected a number with kbit, mbit or gbit, such as 300mbit, or none")
        (cluster.folder / "rate").write_text(options.rate)
        for node in filter(lambda node: node.pid, cluster.nodes):
            cluster.throttle_node(node, options.rate)
    elif options.command == "forward":
        forward(cluster, options.target, options.port)
    elif options.command == "status":
        cluster.require_up()
        rate = (cluster.folder / "rate").read_text() if (cluster.folder / "rate").exists() else "none"
        print(f"cluster {cluster.name}, limit on each node's network: {rate}")
        print(cluster.ask("sinfo", "-N", "-o", "%8N %10P %8t %10G").rstrip())
        print(cluster.ask("squeue").rstrip())


if __name__ == "__main__":
    main()
