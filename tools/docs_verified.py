"""Commands that were really run: their recorded output, and the table of where each was verified."""

import json
import os
import platform
import re
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import readme_commands
from docs_blocks import fence
from docs_markdown import DocsError, markdown_files
from readme_commands import Block

SCHEMA = ("command", "date", "commit", "hardware", "backend", "world_size", "torch", "python", "exit_code", "seconds")


def records_file(root: Path, page: Path) -> Path:
    """Where a page's verified runs are kept: one JSON object a line in `verified.jsonl` beside the page."""
    return root / page.parent / "verified.jsonl"


def find_blocks(root: Path, command: str) -> list[Block]:
    """The README blocks that hold `command`: as a whole, or as one of their lines."""
    wanted = "\n".join(readme_commands.logical_lines(command))
    blocks = [block for page in markdown_files(root) for block in readme_commands.extract(root, page)]
    whole = [block for block in blocks if "\n".join(block.commands) == wanted]
    return whole or [block for block in blocks if wanted in block.commands]


# ----------------------------------------------------------------------------------------------------
# output [tail=N] COMMAND


def output_command(argument: str) -> tuple[str, int | None]:
    """(command, how many last lines to keep) of an `output` block."""
    match = re.fullmatch(r"(?:tail=(\d+)\s+)?(\S.*)", argument)
    if not match:
        raise DocsError("expected `output [tail=N] COMMAND`")
    return match[2], int(match[1]) if match[1] else None


def output_block(root: Path, page: Path, argument: str, content: str) -> str:
    """The recorded output as it stands; DocsError when its command is not the page's or nothing is there."""
    command, _ = output_command(argument)
    _block_of_page(root, page, command)
    if not re.search(r"```text\n.*\S.*\n```", content, re.DOTALL):
        raise DocsError(f"no output is recorded yet; run: python tools/docs.py record {page}")
    return content


def _block_of_page(root: Path, page: Path, command: str) -> Block:
    wanted = "\n".join(readme_commands.logical_lines(command))
    for block in readme_commands.extract(root, page):
        if wanted in ("\n".join(block.commands), *block.commands):
            return block
    raise DocsError(f"`{command}` is not one of the commands of {page}; the output would be of something untested")


def record_output(root: Path, page: Path, argument: str) -> str:
    """Run the command of an `output` block and give its new content. Raises DocsError when it fails."""
    command, tail = output_command(argument)
    block = _block_of_page(root, page, command)
    with tempfile.TemporaryDirectory() as folder:
        finished = readme_commands.execute(root, command, max(block.timeout_s, 600), folder, block.cluster)
        if finished.exit_code != block.exit_code:
            raise DocsError(f"`{command}` gave exit code {finished.exit_code}:\n{finished.output[-2000:]}")
        text = without_machine(finished.output, root, Path(folder))
    lines = text.split("\n")
    return fence("text", "\n".join(["…", *lines[-tail:]] if tail and len(lines) > tail else lines))


def without_machine(output: str, root: Path, runs_dir: Path) -> str:
    """Terminal output as a reader sees it at the end, without this machine's paths and names.

    Colors go, of a line that was drawn over (a progress bar) the last state stays.
    """
    output = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    output = "\n".join(line.rstrip("\r").split("\r")[-1].rstrip() for line in output.split("\n"))
    for path, name in ((runs_dir, "runs"), (runs_dir.resolve(), "runs"), (root.resolve(), "."), (Path.home(), "~")):
        if str(path) != "/":
            output = output.replace(str(path), name)
    output = output.replace(" ./", " ")
    for name in {socket.gethostname(), socket.getfqdn()} - {"localhost", ""}:
        output = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", "host", output)
    return output.strip("\n")


# ----------------------------------------------------------------------------------------------------
# verified ROOM


def hardware() -> str:
    """The processor and GPUs of this machine, without its name."""
    model = platform.processor() or platform.machine()
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = " ".join(found[1].split()) if found else model
    except OSError:
        pass
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    names = [f"{gpus.count(name)} × {name}" for name in sorted(set(gpus))]
    return ", ".join([*names, f"{model}, {cores} core{'s' * (cores != 1)}"])


