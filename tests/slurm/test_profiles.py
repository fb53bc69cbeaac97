"""Cluster profiles: what the login shell and the job take from them."""

import subprocess

import pytest
from launching import ROOT, clean_environment

from common.launching import network

PROFILES = sorted(path.stem for path in (ROOT / "slurm" / "profiles").glob("*.sh"))


def shell(script: str, **environment: str) -> subprocess.CompletedProcess:
    """Run bash from the repository root, without what a login shell may have chosen already."""
    env = {k: v for k, v in clean_environment().items() if not k.startswith(("SBATCH_", "SALLOC_"))}
    env.pop("CLUSTER", None)
    return subprocess.run(["bash", "-c", script], cwd=ROOT, env=env | environment, capture_output=True, text=True)


def test_the_clusters_of_the_readme_are_there():
    wanted = {"default", "laptop", "infiniband", "gcp", "aws-efa", "ibex", "shaheen3", "zaratan"}
    assert wanted <= set(PROFILES)


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_is_complete(name):
    """It stands under the strictest shell, and names a network profile that exists."""
    done = shell(f"set -euo pipefail; source slurm/profiles/{name}.sh; echo $NETWORK_PROFILE ${{#MODULES[@]}}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] in network.PROFILES


def test_the_default_tunes_nothing():
    look = "env | grep -v '^_=' | sort"
    done = shell(f'before=$({look}); source slurm/profiles/default.sh; diff <(echo "$before") <({look})')
    assert (done.returncode, done.stdout) == (0, "")
    assert not any(v.name.startswith("NCCL_") and v.name != "NCCL_DEBUG" for v in network.rows("default"))


def test_use_cluster_prepares_the_login_shell(tmp_path):
    mine = tmp_path / "mine.sh"
    mine.write_text(
        "PARTITION=batch ACCOUNT=${ACCOUNT:-} CONSTRAINT=v100 QOS= MODULES=()\nexport NCCL_SOCKET_IFNAME=ib0\n"
    )
    show = "env | grep -E '^(SBATCH|SALLOC|SLURM|CLUSTER|NCCL)' | sort"
    done = shell(f"source slurm/use_cluster.sh {mine} >/dev/null; {show}", ACCOUNT="k1")
    wanted = {f"{program}_{what}" for program in ("SBATCH", "SALLOC", "SLURM")
              for what in ("PARTITION=batch", "ACCOUNT=k1", "CONSTRAINT=v100")}  # fmt: skip
    assert set(done.stdout.split()) == wanted | {f"CLUSTER={mine}"}  # what is for the job stays out of this shell

    # Another choice takes back what the first has set; CLUSTER itself is a choice, too.
    done = shell(f"source slurm/use_cluster.sh {mine}; CLUSTER=default; source slurm/use_cluster.sh >/dev/null; {show}")
    assert done.stdout.splitlines()[-1] == "CLUSTER=default"
    assert "SBATCH_PARTITION" not in done.stdout


@pytest.mark.parametrize("choice", ["nowhere", "", "/no/such/profile.sh"])
def test_unknown_cluster(choice):
    done = shell(f"source slurm/use_cluster.sh {choice}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "expected one of aws-efa.sh default.sh" in done.stderr


@pytest.mark.slow
@pytest.mark.slurm
def test_a_profile_of_ones_own_in_a_job(cluster, tmp_path):
    mine = tmp_path / "mine.sh"
    mine.write_text(
        "MODULES=(cuda/13.0 openmpi) NETWORK_PROFILE=gcp CACHE=/scratch/cache\nexport DEVICE=cpu OMP_NUM_THREADS=3\n"
    )
    script = tmp_path / "job.sbatch"
    script.write_text(
        "#!/bin/bash\n#SBATCH --gpus-per-node=2\nsource slurm/job_env.sh\n"
        "srun bash -c 'echo $NCCL_IB_DISABLE $HF_HOME $TORCH_HOME $OMP_NUM_THREADS $RANKS_PER_NODE'\n"
    )
    output = cluster.completed(cluster.submit(str(script), CLUSTER=str(mine)))
    assert "module load cuda/13.0 openmpi: this cluster has no modules; left out" in output
    assert "1 /scratch/cache/huggingface /scratch/cache/torch 3 2" in output
