"""Generated blocks in Markdown pages: made from the code; a test fails when one is stale.

Syntax, and the kinds of blocks:

    <!-- generated: diff ddp/single_device.py ddp/train.py max=30 -->
    (everything up to the next line is written by this tool)
    <!-- end generated -->

    diff A B [max=N] [context=N]     unified diff; more than N changed lines of code are an error
    source FILE [symbol]             a file, a function or class, or "from this text".."to that text"
    options FILE | module:Class      table of every setting of a config dataclass
    output [tail=N] COMMAND          what a command of the same page printed when it was last recorded
    verified ROOM                    where each command of ROOM/README.md was run (ROOM/verified.jsonl)

    python tools/docs.py refresh             rewrite all blocks
    python tools/docs.py check               exit code 1, with a diff, when a block is stale
    python tools/docs.py record [PAGE …]     run the commands of `output` blocks and keep what they print
    python tools/docs.py verify "COMMAND"    run a README command here and add it to the verified-on table;
                                             a page in place of a command: all commands that its tests run
"""

import argparse
import difflib
import re
import shlex
import sys
from pathlib import Path

import docs_blocks
import docs_verified
import readme_commands
from docs_markdown import ROOT, DocsError, fences, markdown_files

START = re.compile(r"^\s*<!-- generated: (\w+)(?:\s+(.*?))?\s*-->\s*$")
END = "<!-- end generated -->"


def blocks(text: str, page: Path) -> list[tuple[int, int, str, str]]:
    """(start line, end line, kind, argument) of each block, by index; markers in code are skipped."""
    lines = text.split("\n")
    found = []
    index = 0
    starts_of_code = {fence.start: fence.end for fence in fences(lines)}
    while index < len(lines):
        match = START.match(lines[index])
        if match:
            later = range(index + 1, len(lines))
            end = next((i for i in later if lines[i].strip() == END or START.match(lines[i])), None)
            if end is None or lines[end].strip() != END:
                raise DocsError(f"{page}:{index + 1}: this generated block has no `{END}` line")
            found.append((index, end, match[1], match[2] or ""))
            index = end
            starts_of_code = {index + 1 + f.start: index + 1 + f.end for f in fences(lines[index + 1 :])}
        elif index in starts_of_code:
            index = starts_of_code[index]
        elif lines[index].strip() == END or lines[index].lstrip().startswith("<!-- generated"):
            raise DocsError(f"{page}:{index + 1}: {lines[index].strip()!r} does not belong to a block")
        index += 1
    return found


def content(root: Path, page: Path, kind: str, argument: str, now: str) -> str:
    """What a block should hold. `now`: what it holds. Raises DocsError."""
    if kind == "output":
        return docs_verified.output_block(root, page, argument, now)
    producers = {
        "diff": docs_blocks.diff_block,
        "source": docs_blocks.source_block,
        "options": docs_blocks.options_block,
        "verified": docs_verified.verified_block,
    }
    if kind not in producers:
        raise DocsError(f"unknown kind {kind!r}; known: {', '.join([*producers, 'output'])}")
    return producers[kind](root, shlex.split(argument))


def rewrite(root: Path, page: Path, record: bool = False) -> tuple[str, str, list[str]]:
    """(text of the page, text with all blocks renewed, problems); `record` runs what `output` blocks show."""
    text = (root / page).read_text()
    lines, problems = text.split("\n"), []
    for start, end, kind, argument in reversed(blocks(text, page)):
        now = "\n".join(lines[start + 1 : end]).strip("\n")
        try:
            if record and kind == "output":
                new = docs_verified.record_output(root, page, argument)
            else:
                new = content(root, page, kind, argument, now)
        except DocsError as error:
            problems.insert(0, f"{page}:{start + 1}: {kind} {argument}: {error}")
            continue
        lines[start + 1 : end] = ["", *new.split("\n"), ""]
    return text, "\n".join(lines), problems


def check(root: Path, pages: list[Path] | None = None) -> list[str]:
    """Every reason why a page's blocks are not what they should be: file, block, and a diff."""
    problems = []
    for page in markdown_files(root) if pages is None else pages:
        try:
            now, fresh, errors = rewrite(root, page)
        except DocsError as error:
            problems.append(str(error))
            continue
        problems += errors
        if now != fresh:
            problems += _stale(page, now, fresh)
    return problems


def _stale(page: Path, now: str, fresh: str) -> list[str]:
    found = []
    for old, new in zip(blocks(now, page), blocks(fresh, page), strict=True):
        before, after = now.split("\n")[old[0] : old[1]], fresh.split("\n")[new[0] : new[1]]
        if before != after:
            changes = difflib.unified_diff(before, after, "in the page", "generated", n=1, lineterm="")
            where = f"{page}:{old[0] + 1}: {old[2]} {old[3]}"
            found.append("\n".join([f"{where}: stale; run: python tools/docs.py refresh", *changes]))
    return found


def refresh(root: Path, record: bool = False, pages: list[Path] | None = None) -> list[str]:
    """Rewrite the blocks of the pages; gives the problems that keep some as they were."""
    problems = []
    for page in markdown_files(root) if pages is None else pages:
        now, fresh, errors = rewrite(root, page, record)
        problems += errors
        if now != fresh:
            (root / page).write_text(fresh)
            print(f"rewrote {page}")
    return problems


def verify(root: Path, command: str) -> list[str]:
    """Run one command, or the runnable commands of a page, and renew the tables that show them."""
    if command.endswith(".md") and (root / command).is_file():
        page_blocks = readme_commands.extract(root, Path(command))
        scripts = [block.script for block in page_blocks if block.kind == "run"]
    else:
        scripts = [command]
    problems = []
    for script in scripts:
        print(f"running: {script}", flush=True)
        try:
            for block in docs_verified.verify(root, script):
                problems += refresh(root, pages=[block.path])
        except DocsError as error:
            problems.append(f"{script}: {error}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description="Generated blocks in the project's Markdown pages.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("refresh", help="rewrite all generated blocks")
    commands.add_parser("check", help="fail when a generated block is stale")
    record = commands.add_parser("record", help="run the commands of output blocks and keep what they print")
    record.add_argument("pages", nargs="*", type=Path, help="pages to record (default: all)")
    verified = commands.add_parser("verify", help="run a README command and add it to the verified-on table")
    verified.add_argument("readme_command", help="the command as the page has it, or a page")
    arguments = parser.parse_args()
    try:
        if arguments.command == "refresh":
            problems = refresh(ROOT)
        elif arguments.command == "check":
            problems = check(ROOT)
        elif arguments.command == "record":
            problems = refresh(ROOT, record=True, pages=arguments.pages or None)
        else:
            problems = verify(ROOT, arguments.readme_command)
    except DocsError as error:
        problems = [str(error)]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
