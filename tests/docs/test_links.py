"""Links, images and anchors of the pages lead somewhere, and nothing in them belongs to one machine."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from docs_markdown import ROOT, anchors, link_problem, links, markdown_files, repository_files

FILES = set(repository_files())
MACHINE_PATH = re.compile(r"(?<![\w./$}-])/(?:home|root|Users|work|tmp)/[\w.-]+|\b[A-Z]:\\\w+")


@pytest.mark.parametrize("page", markdown_files(), ids=str)
def test_links_resolve(page: Path) -> None:
    text = (ROOT / page).read_text()
    found = [(number, link_problem(ROOT, page, target, FILES)) for number, target in links(text)]
    problems = [f"{page}:{number}: {problem}" for number, problem in found if problem]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("page", markdown_files(), ids=str)
def test_no_paths_of_one_machine(page: Path) -> None:
    lines = (ROOT / page).read_text().split("\n")
    problems = [f"{page}:{n}: {line}" for n, line in enumerate(lines, start=1) if MACHINE_PATH.search(line)]
    assert not problems, "\n".join(problems)


# -------------------------------------------------------------- the checks themselves, on fixtures


def test_anchors_follow_githubs_rules() -> None:
    text = """# Data parallelism: the `no_sync` rule!
## What breaks (and how it looks)
## What breaks (and how it looks)
## [Linked](x.md) & *starred* — dash
### Ünïcode 1.2
Set by a line
-------------
<a id="by-hand"></a>
```bash
# not a heading
```
"""
    assert anchors(text) == {
        "data-parallelism-the-no_sync-rule",
        "what-breaks-and-how-it-looks",
        "what-breaks-and-how-it-looks-1",
        "linked--starred--dash",
        "ünïcode-12",
        "set-by-a-line",
        "by-hand",
    }


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "README.md").write_text("# Room\n## Two words\n")
    (tmp_path / "room" / "picture.png").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("link", "problem"),
    [
        ("[a](room/README.md)", None),
        ("[a](room/)", None),
        ("[a](room/README.md#two-words)", None),
        ("[a](room/README.md#three-words)", "#three-words"),
        ("[a](#here)", None),
        ("[a](#there)", "#there"),
        ("![a](room/picture.png 'title')", None),
        ("![a](room/missing.png)", "room/missing.png"),
        ('<img src="room/missing.png" width="40">', "room/missing.png"),
        ("[a](Room/README.md)", "Room/README.md"),  # case counts on GitHub
        ("[a](/room/README.md)", "absolute"),
        ("[a](file:///room/README.md)", "absolute"),
        ("[a](../outside.md)", "leaves the repository"),
        ("[a][ref]\n\n[ref]: room/missing.md", "room/missing.md"),
        ("[a][ref]", "not defined"),
        ("[a](https://pytorch.org/docs)", None),
        ("[a](https://)", "not a web address"),
        ("`[a](nowhere.md)` and ``[b](nowhere.md)``", None),
        ("```text\n[a](nowhere.md)\n```", None),
        ("[a](room/picture.png#top)", "line number"),
    ],
)
def test_link_problems(pages: Path, link: str, problem: str | None) -> None:
    text = f"# Here\n{link}\n"
    (pages / "page.md").write_text(text)
    files = set(repository_files(pages))
    found = [p for _, target in links(text) if (p := link_problem(pages, Path("page.md"), target, files))]
    if problem is None:
        assert not found
    else:
        assert len(found) == 1 and problem in found[0]


@pytest.mark.parametrize("text", ["see /home/ann/runs", "in /tmp/x", r"C:\Users"])
def test_machine_paths_are_seen(text: str) -> None:
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", ["/path/to/imagenet", "$HOME/data", "https://x.org/home/page", "a/tmp/b"])
def test_other_paths_are_not(text: str) -> None:
    assert not MACHINE_PATH.search(text)
