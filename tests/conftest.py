"""What all tests share: scripts started as users start them, and groups of ranks that are started once.

The modules that tests import stand in tests/support, which is on the path; tests/ is not, because its folders are
named like libraries.
"""

import fcntl
import os
import sys
import tempfile
from pathlib import Path

import fork_server
import pytest
import summary
from launching import SCRIPTS, Groups, run_command
from slurm_cluster import SlurmCluster, why_not

os.environ["OMP_NUM_THREADS"] = "1"  # ranks share the cores; more threads than cores are many times slower


def pytest_configure(config: pytest.Config) -> None:
    """Register the plugin that says what a run will do and what it did."""
    config.pluginmanager.register(summary.Summary(config), "summary")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Let one worker run all tests of a folder: ranks, the Slurm cluster and reference runs are started once for it."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFolder(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return summary.folder_of(nodeid)

    return ByFolder(config, log) if config.getoption("dist") == "loadscope" else None


# Tests of two seconds and more that `make test` leaves to `make test-all`, beside those that are marked in their files.
LEFT_TO_ALL = {
    line for line in Path(__file__).with_name("only_in_test_all.txt").read_text().splitlines() if line[:1] not in "#"
}


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the tests of that list as slow."""
    if item.nodeid.removeprefix("tests/") in LEFT_TO_ALL:
        item.add_marker(pytest.mark.slow)


# Those that take longest come first, so that no worker begins with one when the others have nothing left.
FIRST = ["slurm", "docs", "model_parallel", "from_scratch", "deepspeed", "fsdp", "planner", "lightning", "ddp"]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the folders in the order in which workers take them."""
    place = {folder: number for number, folder in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(summary.folder_of(item.nodeid), len(place)))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """With two tests at a time, one that is marked `alone` waits for the other to end, and keeps the next waiting."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    path = Path(tempfile.gettempdir()) / f"tests-{item.config.workerinput['testrunuid']}.lock"
    with path.open("a") as file:  # closing it gives the lock back
        fcntl.flock(file, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        return (yield)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the file that the tests have locked."""
    if hasattr(config, "workerinput"):
        (Path(tempfile.gettempdir()) / f"tests-{config.workerinput['testrunuid']}.lock").unlink(missing_ok=True)


@pytest.fixture
def launch(tmp_path):
    """Run a script under torchrun as a user does: `launch("ddp/train.py", "--train.steps", "3", nproc=2)`.

    nproc=0 is plain python. Run folders land in tmp_path/runs.
    """

    def start(script, *args, nproc=2, env=None, timeout=120, check=True):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
        launcher = torchrun if nproc else [sys.executable]
        environment = {"RUNS_DIR": str(tmp_path / "runs"), "DEVICE": "cpu"} | (env or {})
        return run_command([*launcher, str(script), *map(str, args)], timeout, check, **environment)

    return start


@pytest.fixture(scope="session")
def group():
    """`group(3)(ON_RANKS.function, *arguments)`: the results by rank; ranks stay up for the tests of one folder."""
    groups = Groups()
    yield groups
    groups.stop()


@pytest.fixture(scope="module", autouse=True)
def one_folder_at_a_time(request, group):
    """End the ranks of the folder before: they hold the libraries of all its lessons, a gigabyte each after a while."""
    folder = summary.folder_of(request.node.nodeid)
    group.enter(folder)
    fork_server.prepare_for(folder)


@pytest.fixture(scope="session")
def single_device(group, tmp_path_factory):
    """`single_device("--train.steps", "20")`: the folder of ddp/single_device.py's run, made once for each."""
    made = {}

    def get(*arguments):
        if arguments not in made:
            folder = tmp_path_factory.mktemp("single_device")
            places = ["--runs_dir", str(folder), "--run_name", "one"]
            group(1)(SCRIPTS.train, "ddp/single_device.py", [*arguments, *places])
            made[arguments] = folder / "one"
        return made[arguments]

    return get


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A Slurm cluster of two nodes with two GPUs each, started once; see tests/support/slurm_cluster.py."""
    if reason := why_not():
        if os.environ.get("REQUIRE_SLURM"):
            pytest.fail(reason)
        pytest.skip(reason)
    one = SlurmCluster(f"test-{os.getpid()}", tmp_path_factory.mktemp("cluster"))
    yield one
    one.down()
