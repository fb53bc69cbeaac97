"""The linter for sbatch files: each fault is reported at its line, and nothing else; sound files are left alone."""

import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import sbatch_lint

# Two nodes with two GPUs each, and one torchrun a node: nothing is wrong with it. {} is where a fault goes.
TORCHRUN = (
    'srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_NNODES" --nproc-per-node=2 --rdzv-backend=c10d '
    '--rdzv-endpoint="$RDZV_ENDPOINT" ddp/train.py "$@"'
)
SOUND = f"""\
#!/bin/bash
#SBATCH --job-name=sound
#SBATCH --nodes=2   # a remark is allowed
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=4
#SBATCH --time=30
#SBATCH --output=slurm-%x-%4j.out

# sbatch --nodes=4 sound.sbatch
source slurm/job_env.sh
{TORCHRUN}
"""
MINIMAL = "#!/bin/bash\n#SBATCH --nodes=1\n#SBATCH --gpus-per-node=2\n"  # the command follows in line 4
PYTHON = 'srun --kill-on-bad-exit=1 python ddp/train.py "$@"\n'
ONE_NODE = "srun --kill-on-bad-exit=1 torchrun --standalone --nproc-per-node=2 ddp/train.py"


def found(text: str, path: Path = Path("/nowhere/job.sbatch")) -> list[tuple[int, str]]:
    return sbatch_lint.problems(path, text)


def line_of(text: str, part: str) -> int:
    return text.count("\n", 0, text.index(part)) + 1


DIRECTIVES = [  # lines that take the place of line 3 of SOUND; what the report says
    ("# SBATCH --nodes=2", "'# SBATCH' for a comment"),
    ("#sbatch --nodes=2", "'#sbatch' for a comment"),
    ("#SBTACH --nodes=2", "'#SBTACH' for a comment"),
    (" #SBATCH --nodes=2", "'#SBATCH' for a comment"),
    ("#SBATCH--nodes=2", "no blank behind #SBATCH"),
    ("#SBATCH --nodes=2 #SBATCH --requeue", "of which Slurm ignores the second"),
    ("#SBATCH --nodes=2 --exclusive", "two options on one line"),
    ("#SBATCH --mem=4G--nodes=2", "without a blank between them"),
    ("#SBATCH --nodse=2", "did you mean --nodes?"),
    ("#SBATCH --node=2", "no option --node that"),  # the beginning of three options
    ("#SBATCH --kill-on-bad-exit=1", "sbatch has no option --kill-on-bad-exit"),  # srun has
    ("#SBATCH -nodes=2", "write --nodes=2"),
    ("#SBATCH -Y", "no option -Y"),
    ("#SBATCH --nodes", "--nodes has no value"),
    ("#SBATCH --nodes=", "--nodes= has no value"),
    ("#SBATCH --nodes = 2", "has no value"),
    ("#SBATCH --requeue=yes", "takes no value"),
    ("#SBATCH nodes=2", "'nodes=2' is no option"),
    ("#SBATCH --job-name=other", "--job-name is sound in line 2, other here"),
    ("#SBATCH --chdir=$HOME/x", "does not expand"),
    ("#SBATCH --error=~/x", "does not expand"),
    ("#SBATCH --error=%J-%d.err", "no %d"),
    ("#SBATCH --time-min=1h", "1h is no time"),
    ("#SBATCH --time-min=1:2:3:4", "no time"),
    ("#SBATCH --requeue", "--open-mode=append"),
]


@pytest.mark.parametrize(("line", "words"), DIRECTIVES, ids=[line for line, _ in DIRECTIVES])
def test_directives(line, words):
    lines = SOUND.split("\n")
    reports = found("\n".join([*lines[:2], line, *lines[3:]]))
    assert [number for number, _ in reports] == [3] and words in reports[0][1], reports


