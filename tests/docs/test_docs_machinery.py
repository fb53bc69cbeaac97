"""The tools behind the pages, on small pages of their own: each rule holds, and each breach of it is seen."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import docs
import docs_blocks
import docs_verified
import processes
import readme_commands
import readme_parse
from docs_markdown import ROOT, DocsError

SINGLE = '''"""Train."""

def main():
    model = build()  # on one device
    train(model)
'''
DDP = '''"""Train on many."""

def main():
    # Gradients are averaged.
    model = wrap(build())
    train(model)
    leave()
'''
CONFIG = '''
from dataclasses import dataclass, field
from typing import Literal
import os

@dataclass
class TrainConfig:
    steps: int = 50
    """Optimizer steps
    of the whole training | all of it."""
    precision: Literal["fp32", "bf16"] = "fp32"  # arithmetic

@dataclass
class Config:
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=7))
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    runs_dir: str = field(default_factory=lambda: os.environ.get("RUNS_DIR", "runs"))
    """Where runs go."""
    micro_size: int | None = None
    """Samples per rank at a time."""
'''


def page(root: Path, text: str, name: str = "README.md") -> Path:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)
    return Path(name)


def generated(what: str, body: str = "") -> str:
    return f"# Page\n\n<!-- generated: {what} -->\n{body}\n<!-- end generated -->\n\nafter\n"


# -------------------------------------------------------------------------------- generated blocks


@pytest.fixture
def two_scripts(tmp_path: Path) -> Path:
    (tmp_path / "a.py").write_text(SINGLE)
    (tmp_path / "b.py").write_text(DDP)
    return tmp_path


def test_refresh_writes_and_check_sees_what_is_stale(two_scripts: Path) -> None:
    readme = page(two_scripts, generated("diff a.py b.py", "old"))
    (problem,) = docs.check(two_scripts)
    assert "README.md:3" in problem and "diff a.py b.py" in problem and "-old" in problem
    assert docs.refresh(two_scripts) == []
    assert docs.check(two_scripts) == []
    text = (two_scripts / readme).read_text()
    assert "+    leave()" in text and "2 lines of code changed (2 added, 1 removed" in text
    assert text.startswith("# Page\n") and text.endswith("\nafter\n")
    (two_scripts / "b.py").write_text(DDP.replace("leave()", "leave(ranks)"))
    assert len(docs.check(two_scripts)) == 1


def test_only_code_counts_as_a_changed_line() -> None:
    commented = SINGLE.replace('"""Train."""', '"""Other words,\nmore of them."""').replace("one device", "x")
    assert docs_blocks.changed_lines("a.py", SINGLE, "b.py", commented) == (0, 0, 0)
    assert docs_blocks.changed_lines("a.py", SINGLE, "b.py", SINGLE.replace("build()", "make()")) == (1, 1, 1)
    assert docs_blocks.changed_lines("a.py", SINGLE, "b.py", SINGLE + "x = '# no comment'\n") == (1, 1, 0)


def test_a_diff_over_its_limit_is_an_error(two_scripts: Path) -> None:
    page(two_scripts, generated("diff a.py b.py max=2"))
    assert docs.refresh(two_scripts) == []
    page(two_scripts, generated("diff a.py b.py max=1"))
    (problem,) = docs.check(two_scripts)
    assert "2 lines of code; at most 1" in problem


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("source a.py main", "def main():\n    model = build()  # on one device\n    train(model)"),
        ('source a.py "model = build"..train', "model = build()  # on one device\ntrain(model)"),
        ("source c.py Box.size", "@property\ndef size(self):\n    return 1"),
    ],
)
def test_source(two_scripts: Path, what: str, expected: str) -> None:
    (two_scripts / "c.py").write_text("class Box:\n    @property\n    def size(self):\n        return 1\n")
    page(two_scripts, generated(what))
    assert docs.refresh(two_scripts) == []
    assert f"```python\n{expected}\n```" in (two_scripts / "README.md").read_text()


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("source a.py other", "defines no other"),
        ("source nowhere.py", "no file nowhere.py"),
        ('source a.py "def main"..nothing', "does not stand"),
        ('source a.py "model"..train', "stands in 2 lines"),
        ("diff a.py", "expected `diff"),
        ("picture a.py", "unknown kind"),
    ],
)
def test_a_block_that_cannot_be_made_is_named(two_scripts: Path, what: str, problem: str) -> None:
    page(two_scripts, generated(what))
    (found,) = docs.check(two_scripts)
    assert found.startswith("README.md:3:") and problem in found


def test_markers_in_code_are_not_blocks_and_unclosed_ones_are_errors(two_scripts: Path) -> None:
    page(two_scripts, "```markdown\n<!-- generated: diff a.py -->\n```\n")
    assert docs.check(two_scripts) == []
    page(two_scripts, "<!-- generated: diff a.py b.py -->\n")
    assert "no `<!-- end generated -->`" in docs.check(two_scripts)[0]
    page(two_scripts, "<!-- end generated -->\n")
    assert "does not belong" in docs.check(two_scripts)[0]


def test_options_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNS_DIR", "elsewhere")  # the table must not depend on who makes it
    (tmp_path / "train.py").write_text(CONFIG + "\ndef main():\n    parse(Config)\n")
    page(tmp_path, generated("options train.py"))
    assert docs.refresh(tmp_path) == []
    rows = [line for line in (tmp_path / "README.md").read_text().split("\n") if line.startswith("| `")]
    assert rows == [
        "| `train.steps` | int | `7` | Optimizer steps of the whole training \\| all of it. |",
        "| `train.precision` | `fp32` or `bf16` | `fp32` | arithmetic |",
        "| `betas` | (float, float) | `[0.9, 0.95]` | Of AdamW. |",
        "| `runs_dir` | str | `runs` | Where runs go. |",
        "| `micro_size` | int or null | `null` | Samples per rank at a time. |",
    ]


def test_a_setting_without_a_meaning_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(CONFIG.replace('    """Of AdamW."""\n', ""))
    page(tmp_path, generated("options train.py:Config"))
    (problem,) = docs.check(tmp_path)
    assert "does not describe betas" in problem


# ----------------------------------------------------------- recorded output and verified commands


def test_recorded_output_belongs_to_a_command_of_the_page(tmp_path: Path) -> None:
    script = "printf 'a\\rb\\n\\033[31mred\\033[0m\\n'; echo $RUNS_DIR/x"
    page(tmp_path, f"<!-- run -->\n```bash\n{script}\n```\n" + generated(f"output {script}"))
    (problem,) = docs.check(tmp_path)
    assert "record README.md" in problem
    assert docs.refresh(tmp_path, record=True) == []
    assert "```text\nb\nred\nruns/x\n```" in (tmp_path / "README.md").read_text()
    assert docs.check(tmp_path) == []
    page(tmp_path, (tmp_path / "README.md").read_text().replace("```bash\nprintf", "```bash\nprintf ' '"))
    assert "not one of the commands" in docs.check(tmp_path)[0]


def test_verified_table(tmp_path: Path) -> None:
    text = "<!-- run -->\n```bash\necho 'a | b'   # fast\n```\n"
    text += "<!-- parse: needs 8 GPUs -->\n```bash\necho \\\n  big\n```\n"
    page(tmp_path, text + generated("verified room"), "room/README.md")
    assert docs.refresh(tmp_path) == []
    table = (tmp_path / "room" / "README.md").read_text()
    assert "| `echo big` | not run: needs 8 GPUs |" in table and "run by `make test-all`, not recorded" in table
    assert docs.verify(tmp_path, "echo 'a | b'") == []
    table = (tmp_path / "room" / "README.md").read_text()
    assert "| 1 process | torch " in table and "not recorded" not in table
    record = (tmp_path / "room" / "verified.jsonl").read_text()
    assert os.uname().nodename not in record and str(tmp_path) not in record
    assert docs.check(tmp_path) == []
    assert "no page has the command" in docs.verify(tmp_path, "echo other")[0]


@pytest.mark.parametrize(
    ("options", "name", "expected"),
    [
        ("run", "README.md", True),
        ("run: slow", "README.md", False),
        ("run: cluster", "README.md", False),
        ("parse: needs 8 GPUs", "README.md", False),
        ("run", "room/README.md", False),
    ],
)
def test_make_test_runs_the_front_page_only(tmp_path: Path, options: str, name: str, expected: bool) -> None:
    text = f"<!-- {options} -->\n```bash\nls\n```\n"
    (block,) = readme_commands.extract(tmp_path, page(tmp_path, text, name))
    assert block.in_make_test == expected


def test_a_failed_command_is_not_recorded(tmp_path: Path) -> None:
    page(tmp_path, "<!-- run -->\n```bash\nexit 3\n```\n" + generated("verified ."))
    assert "exit code 3, expected 0" in docs.verify(tmp_path, "exit 3")[0]
    assert not (tmp_path / "verified.jsonl").exists()


def test_world_size_comes_from_the_run_folder(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"world_size": 4, "device": "x86_64 CPU, 2 cores"}')
    assert docs_verified._ranks_and_backend("torchrun --nproc-per-node=2 a.py", tmp_path) == (4, "gloo")


# --------------------------------------------------------------------------------- README commands


def test_extract_reads_options_and_joins_lines(tmp_path: Path) -> None:
    text = '- item\n\n  <!-- run: timeout=5 expect="two words" exit=2 slow -->\n'
    text += "  ```bash\n  echo \\\n    x  # why\n  # note\n  ```\n"
    (block,) = readme_commands.extract(tmp_path, page(tmp_path, text))
    assert (block.kind, block.timeout_s, block.expect, block.exit_code, block.slow) == ("run", 5, "two words", 2, True)
    assert block.commands == ["echo x"] and block.where == "README.md:4"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```bash\nls\n```\n", "without `<!-- run"),
        ("```sh\nls\n```\n", "write commands in ```bash"),
        ("<!-- shown -->\n```bash\nls\n```\n", "`shown` is for ```text"),
        ("<!-- run: speed=3 -->\n```bash\nls\n```\n", "unknown option 'speed'"),
        ("<!-- run: timeout=soon -->\n```bash\nls\n```\n", "could not convert"),
        ("<!-- parse: GPU -->\n```bash\nls\n```\n", "needs …"),
        ("<!-- run -->\n\n```bash\nls\n```\n", "without `<!-- run"),
        ("<!-- run -->\ntext\n", "without a code fence"),
        ("<!-- run -->\n```python\nls\n```\n", "not ```bash"),
    ],
)
def test_breaches_of_the_rules_are_errors(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(DocsError) as caught:
        readme_commands.extract(tmp_path, page(tmp_path, text))
    assert problem in str(caught.value)


def test_shown_output_and_nested_fences_need_nothing(tmp_path: Path) -> None:
    text = "<!-- shown -->\n```text\nok\n```\n````markdown\n```bash\nls\n```\n````\n"
    assert readme_commands.extract(tmp_path, page(tmp_path, text)) == []


@pytest.mark.parametrize(
    ("options", "script", "problem"),
    [
        ("", "test $OMP_NUM_THREADS = 1 && touch $RUNS_DIR/x", None),
        ("", f"test $(dirname $(which python)) = {Path(sys.executable).parent}", None),
        ("exit=2", "exit 2", None),
        ("", "false\necho on", "exit code 1"),  # set -e
        ("", "echo $UNSET_NAME", "exit code 1"),  # set -u
        ("", "false | true", "exit code 1"),  # pipefail
        ("expect='loss [0-9.]+'", "echo loss 2.5", None),
        ("expect='loss [0-9.]+'", "echo loss nan", "does not match"),
    ],
)
def test_running(tmp_path: Path, options: str, script: str, problem: str | None) -> None:
    (block,) = readme_commands.extract(tmp_path, page(tmp_path, f"<!-- run: {options} -->\n```bash\n{script}\n```\n"))
    found = readme_commands.run_problem(tmp_path, block, tmp_path)
    assert found is None if problem is None else problem in (found or "")


@pytest.mark.parametrize(
    ("gpus", "script", "device"),
    [
        (1, "torchrun --standalone --nproc-per-node=2 ddp/train.py", "cpu"),
        (1, "make train NPROC=3", "cpu"),
        (1, "mpiexec -n 2 python ddp/train.py", "cpu"),
        (1, "python ddp/single_device.py", None),
        (2, "torchrun --nproc-per-node=2 ddp/train.py", None),
        (0, "torchrun --nproc-per-node=2 ddp/train.py", None),  # auto is the CPU there
    ],
)
def test_ranks_without_a_gpu_each_are_on_the_cpu(monkeypatch: pytest.MonkeyPatch, gpus, script, device) -> None:
    monkeypatch.setattr(readme_commands, "gpus", lambda: gpus)
    monkeypatch.delenv("DEVICE", raising=False)
    assert readme_commands.environment("runs", script).get("DEVICE") == device
    monkeypatch.setenv("DEVICE", "cuda")
    assert readme_commands.environment("runs", script)["DEVICE"] == "cuda"


def test_a_timeout_ends_the_whole_family(tmp_path: Path) -> None:
    """Also a worker in a session of its own, as torchrun's are, and one that ignores SIGTERM."""
    worker = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "open({!r}, 'w').write(str(os.getpid())); time.sleep(99)"
    )
    scripts = [f'{sys.executable} -c "{worker.format(str(tmp_path / name))}"' for name in ("child", "grandchild")]
    finished = processes.run(["bash", "-c", f"setsid {scripts[0]} & {scripts[1]}"], 2, tmp_path, dict(os.environ))
    assert finished.exit_code is None
    for name in ("child", "grandchild"):
        status = Path(f"/proc/{(tmp_path / name).read_text()}/stat")
        for _ in range(50):  # an orphan that was killed is a zombie until init collects it
            if not status.exists() or status.read_text().split()[2] == "Z":
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"{name} is still running")


