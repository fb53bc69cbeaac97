"""What the documentation tools know of Markdown: files, fences, headings, anchors, links."""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
SETEXT = re.compile(r"^ {0,3}(=+|-+)\s*$")  # a heading by a line of = or - under it
DEFINITION = re.compile(r"^ {0,3}\[([^\]]+)\]:\s*<?([^\s>]+)")  # [name]: target
INLINE = re.compile(r"\]\(\s*(?:<([^>]*)>|([^\s()]*(?:\([^\s()]*\)[^\s()]*)*))(?:\s+[\"'(][^)]*)?\s*\)")
TAG = re.compile(r"<(?:a|img|source|video)\s[^>]*?(?:href|src|srcset)=[\"']([^\"']+)[\"']")


class DocsError(Exception):
    """A mistake in a document: one line that names file and line, what was found, and what to do."""


def repository_files(root: Path = ROOT) -> list[Path]:
    """All files that git tracks or would track (not the ignored ones), relative to `root`."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode == 0:
        names = [Path(name) for name in found.stdout.split("\0") if name]
    else:  # an unpacked archive
        names = [path.relative_to(root) for path in root.rglob("*")]
    hidden = {".venv", ".git", "__pycache__", "runs"}
    return sorted(n for n in set(names) if not hidden & set(n.parts) and (root / n).is_file())


def markdown_files(root: Path = ROOT) -> list[Path]:
    """The Markdown files of the repository, relative to `root`."""
    return [path for path in repository_files(root) if path.suffix == ".md"]


@dataclass(frozen=True)
class Fence:
    """A fenced code block; `start` and `end` are the indices of its ``` lines (or the end of file)."""

    start: int
    end: int
    language: str
    text: str


def fences(lines: list[str]) -> list[Fence]:
    """The outermost fenced code blocks in `lines`, in order."""
    found = []
    index = 0
    while index < len(lines):
        opening = re.match(r"^(\s*)(`{3,}|~{3,})\s*([\w+-]*)[^`]*$", lines[index])
        if not opening:
            index += 1
            continue
        indent, marks, language = opening.groups()
        closing = re.compile(rf"^\s*{re.escape(marks[0])}{{{len(marks)},}}\s*$")
        end = next((i for i in range(index + 1, len(lines)) if closing.match(lines[i])), len(lines))
        inside = lines[index + 1 : end]
        body = [line[len(indent) :] if line.startswith(indent) else line.lstrip() for line in inside]
        found.append(Fence(index, end, language.lower(), "\n".join(body)))
        index = end + 1
    return found


def prose(text: str) -> list[str]:
    """The lines of `text` with code blanked: line numbers stay, and nothing in code counts as Markdown."""
    lines = text.split("\n")
    for fence in fences(lines):
        for index in range(fence.start, min(fence.end + 1, len(lines))):
            lines[index] = ""
    code = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)")
    return [code.sub(lambda match: "x" * len(match[0]), line) for line in lines]


def slug(heading: str) -> str:
    """GitHub's anchor for a heading: lower case, no punctuation, hyphens for spaces."""
    visible = re.sub(r"<[^>]+>", "", heading)
    visible = re.sub(r"!?\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])", r"\1", visible)
    visible = re.sub(r"(?<!\w)_(.+?)_(?!\w)", r"\1", visible)
    return re.sub(r"[^\w\- ]", "", visible.strip().lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    """The anchors that a Markdown file offers: its headings (numbered when repeated) and explicit ids."""
    lines, code_free = text.split("\n"), prose(text)
    found: set[str] = set()
    for index, line in enumerate(code_free):
        found.update(re.findall(r"<\w+\s[^>]*?(?:id|name)=[\"']([^\"']+)[\"']", line))
        atx = re.match(r"^ {0,3}#{1,6}\s+", line)
        if atx:
            heading = re.sub(r"\s+#+\s*$", "", lines[index][atx.end() :])
        elif SETEXT.match(line) and index and re.match(r"^ {0,3}[^\s>|#*<-]", code_free[index - 1]):
            heading = lines[index - 1]
        else:
            continue
        name = slug(heading)
        number, unique = 0, name
        while unique in found:
            number += 1
            unique = f"{name}-{number}"
        found.add(unique)
    return found


def links(text: str) -> Iterator[tuple[int, str]]:
    """(line number, target) of every link and image; an undefined reference gives the target ``[name]``."""
    lines = prose(text)
    definitions = {match[1].lower() for line in lines if (match := DEFINITION.match(line))}
    for number, line in enumerate(lines, start=1):
        if definition := DEFINITION.match(line):
            yield number, definition[2]
            continue
        for match in INLINE.finditer(line):
            yield number, match[1] if match[1] is not None else match[2]
        for match in re.finditer(r"\]\[([^\]]+)\]", line):
            if match[1].lower() not in definitions:
                yield number, f"[{match[1]}]"
        for match in TAG.finditer(line):
            yield number, match[1]


def link_problem(root: Path, page: Path, target: str, files: set[Path]) -> str | None:
    """What is wrong with the link `target` on `page`, or None. `files`: all files of the repository."""
    if target.startswith("["):
        return f"the reference {target} is not defined on this page"
    if not target:
        return "an empty link target"
    parts = urlsplit(target)
    if parts.scheme in ("http", "https"):
        bad = not parts.hostname or ("." not in parts.hostname and parts.hostname != "localhost")
        return f"not a web address: {target}" if bad else None
    if parts.scheme == "mailto":
        return None if "@" in parts.path else f"not a mail address: {target}"
    if parts.scheme or target.startswith(("/", "\\", "~")):
        return f"an absolute path: {target}; link relative to this page"
    path = page
    if parts.path:
        resolved = (root / page.parent / unquote(parts.path)).resolve()
        if not resolved.is_relative_to(root.resolve()):
            return f"leaves the repository: {target}"
        path = resolved.relative_to(root.resolve())
        folders = {folder for file in files for folder in file.parents}
        if path not in files and path not in folders:
            return f"no such file in the repository: {path}"
    if parts.fragment:
        if path.suffix == ".md":
            if unquote(parts.fragment) not in anchors((root / path).read_text()):
                return f"no heading in {path} gives the anchor #{parts.fragment}"
        elif not re.fullmatch(r"L\d+(-L\d+)?", parts.fragment):
            return f"the anchor #{parts.fragment} of {path}: expected a line number such as #L10"
    return None