COMMANDS = [  # (the file, the part of it that the report is about, what the report says)
    (SOUND.removeprefix("#!/bin/bash\n"), "#SBATCH --job-name", "no shebang"),
    (SOUND.replace("\n", "\r\n"), "#!", "as on Windows"),
    (SOUND + "if true; then\n  echo 'x'\ndone\n", "done\n", "bash: syntax error"),
    (SOUND + 'export ADDRESS=$(hostname)\necho "$ADDRESS"\n', "export ADDRESS", "shellcheck: Declare and assign"),
    (SOUND + "#SBATCH --mem=4G\n", "#SBATCH --mem", "behind the first command, line 11"),
    (SOUND.replace("#SBATCH --time", "#SBATCH --signal=USR1@60\n#SBATCH --time").replace("\nsrun", "\nsupervise srun"),
     "#SBATCH --signal", "--signal=B:USR1@60"),
    (SOUND.replace("#SBATCH --time", "#SBATCH --signal=TERM\n#SBATCH --time") + "trap 'echo bye' SIGTERM\n",
     "#SBATCH --signal", "--signal=B:TERM"),
    # files and arguments
    (SOUND.replace("ddp/train.py", "ddp/gone.py"), "srun", "no file ddp/gone.py"),
    (SOUND.replace("ddp/train.py", '"${SCRIPT:-ddp/gone.py}"'), "srun", "no file ddp/gone.py"),
    (SOUND.replace("slurm/job_env.sh", "slurm/job_environment.sh").replace("#SBATCH --cpus-per-task=4\n", ""),
     "source", "no file slurm/job_environment.sh"),
    (SOUND.replace('"$@"', "--config ddp/configs/gone.yaml"), "srun", "no file ddp/configs/gone.yaml"),
    (SOUND.replace('"$@"', "--train.stepz 5"), "srun", "train.stepz"),
    (SOUND.replace("--nnodes=", "--nodez="), "srun", "torchrun: "),
    (SOUND.replace("srun --kill", "srun --nodez=2 --kill"), "srun", "srun has no option --nodez"),
    # tasks and GPUs
    (SOUND.replace("--kill-on-bad-exit=1 ", ""), "srun", "add --kill-on-bad-exit=1"),
    (SOUND.replace("--kill-on-bad-exit=1", "--kill-on-bad-exit=0"), "srun", "add --kill-on-bad-exit=1"),
    (MINIMAL + "#SBATCH --ntasks-per-node=2\nsrun python ddp/train.py\n", "srun", "add --kill-on-bad-exit=1"),
    (SOUND.replace("--nproc-per-node=2", "--nproc-per-node=4"), "srun", "=4, and the job has 2 GPU(s)"),
    (SOUND.replace("--gpus-per-node=2", "--gres=gpu:a100:4"), "srun", "=2, and the job has 4 GPU(s)"),
    (SOUND.replace("--gpus-per-node=2", "--gpus=16"), "srun", "=2, and the job has 8 GPU(s)"),
    (MINIMAL + "torchrun --standalone --nproc_per_node 4 ddp/train.py\n", "torchrun", "=4, and the job has 2 GPU(s)"),
    (SOUND.replace("srun --kill-on-bad-exit=1 ", ""), "torchrun", "without srun runs on the first node alone"),
    (MINIMAL + "torchrun --nnodes=2 ddp/train.py\n", "torchrun", "--nnodes=2 without srun runs on the first node"),
    (MINIMAL + "torchrun --nnodes 1:4 ddp/train.py\n", "torchrun", "--nnodes=1:4 without srun runs on the first node"),
    (MINIMAL.replace("nodes=1", "nodes=2") + "torchrun --standalone ddp/train.py\n", "torchrun", "uses one of 2 nodes"),
    (SOUND.replace("--ntasks-per-node=1", "--ntasks-per-node=2"), "srun", "2 torchruns on a node"),
    (SOUND.replace("--ntasks-per-node=1", "--ntasks=4").replace("torchrun", "python -m torch.distributed.run"),
     "srun", "2 torchruns on a node"),
    (SOUND.replace("--gpus-per-node=2", "--gpus-per-task=1"), "srun", "--gpus-per-task hides"),
    (MINIMAL + "#SBATCH --ntasks-per-node=1\n" + PYTHON, "srun", "1 task(s) and 2 GPU(s)"),
    (MINIMAL + "#SBATCH --ntasks-per-node=4\ncd x || exit\n" + PYTHON.replace("ddp/", "x/"), "srun", "4 task(s) and 2"),
    (SOUND.replace(' --rdzv-backend=c10d --rdzv-endpoint="$RDZV_ENDPOINT"', ""), "srun", "no common meeting point"),
    (SOUND.replace("source slurm/job_env.sh", "set -eu"), "srun", "SRUN_CPUS_PER_TASK"),
    # the environment, ports, hidden failures
    (MINIMAL + "export MASTER_PORT=29500\n" + ONE_NODE, "export", "MASTER_PORT=29500: two jobs"),
    (MINIMAL + "export MASTER_PORT=${MASTER_PORT:-29500}\n" + ONE_NODE, "export", "MASTER_PORT=29500: two jobs"),
    (MINIMAL + ONE_NODE.replace("--standalone", "--master-port=29500"), "srun", "--master-port=29500: two jobs"),
    (SOUND.replace('"$RDZV_ENDPOINT"', '"$MASTER_ADDR:29500"'), "srun", "29500: two jobs"),
    (MINIMAL + "export CUDA_VISIBLE_DEVICES=0,1\n" + ONE_NODE, "export", "overrides what Slurm has given"),
    (MINIMAL + "CUDA_VISIBLE_DEVICES=0 " + ONE_NODE, "CUDA", "overrides what Slurm has given"),
    (MINIMAL + "export WORLD_SIZE=$SLURM_NNODES\n" + ONE_NODE, "export", "not the number of ranks"),
    (MINIMAL + "WORLD_SIZE=${SLURM_NNODES}\nexport WORLD_SIZE\n" + ONE_NODE, "WORLD_SIZE", "not the number of ranks"),
    (MINIMAL + "export RANK=$SLURM_PROCID\n" + ONE_NODE, "export", "the same for all ranks"),
    (MINIMAL + ONE_NODE + " || true\n", "srun", "is hidden"),
    (MINIMAL + ONE_NODE + ' \\\n  --train.steps 5 || echo "it failed"\n', "srun", "is hidden"),
    (MINIMAL + "host=$(scontrol show hostnames | head -n1 || echo localhost)\necho \"$host\"\n", "host=", "localhost"),
    (MINIMAL + f"code=0\nif ! {ONE_NODE}; then\n    code=$?\nfi\nexit $code\n", "code=$?", "stores 0"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "part", "words"), COMMANDS, ids=[f"{i}-{c[2]}" for i, c in enumerate(COMMANDS)])