# ------------------------------------------------------------------------ checking without running

ARGPARSE_SCRIPT = """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--ranks", type=int)
parser.parse_args()
raise SystemExit("ran")
"""
CONFIG_SCRIPT = """
from dataclasses import dataclass, field
from common.config import RunConfig, parse

if __name__ == "__main__":
    parse(RunConfig)
    raise SystemExit("ran")
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    (root / "room").mkdir()
    (root / "room" / "plain.py").write_text("print('ran')\n")
    (root / "room" / "tool.py").write_text(ARGPARSE_SCRIPT)
    (root / "room" / "train.py").write_text(CONFIG_SCRIPT)
    (root / "room" / "job.sbatch").write_text(
        '#!/bin/bash\n# not other.py\nsource x.sh\nsrun torchrun \\\n  room/train.py "$@"\n'
    )
    (root / "room" / "launch.sh").write_text('exec torchrun "${SCRIPT:-room/train.py}" "$@"\n')
    (root / "Makefile").write_text("VAR := x\ntrain test: venv\n\techo\n")
    (root / "common").symlink_to(ROOT / "common")
    return root


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("ls &&", "syntax error"),
        ("make train NPROC=2", None),
        ("make fly", "no target fly"),
        ("python room/plain.py", None),
        ("python room/gone.py", "no file room/gone.py"),
        ("python room/plain.py --x", "takes no arguments"),
        ("python -m pip install -r requirements.txt", "no file requirements.txt"),
        ("python room/tool.py --ranks 3 > out.log 2>&1", None),
        ("CUDA_VISIBLE_DEVICES=0 python -u room/tool.py --rank 3", "no option --rank"),
        ("torchrun --nproc-per-node=2 room/train.py --train.steps 50", None),
        ("torchrun --nproc-per-node=$(nproc) room/train.py --train.steps $STEPS", None),
        ("torchrun --nprocs=2 room/train.py", "torchrun:"),
        ("torchrun --nproc-per-node=2 room/train.py --train.stepz 50", "train.stepz"),
        ("torchrun --nproc-per-node=2 room/train.py --train.steps many", "train.steps"),
        ("torchrun --nproc-per-node=2 room/train.py --config room/none.yaml", "no file room/none.yaml"),
        ("for n in 1 2; do\n  torchrun --nproc-per-node=$n room/train.py --seed $n\ndone", None),
        ("srun -N 2 --kill-on-bad-exit=1 torchrun --nnodes=2 room/train.py --seed x", "seed"),
        ("srun --nodez=2 hostname", "no option --nodez"),
        ("sbatch --nodes=4 --gpus-per-node 8 room/job.sbatch --train.steps 5", None),
        ("sbatch room/job.sbatch --train.stepz 5", "train.stepz"),
        ("sbatch room/gone.sbatch", "no file room/gone.sbatch"),
        ("room/launch.sh --train.steps 5", None),
        ("bash room/launch.sh --train.stepz 5", "train.stepz"),
        ("SCRIPT=room/tool.py room/launch.sh --rank 3", "no option --rank"),
        ("export SCRIPT=room/gone.py && bash room/launch.sh", "no file room/gone.py"),
        ("SCRIPT=./gone.py room/launch.sh", "gone.py"),
        ("mpirun -np 4 python room/tool.py --rank 3", "no option --rank"),
        ("ls /path/to/data/config.yaml ~/x.yaml", None),
    ],
)
def test_parsing(repository: Path, script: str, problem: str | None) -> None:
    text = f"<!-- parse: needs GPU -->\n```bash\n{script}\n```\n"
    (block,) = readme_commands.extract(repository, page(repository, text))
    found = readme_parse.parse_problems(repository, block)
    if problem is None:
        assert not found, found
    else:
        assert len(found) == 1 and problem in found[0], found


def test_the_command_line_reports_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "docs.py"), "verify", "no such command anywhere"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 1
    assert "no page has the command" in finished.stderr and "Traceback" not in finished.stderr