def commit(root: Path) -> str:
    """The commit of this checkout; `+` where tracked files were changed since; `unknown` without git."""
    git = ["git", "-C", str(root)]
    head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _ranks_and_backend(script: str, runs_dir: Path) -> tuple[int, str]:
    """World size and backend: from the run folders that the command wrote, else from what it says itself."""
    import torch

    on_gpu, world_size = torch.cuda.is_available(), 0
    for run in runs_dir.rglob("run.json"):
        record = json.loads(run.read_text())
        if record.get("world_size", 0) >= world_size:
            world_size, on_gpu = record.get("world_size", 0), "CPU" not in str(record.get("device", ""))
    if not world_size:
        flag = re.search(r"(?:--nproc[-_]per[-_]node|NPROC|-np)[= ](\d+)", script)
        world_size = int(flag[1]) if flag else 1
        on_gpu = on_gpu and not re.search(r"--device[= ]cpu", script)
    return world_size, ("nccl" if on_gpu else "gloo") if world_size > 1 else "none"


def verify(root: Path, command: str) -> list[Block]:
    """Run a README command here and append its record beside its page. Raises DocsError when it fails."""
    blocks = find_blocks(root, command)
    if not blocks:
        raise DocsError(f"no page has the command {command!r} in a ```bash fence")
    import torch

    block = blocks[0]
    with tempfile.TemporaryDirectory() as folder:
        finished = readme_commands.execute(root, block.script, max(block.timeout_s, 3600), folder, block.cluster)
        if finished.exit_code != block.exit_code:
            raise DocsError(f"exit code {finished.exit_code}, expected {block.exit_code}:\n{finished.output[-4000:]}")
        if block.expect and not re.search(block.expect, finished.output, re.MULTILINE):
            raise DocsError(f"the output does not match {block.expect!r}:\n{finished.output[-4000:]}")
        world_size, backend = _ranks_and_backend(block.script, Path(folder))
    record = {
        "command": "\n".join(block.commands),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit(root),
        "hardware": hardware() + ", Slurm on it" * block.cluster,
        "backend": backend,
        "world_size": world_size,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "exit_code": finished.exit_code,
        "seconds": round(finished.seconds, 1),
    }
    for page in {block.path for block in blocks}:
        with open(records_file(root, page), "a") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return blocks


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """The newest record of each command. Raises DocsError for a line that is not a complete record."""
    newest: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], start=1):
        try:
            record = json.loads(line)
            missing = [key for key in SCHEMA if key not in record]
        except ValueError:
            raise DocsError(f"{path.name}:{number}: not JSON: {line:.60}") from None
        if missing:
            raise DocsError(f"{path.name}:{number}: {missing[0]} is missing")
        before = newest.get(record["command"])
        if before is None or record["date"] >= before["date"]:
            newest[record["command"]] = record
    return newest


def verified_block(root: Path, words: list[str]) -> str:
    """`verified ROOM`: where each command of ROOM's README was run last, and which nobody ran."""
    if len(words) != 1 or not (root / words[0] / "README.md").is_file():
        raise DocsError("expected `verified ROOM` with a folder that has a README.md (`.` is the main page)")
    page = Path(words[0]) / "README.md"
    records = read_records(records_file(root, page))
    rows = []
    for block in readme_commands.extract(root, page):
        command = "<br>".join(f"`{line}`" for line in block.commands).replace("|", "\\|")
        record = records.get("\n".join(block.commands))
        if record:
            ranks = f"{record['world_size']} × {record['backend']}" if record["world_size"] > 1 else "1 process"
            versions = f"torch {record['torch']}, Python {record['python']}"
            when = f"{record['date']}, {record['commit']}"
            row = (command, record["hardware"], ranks, versions, when, f"{record['seconds']:.0f}")
        elif block.kind == "parse":
            row = (command, f"not run: needs {block.needs}", "", "", "", "")
        else:
            row = (command, f"run by `make test{'' if block.in_make_test else '-all'}`, not recorded", "", "", "", "")
        rows.append("| " + " | ".join(row) + " |")
    columns = "| command | verified on | ranks × backend | versions | date, commit | seconds |"
    return "\n".join([columns, "|---|---|---|---|---|---|", *dict.fromkeys(rows)])
