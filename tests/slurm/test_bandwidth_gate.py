"""How the gate before a job is called wrongly; on a real cluster it is tested with the sbatch files."""

import pytest
from launching import ROOT, run_command

GATE = str(ROOT / "slurm" / "bandwidth_gate.sh")
JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_NNODES": "2",
    "RDZV_ID": "7-0",
    "RDZV_ENDPOINT": "node1:20007",
    "RANKS_PER_NODE": "2",
}


@pytest.mark.parametrize(("arguments", "environment", "words"), [
    ([], JOB, ["found ''", "GB/s"]),
    (["fast"], JOB, ["found 'fast'", "one number"]),
    (["-1"], JOB, ["found '-1'"]),
    (["."], JOB, ["found '.'"]),
    (["20", "30"], JOB, ["found '20 30'"]),
    (["20"], {}, ["no Slurm job", "sbatch"]),
    (["20"], JOB | {"RDZV_ENDPOINT": ""}, ["RDZV_ENDPOINT is not set", "slurm/job_env.sh"]),
    ([".5"], JOB | {"RANKS_PER_NODE": ""}, ["RANKS_PER_NODE is not set"]),
])  # fmt: skip
def test_one_line_when_called_wrongly(arguments, environment, words):
    unset = {"RDZV_ID": "", "RDZV_ENDPOINT": "", "RANKS_PER_NODE": ""}
    result = run_command([GATE, *arguments], timeout=30, check=False, **(unset | environment))
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("bandwidth_gate: error: ") and all(word in line for word in words), line
