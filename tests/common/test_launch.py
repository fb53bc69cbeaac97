"""Every variable of every launcher with values that it cannot have: one line and exit code 2, never a traceback."""

from contextlib import redirect_stderr
from io import StringIO

import pytest
from launchers import MPIEXEC, MPIRUN, SRUN, TORCHRUN

from common.launching import launch

PALS = {"PMI_RANK": "0", "PMI_SIZE": "2", "PMI_LOCAL_RANK": "0", "PMI_LOCAL_SIZE": "2"}
WHERE = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
LAUNCHERS = {"torchrun": TORCHRUN, "srun": SRUN | {"SLURM_NODEID": "1", "WORLD_SIZE": "4"} | WHERE,
             "mpirun": MPIRUN | WHERE, "mpiexec": MPIEXEC | WHERE, "pals": PALS | WHERE,
             "python": WHERE | {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}}  # fmt: skip
ODD = ["", " ", "auto", "abc", "x", "-1", "0", "1", "4", "5", "99", "1.5", "1e3", "0x2", "٣", "²", "9" * 5000, "None",
       "tcp://10.0.0.1:80", "node1:29500", "[::1]", "2(x2)", "2(x", "2(x9999999)", "2,,2", "(x2)", "a b", "\n",
       None]  # fmt: skip
CASES = [(name, variable) for name, environment in LAUNCHERS.items() for variable in environment]


def read(environment):
    """What is read, or the exit code and the lines on stderr."""
    stderr = StringIO()
    try:
        with redirect_stderr(stderr):
            return launch.read_environment(environment), 0, []
    except SystemExit as ended:
        return None, ended.code, stderr.getvalue().splitlines()


@pytest.mark.parametrize(("launcher", "variable"), CASES)
def test_never_a_traceback(monkeypatch, launcher, variable):
    monkeypatch.setattr(launch.shutil, "which", lambda name: None)
    environment = LAUNCHERS[launcher]
    assert launch.read_environment(environment)
    for value in ODD:
        odd = {name: text for name, text in (environment | {variable: value}).items() if text is not None}
        info, code, lines = read(odd)
        if info is None:
            assert (code, len(lines)) == (2, 1), value
            # Without its variable, or with one task in the step, a launcher is not recognized: another one is named.
            named = variable in lines[0] and " ".join(repr(value)[1:-1].split()) in lines[0]
            assert named or value in (None, "1"), lines
            assert any(word in lines[0] for word in ("unset", "export", "set it")), f"nothing to do: {lines}"
            continue
        assert 0 <= info.rank < info.world_size and 0 <= info.local_rank < info.local_world_size <= info.world_size
        if info.launcher != "python":
            assert 0 < info.master_port < 65536 and info.master_addr.strip()


@pytest.mark.parametrize(("odd", "words"), [
    ({"MASTER_PORT": "tcp://10.0.0.1:80"}, "MASTER_PORT='tcp://10.0.0.1:80' is not a port number"),
    ({"WORLD_SIZE": "auto"}, "WORLD_SIZE='auto' in the environment is not a whole number from 1 on"),
    ({"SLURM_STEP_TASKS_PER_NODE": "x"}, "SLURM_STEP_TASKS_PER_NODE='x' in the environment is no list"),
    ({"SLURM_NODEID": "2"}, "SLURM_NODEID=2, but SLURM_STEP_TASKS_PER_NODE='2(x2)' has 2 node(s)"),
    ({"SLURM_PROCID": "4"}, "SLURM_PROCID=4, SLURM_STEP_NUM_TASKS=4"),
    ({"SLURM_LOCALID": "-1"}, "SLURM_LOCALID='-1' in the environment is not a whole number from 0 on"),
])  # fmt: skip
def test_what_is_said(capsys, odd, words):
    with pytest.raises(SystemExit):
        launch.read_environment(LAUNCHERS["srun"] | odd)
    assert words in capsys.readouterr().err


def test_scontrol_that_does_not_answer(monkeypatch, tmp_path):
    """The list is read without it."""
    broken = tmp_path / "scontrol"
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o755)
    monkeypatch.setattr(launch.shutil, "which", lambda name: str(broken))
    assert launch._first_host("node[3-5]") == "node3"
