"""The commands of the pages that need a Slurm cluster, on ours (rules: tools/readme_commands.py)."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import readme_commands
from docs_markdown import ROOT, DocsError, markdown_files


def blocks() -> list:
    """A parameter for each `cluster` block of each page."""
    found = []
    for page in markdown_files():
        try:
            found += [block for block in readme_commands.extract(ROOT, page) if block.cluster]
        except DocsError:
            continue  # tests/docs shows it
    return [
        pytest.param(block, id=block.where, marks=[pytest.mark.timeout(block.timeout_s + 60), pytest.mark.slow])
        for block in found
    ]


@pytest.mark.slurm
@pytest.mark.parametrize("block", blocks())
def test_command_on_the_cluster(block, cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("CLUSTER_NAME", cluster.name)
    problem = readme_commands.run_problem(ROOT, block, tmp_path)
    assert problem is None, problem


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("script", "expect", "problem"),
    [
        ("sbatch --wrap 'echo from $SLURM_JOB_NAME'", "from wrap", None),
        ("sbatch --wrap 'exit 3'", "", "is FAILED"),
        ("sbatch --wrap 'echo silent'", "loud", "does not match 'loud'"),
    ],
)
def test_how_a_block_is_judged(cluster, tmp_path, monkeypatch, script, expect, problem):
    monkeypatch.setenv("CLUSTER_NAME", cluster.name)
    block = readme_commands.Block(Path("page.md"), 1, "run", script, expect=expect, cluster=True)
    found = readme_commands.run_problem(ROOT, block, tmp_path)
    assert (found is None) if problem is None else (found and problem in found), found
