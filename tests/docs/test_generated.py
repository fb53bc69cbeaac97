"""The generated blocks of the project's pages are what the code gives today."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import docs
from docs_markdown import ROOT, markdown_files


@pytest.mark.parametrize("page", markdown_files(), ids=str)
def test_blocks_are_fresh(page: Path) -> None:
    problems = docs.check(ROOT, [page])
    assert not problems, "\n".join(problems)
