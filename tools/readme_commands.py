"""The commands in the project's Markdown pages: find them, run them, or check them without running.

Every ```bash fence says on the line above it what becomes of it:

    <!-- run: timeout=120 expect="loss [0-9.]+" -->   executed by `make test-all`: exit code 0 (or `exit=2`),
                                                      `expect` found in the output; by `make test` too when it
                                                      stands on the front page, without `slow` and `cluster`;
                                                      `cluster`: on the login node of a Slurm cluster
                                                      (slurm/cluster.py), and all its jobs must be COMPLETED
    <!-- parse: needs 2 nodes with 8 GPUs -->         not executed; shell, files, options, values are checked

Output that is shown for reading only stands in a ```text fence (optionally under `<!-- shown -->`).
A block is one script under `set -euo pipefail`, started in the repository root. It stands alone, and gets a
folder for runs (RUNS_DIR) of its own.

    python tools/readme_commands.py            lists all blocks
    python tools/readme_commands.py README.md  runs or checks the blocks of a page
"""

import argparse
import os
import re
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import processes
from docs_markdown import ROOT, DocsError, fences, markdown_files

ANNOTATION = re.compile(r"^\s*<!--\s*(run|parse|shown)\b:?\s*(.*?)\s*-->\s*$")
FRONT_PAGE = Path("README.md")
SHELL_LANGUAGES = {"bash", "sh", "shell", "zsh", "console", "shell-session"}


@dataclass(frozen=True)
class Block:
    """One annotated ```bash fence; `line` is the fence's line number, `path` relative to the repository."""

    path: Path
    line: int
    kind: str  # "run" or "parse"
    script: str
    timeout_s: float = 120.0
    exit_code: int = 0
    expect: str = ""
    slow: bool = False
    cluster: bool = False
    needs: str = ""

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"

    @property
    def in_make_test(self) -> bool:
        """Whether `make test` runs it: the front page's commands; those of the lessons run in `make test-all`."""
        return self.kind == "run" and self.path == FRONT_PAGE and not self.slow and not self.cluster

    @property
    def commands(self) -> list[str]:
        """The commands, one logical line each: continuations joined, comments and blank lines left out."""
        return logical_lines(self.script)


def logical_lines(script: str) -> list[str]:
    """`script` as a list of lines with continuations joined, comments and surplus blanks removed."""
    joined = re.sub(r"\\\n\s*", " ", script)
    lines = (re.sub(r"(^|\s+)#(\s.*)?$", "", line) for line in joined.split("\n"))
    return [" ".join(line.split()) for line in lines if line.strip() and not line.lstrip().startswith("#")]


def extract(root: Path, path: Path) -> list[Block]:
    """The command blocks of one page, in order. Raises DocsError where a fence breaks the rules."""
    lines = (root / path).read_text().split("\n")
    inside_generated = _generated_lines(lines)
    blocks, used = [], set()
    code_lines: set[int] = set()
    for fence in fences(lines):
        code_lines.update(range(fence.start, fence.end + 1))
        if fence.start in inside_generated:
            continue
        where = f"{path}:{fence.start + 1}"
        annotation = ANNOTATION.match(lines[fence.start - 1]) if fence.start else None
        if annotation:
            used.add(fence.start - 1)
        if fence.language not in SHELL_LANGUAGES:
            if annotation and annotation[1] != "shown":
                raise DocsError(f"{where}: `{annotation[1]}` stands above ```{fence.language}, not ```bash")
            continue
        if fence.language != "bash":
            raise DocsError(f"{where}: found ```{fence.language}; write commands in ```bash and output in ```text")
        if not annotation:
            raise DocsError(f"{where}: a ```bash fence without `<!-- run … -->` or `<!-- parse: needs … -->` above")
        if annotation[1] == "shown":
            raise DocsError(f"{where}: `shown` is for ```text; commands are run or parsed")
        blocks.append(_block(path, fence.start + 1, annotation[1], annotation[2], fence.text, where))
    for index, line in enumerate(lines):
        if ANNOTATION.match(line) and index not in used | code_lines | inside_generated:
            raise DocsError(f"{path}:{index + 1}: an annotation without a code fence on the next line")
    return blocks


def _generated_lines(lines: list[str]) -> set[int]:
    """Indices of lines inside generated blocks: their fences come from a tool and need no annotation."""
    inside, open_block = set(), False
    for index, line in enumerate(lines):
        if line.strip().startswith("<!-- generated:"):
            open_block = True
        elif line.strip() == "<!-- end generated -->":
            open_block = False
        elif open_block:
            inside.add(index)
    return inside