def test_commands(text, part, words):
    reports = found(text)
    assert [number for number, _ in reports] == [line_of(text, part)] and words in reports[0][1], reports


@pytest.mark.parametrize(
    "option", ["--partition=gpu", "-A k01", "-C v100", "--qos=high", "--reservation=x", "--mail-user=me", "-L ansys"]
)
def test_site_facts_only_in_this_repository(option):
    text = SOUND.replace("#SBATCH --time", f"#SBATCH {option}\n#SBATCH --time")
    assert found(text) == []
    ((line, message),) = found(text, ROOT / "ddp" / "job.sbatch")
    assert line == 7 and "belongs in a profile under slurm/profiles/" in message


def test_job_env_only_in_this_repository():
    text = MINIMAL + ONE_NODE + "\n"
    assert found(text) == []
    ((line, message),) = found(text, ROOT / "ddp" / "job.sbatch")
    assert line == 4 and "source slurm/job_env.sh" in message
    reason = "# lint: without job_env: it shows how"
    assert found(text.replace("srun", f"{reason}\nsrun"), ROOT / "ddp" / "job.sbatch") == []
    assert len(found(text.replace("srun", "# lint: without job_env:\nsrun"), ROOT / "ddp" / "job.sbatch")) == 1


GOOD = {
    "sound": SOUND,
    "times": SOUND.replace("--time=30", "--time=1-12:00:00\n#SBATCH --time-min=1:0"),
    "short options": SOUND.replace("--nodes=2", "-N 2 -J sound"),
    "beginnings of names": SOUND.replace("--nodes=2", "--constr=a100"),
    "two parts": SOUND.replace("#SBATCH --time=30", "#SBATCH --time=30\n#SBATCH hetjob\n#SBATCH --time=20"),
    "signal for the ranks": SOUND.replace("--time=30", "--time=30\n#SBATCH --signal=USR1@60") + "trap 'ls' EXIT\n",
    "requeue": SOUND.replace("--time=30", "--time=30\n#SBATCH --requeue\n#SBATCH --open-mode=append"),
    "a remark": SOUND.replace("# sbatch", "# SBATCH lines - those above - come first.\n# sbatch"),
    "a file written by the job": SOUND + "cat >x.sbatch <<'END'\n#SBATCH --nodes=1\nexport RANK=1\nEND\n",
    "options in a variable": SOUND.replace('torchrun --nnodes="$SLURM_NNODES"', "torchrun $DISTRIBUTED").replace(
        ' --rdzv-backend=c10d --rdzv-endpoint="$RDZV_ENDPOINT"', ""
    ),
    "options in an array": MINIMAL.replace("nodes=1", "nodes=2")
    + "train=(torchrun --nnodes=2\n  --rdzv-endpoint=x)\n"
    + 'srun --kill-on-bad-exit=1 "${train[@]}" ddp/train.py\n',
    "variables as values": SOUND.replace('"$@"', '--train.precision "$PRECISION" --config "$CONFIG"'),
    "a shell inside": MINIMAL + "srun bash -c '\n  export RANK=$SLURM_PROCID\n  python gone.py\n'\n",
    "a function": MINIMAL + f'run() {{ "$@" || exit; }}\nrun {ONE_NODE}\n',
    "words only": MINIMAL + "echo srun torchrun --nproc-per-node=9 gone.py\n",
    "one step alone": SOUND + "srun --nodes=1 --ntasks=1 torchrun --standalone --nproc-per-node=2 ddp/train.py\n",
    "one agent a GPU": MINIMAL + "#SBATCH --ntasks-per-node=2\n"
    + 'srun --kill-on-bad-exit=1 torchrun --nnodes=2 --nproc-per-node=1 --rdzv-endpoint="$HOSTNAME:0" ddp/train.py\n',
    "one task a GPU": MINIMAL + "#SBATCH --ntasks-per-node=2\n" + PYTHON,
    "one process, by intent": MINIMAL + "#SBATCH --ntasks-per-node=2\nsrun --ntasks=1 python ddp/train.py\n",
    "one process for all GPUs": MINIMAL + "#SBATCH --ntasks-per-node=1\nsrun python /path/to/spawns.py\n",
    "no GPUs": "#!/bin/bash\nsrun python ddp/train.py\n",
    "a node of its own": MINIMAL + "#SBATCH --exclusive\nexport MASTER_PORT=29500\n" + ONE_NODE + "\n",
    "a port from the job": MINIMAL + "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 1000))\n" + ONE_NODE + "\n",
    "ranks counted by Slurm": MINIMAL + "export WORLD_SIZE=$SLURM_NTASKS CUDA_VISIBLE_DEVICES=\n" + ONE_NODE + "\n",
    "a failure that counts": MINIMAL + ONE_NODE + " || { echo failed; exit 1; }\nrm -f x || true\n",
    "CPUs of the step": SOUND.replace("source slurm/job_env.sh", "").replace("srun --", "srun -c 4 --"),
    "exported CPUs": SOUND.replace("source slurm/job_env.sh", "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"),
    "kill by environment": SOUND.replace("srun --kill-on-bad-exit=1", "export SLURM_KILL_BAD_EXIT=1\nsrun"),
    "another folder": SOUND.replace("\nsrun", "\ncd elsewhere || exit\nsrun").replace("ddp/train.py", "mine.py"),
    "options of plug-ins": MINIMAL + "#SBATCH --environment=/opt/a.toml\n#SBATCH --disable-dcgm\n" + ONE_NODE.replace(
        "srun", "srun --container-image=a#b:1 --container-mounts=/data:/data --no-container-mount-home"
    ) + "\n",
    "torchrun of one node": MINIMAL + "torchrun --nnodes=1 --nproc-per-node=2 ddp/train.py\n",
    "not bash": "#!/usr/bin/env python3\n#SBATCH --nodes=1\nif True:\n    print('a')\n",
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_sound_files(name):
    assert found(GOOD[name]) == []


@pytest.mark.parametrize("path", sbatch_lint.repository_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_files_of_the_repository(path):
    assert found(path.read_text(), path) == []


def test_what_lies_where_learners_keep_it(tmp_path):
    """A file of their own may name scripts beside it; in this repository, all paths begin at the root."""
    text = MINIMAL + ONE_NODE.replace("ddp/train.py", "mine.py") + "\n"
    job = tmp_path / "job.sbatch"
    assert ["no file mine.py" in message for _, message in found(text, job)] == [True]
    (tmp_path / "mine.py").write_text("print()\n")
    assert found(text, job) == []


def lint(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "sbatch_lint.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_command_line(tmp_path):
    good, bad = tmp_path / "good.sbatch", tmp_path / "bad.sbatch"
    good.write_text(SOUND)
    bad.write_text(SOUND.replace("--time=30", "--time=1h"))
    done = lint(good)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = lint(good, bad)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == f"{bad}:7: 1h is no time for Slurm; write 30 (minutes), 1:30:00, or 2-12 (days-hours)\n"


@pytest.mark.parametrize("arguments", [["/no/such.sbatch"], [ROOT], ["--nodes"]])
def test_called_wrongly(arguments):
    done = lint(*arguments)
    assert (done.returncode, done.stdout) == (2, "") and "Traceback" not in done.stderr


@pytest.mark.slow  # test_the_files_of_the_repository has read them one by one
def test_without_arguments_it_reads_the_whole_repository():
    assert ROOT / "ddp" / "multi_node.sbatch" in sbatch_lint.repository_files()
    done = lint()
    assert (done.returncode, done.stdout) == (0, ""), done.stdout
