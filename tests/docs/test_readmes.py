"""Every command of every page runs, or would at least be understood (rules: tools/readme_commands.py).

`make test` runs the front page's commands and reads all others; `make test-all` runs those of all pages.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import readme_commands
import readme_parse
from docs_markdown import ROOT, DocsError, markdown_files
from readme_commands import Block

PAGES = markdown_files()


def _blocks() -> list[Block]:
    blocks = []
    for page in PAGES:
        try:
            blocks += readme_commands.extract(ROOT, page)
        except DocsError:
            continue  # test_every_fence_says_what_becomes_of_it shows it
    return blocks


BLOCKS = _blocks()
RUN = [
    pytest.param(
        block,
        id=block.where,
        marks=[pytest.mark.timeout(block.timeout_s + 60), *[pytest.mark.slow] * (not block.in_make_test)],
    )
    for block in BLOCKS
    if block.kind == "run" and not block.cluster  # those run in tests/slurm/test_readmes_on_cluster.py
]
PARSE = [pytest.param(block, id=block.where) for block in BLOCKS if not block.in_make_test]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_fence_says_what_becomes_of_it(page: Path) -> None:
    readme_commands.extract(ROOT, page)


@pytest.mark.parametrize("block", RUN)
def test_command_runs(block: Block, tmp_path: Path) -> None:
    problem = readme_commands.run_problem(ROOT, block, tmp_path)
    assert problem is None, problem


def test_make_test_runs_a_command_of_the_front_page():
    assert any(block.in_make_test for block in BLOCKS)


@pytest.mark.parametrize("block", PARSE)
def test_command_would_be_understood(block: Block) -> None:
    problems = readme_parse.parse_problems(ROOT, block)
    assert not problems, "\n".join(problems)