def _block(path: Path, line: int, kind: str, text: str, script: str, where: str) -> Block:
    if kind == "parse":
        needs = re.fullmatch(r"needs (\S.*)", text)
        if not needs:
            raise DocsError(f"{where}: `parse: {text}`; write `parse: needs …` with what it needs to run")
        return Block(path, line, kind, script, needs=needs[1])
    options: dict[str, str] = {}
    for word in shlex.split(text):
        name, _, value = word.partition("=")
        options[name] = value
    unknown = set(options) - {"timeout", "expect", "exit", "slow", "cluster"}
    if unknown:
        name = sorted(unknown)[0]
        raise DocsError(f"{where}: unknown option {name!r} of `run`; known: timeout, expect, exit, slow, cluster")
    try:
        timeout_s, exit_code = float(options.get("timeout", 120)), int(options.get("exit", 0))
        re.compile(options.get("expect", ""))
    except (ValueError, re.error) as error:
        raise DocsError(f"{where}: `run: {text}`: {error}") from None
    expect = options.get("expect", "")
    return Block(path, line, kind, script, timeout_s, exit_code, expect, "slow" in options, "cluster" in options)


RANKS = re.compile(r"(?:nproc[-_]per[-_]node|NPROC|--devices|ntasks(?:[-_]per[-_]node)?| -np?)[= ](\d+)")


def gpus() -> int:
    """How many GPUs a command can use here; torch is imported only where the driver shows one."""
    if not Path("/proc/driver/nvidia/gpus").is_dir():
        return 0
    import torch

    return torch.cuda.device_count()


def environment(runs_dir: Path | str, script: str = "") -> dict[str, str]:
    """The environment of a README command: our Python first, one thread a rank, its own run folder, and the CPU if
    `script` starts more ranks than there are GPUs (DEVICE, where it is set, decides).

    What a surrounding launcher or make has left there would reach the command, and is taken out.
    """
    foreign = re.compile(r"(SLURM|OMPI|PMIX?|TORCHELASTIC)_.*|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)")
    of_make = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    kept = {k: v for k, v in os.environ.items() if not foreign.fullmatch(k) and k not in of_make}
    if 0 < gpus() < max(map(int, RANKS.findall(script)), default=1):
        kept.setdefault("DEVICE", "cpu")
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "OMP_NUM_THREADS": "1",
        "RUNS_DIR": str(runs_dir),
        "PYTHONUNBUFFERED": "1",
    }


ON_CLUSTER = """
before=$(squeue --noheader --states=all --format=%A | sort -n | tail -n 1)
{script}
while [[ -n $(squeue --noheader) ]]; do sleep 0.5; done
cat "$RUNS_DIR"/slurm-*.out 2>/dev/null || true
squeue --noheader --states=all --format='%A %T' | awk -v before="${{before:-0}}" '
    $1 > before && $2 != "COMPLETED" {{ print "job " $1 " is " $2; bad = 1 }} END {{ exit bad }}'
"""


def execute(
    root: Path, script: str, timeout_s: float, runs_dir: Path | str, cluster: bool = False
) -> processes.Finished:
    """Run `script` with bash in the repository root; the whole family of processes ends with it.

    With `cluster`, it runs on the login node of the Slurm cluster that is up (CLUSTER_NAME says which, if several
    are); what its jobs print follows its own output, and a job that is not COMPLETED at the end makes it fail.
    """
    env = environment(runs_dir, script)
    if not cluster:
        return processes.run(["bash", "-c", f"set -euo pipefail\n{script}"], timeout_s, root, env)
    env |= {"SBATCH_OUTPUT": f"{runs_dir}/slurm-%x-%j.out", "VENV": sys.prefix}
    command = [sys.executable, str(root / "slurm" / "cluster.py"), "exec", "bash", "-c"]
    return processes.run([*command, "set -euo pipefail" + ON_CLUSTER.format(script=script)], timeout_s, root, env)


def run_problem(root: Path, block: Block, runs_dir: Path | str) -> str | None:
    """Run a block and say what went wrong, with the end of its output; None when all is well."""
    finished = execute(root, block.script, block.timeout_s, runs_dir, block.cluster)
    tail = "\n".join(finished.output.splitlines()[-40:])
    if finished.exit_code is None:
        return f"{block.where}: still running after {block.timeout_s:.0f} s; stopped. Output:\n{tail}"
    if finished.exit_code != block.exit_code:
        return f"{block.where}: exit code {finished.exit_code}, expected {block.exit_code}. Output:\n{tail}"
    if block.expect and not re.search(block.expect, finished.output, re.MULTILINE):
        return f"{block.where}: the output does not match {block.expect!r}. Output:\n{tail}"
    return None


def main() -> int:
    import readme_parse  # it imports this module

    parser = argparse.ArgumentParser(description="List the command blocks of all pages, or test those of some.")
    parser.add_argument("pages", nargs="*", type=Path, help="Markdown files whose blocks are run or checked")
    pages = parser.parse_args().pages
    failed = 0
    try:
        for page in pages or markdown_files():
            for block in extract(ROOT, page):
                print(f"{block.where:32} {block.kind:5} {'; '.join(block.commands)}", flush=True)
                if pages and block.kind == "run":
                    with tempfile.TemporaryDirectory() as folder:
                        problems = [run_problem(ROOT, block, folder)]
                elif pages:
                    problems = list(readme_parse.parse_problems(ROOT, block))
                else:
                    problems = []
                for problem in filter(None, problems):
                    failed += 1
                    print(problem, file=sys.stderr)
    except DocsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
