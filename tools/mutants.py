"""Plant one bug at a time in a copy of the repository, and run the tests that should see it.

    python tools/mutants.py                  all lessons; rewrites tests/mutants/README.md
    python tools/mutants.py ddp fsdp         these lessons
    python tools/mutants.py ddp -k scaler    the bugs of ddp whose description holds "scaler"
    python tools/mutants.py --list           one line for each bug

tests/mutants/LESSON.yaml lists the bugs. Each has `what` it is, the `file`, the `text` that stands there once, its
`replacement`, and the `tests` that should see it (files, node ids, or `-k` words). A bug that no test can see has
`equivalent`: why. A bug counts as caught when one of its tests fails; the tests pass without it, which is checked
first. `make test` runs the quick tests: those are tried first, the slow ones of `make test-all` only after them.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import yaml
from processes import kill_tree
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "mutants"
TIMEOUT_S = 600.0  # for all tests of one bug; a bug that makes them hang is caught
QUICK, ALL, NOTHING = "make test", "make test-all", "nothing"
PRELOAD = [  # libraries only: the project's own modules come from each copy
    "torch", "torch._dynamo", "torch.distributed.nn", "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.pipelining",
    "torch.distributed.tensor.debug", "torch.distributed.elastic.multiprocessing.errors",
    "torch.utils.flop_counter", "matplotlib.figure", "matplotlib.backends.backend_agg", "yaml",
    "tqdm", "sklearn.datasets", "pytest", "psutil",
]  # fmt: skip
TEST_FAILED = 1  # pytest's exit code; 2 to 5 say that pytest could not run the tests


@dataclass(frozen=True)
class Mutant:
    """One bug of the table."""

    lesson: str
    what: str
    file: str
    text: str
    replacement: str
    tests: list[str]
    equivalent: str = ""


@dataclass
class Result:
    """What became of one bug: `caught_by` is "make test", "make test-all" or "nothing"."""

    what: str
    file: str
    caught_by: str
    test: str = ""
    equivalent: str = ""
    seconds: float = field(default=0.0)


def read_table(lesson: str) -> list[Mutant]:
    """Return the bugs of a lesson.

    Raises:
        ValueError: an entry lacks a key, has an unknown one, or its text does not stand exactly once in the file.
    """
    mutants = []
    for number, entry in enumerate(yaml.safe_load((FOLDER / f"{lesson}.yaml").read_text()), 1):
        try:
            mutant = Mutant(lesson, **entry)
        except TypeError as error:
            raise ValueError(f"tests/mutants/{lesson}.yaml, entry {number}: {error}") from None
        count = (ROOT / mutant.file).read_text().count(mutant.text)
        if count != 1:
            where = f"tests/mutants/{lesson}.yaml, {mutant.what!r}"
            raise ValueError(f"{where}: its text stands {count} times in {mutant.file}; expected once")
        mutants.append(mutant)
    return mutants


def copy_repository(target: Path) -> None:
    """Copy what git tracks, and what it does not ignore, to `target`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in sorted(set(listed.split("\0")) - {""}):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    for words in (["init", "-q"], ["add", "-A"]):  # some tests ask git which files there are
        subprocess.run(["git", *words], cwd=target, check=True, capture_output=True)


def run_tests(root: Path, tests: list[str], slow: bool) -> tuple[int | None, str]:
    """Run tests in the copy `root` up to the first failure; returns pytest's exit code (None: too long) and output.

    pytest is forked from a process that has imported torch and pytest, but nothing of the project: a fresh start
    would take longer than most of the tests.
    """
    words = [word for test in tests for word in (test.split(" ", 1) if test.startswith("-k ") else [test])]
    marker = [] if slow else ["-m", "not slow"]
    command = ["-x", "-q", "-p", "no:cacheprovider", "--timeout=100", *marker, *words]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    output = root / "pytest-output.txt"
    process = context.Process(target=_pytest, args=(root, command, output))
    process.start()
    process.join(TIMEOUT_S)
    code = process.exitcode
    if code is None:
        kill_tree(process.pid)
        process.join()
    return code, output.read_text(errors="replace") if output.is_file() else ""


def _pytest(root: Path, command: list[str], output: Path) -> None:
    """Become pytest in the folder `root`; its ranks are forked from this process (tests/support/fork_server.py)."""
    log = os.open(output, os.O_WRONLY | os.O_CREAT)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    os.chdir(root)
    sys.path[:] = [str(root), *(path for path in sys.path if path not in ("", str(ROOT), str(ROOT / "tools")))]
    os.environ |= {"PYTHONPATH": str(root), "GROUP_TIMEOUT_S": "40", "RANKS_FROM_PYTEST": "1"}
    import pytest

    code = pytest.main(command)
    sys.stdout.flush()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(int(code))


def first_failure(output: str) -> str:
    """Return the node id of the first test that failed, from pytest's summary."""
    for line in output.splitlines():
        if line.startswith(("FAILED ", "ERROR ")):
            return line.split(" ", 1)[1].split(" - ")[0]
    return "a hang"


def try_mutant(mutant: Mutant, slow: bool) -> Result:
    """Plant one bug, run its tests, and say which selection catches it."""
    started = time.monotonic()
    result = Result(mutant.what, mutant.file, NOTHING, equivalent=mutant.equivalent)
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        root = Path(folder)
        copy_repository(root)
        path = root / mutant.file
        path.write_text(path.read_text().replace(mutant.text, mutant.replacement))
        for selection in (QUICK, ALL) if slow else (QUICK,):
            code, output = run_tests(root, mutant.tests, selection == ALL)
            if code in (TEST_FAILED, None):
                result.caught_by, result.test = selection, first_failure(output)
                break
            if code != 0 and not (code == 5 and selection == QUICK):  # 5: all of its tests are slow
                result.caught_by, result.test = selection, f"pytest ended with {code}: {output[-300:].strip()}"
                break
    result.seconds = round(time.monotonic() - started, 1)
    return result


def baseline_problem(mutants: list[Mutant]) -> str:
    """Return what fails without any bug: such a test would catch everything. Empty when all tests pass."""
    by_word = {tuple(mutant.tests) for mutant in mutants if any(test.startswith("-k ") for test in mutant.tests)}
    plain = {test for mutant in mutants if tuple(mutant.tests) not in by_word for test in mutant.tests}
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy_repository(Path(folder))
        for tests in [*([sorted(plain)] if plain else []), *map(list, sorted(by_word))]:
            code, output = run_tests(Path(folder), tests, slow=False)
            if code not in (0, 5):
                return f"{' '.join(tests)} without any bug: pytest ended with {code}\n{output[-3000:]}"
    return ""


def measure(lesson: str, mutants: list[Mutant], slow: bool, workers: int, baseline: bool) -> list[Result]:
    """Try the bugs of one lesson, `workers` at a time."""
    if baseline and (problem := baseline_problem(mutants)):
        raise ValueError(problem)
    results = []
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(mutants), desc=lesson, unit="bug") as bar:
        for result in pool.map(lambda mutant: try_mutant(mutant, slow), mutants):
            results.append(result)
            bar.update()
            if result.caught_by == NOTHING and not result.equivalent:
                tqdm.write(f"SURVIVED  {lesson}: {result.what} ({result.file})")
    return results


def describe_machine() -> str:
    """Return cores, system and versions, for the record."""
    import importlib.metadata

    python, torch = platform.python_version(), importlib.metadata.version("torch")
    return f"{os.cpu_count()} CPU cores, {platform.system()} {platform.machine()}, Python {python}, torch {torch}"


def keep(lesson: str, results: list[Result], whole: list[Mutant]) -> None:
    """Write the results of a lesson. Bugs of its table that were not tried now keep the result that they had."""
    path = FOLDER / "results" / f"{lesson}.json"
    before = json.loads(path.read_text())["bugs"] if path.is_file() else []
    known = {(bug["what"], bug["file"]): Result(**bug) for bug in before}
    known |= {(result.what, result.file): result for result in results}
    results = [known[bug.what, bug.file] for bug in whole if (bug.what, bug.file) in known]
    record = {"date": time.strftime("%Y-%m-%d"), "machine": describe_machine(), "bugs": [asdict(r) for r in results]}
    (FOLDER / "results").mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def report() -> str:
    """Return the page of results, from what is kept."""
    lines = ["# Planted bugs", "", "`make mutants` plants one bug at a time and runs the tests that should see it.",
             "`make mutants M=ddp` tries one lesson; `make mutants ARGS=--list` lists all bugs.",
             "This page is generated by `tools/mutants.py` from `results/`.", "",
             "| lesson | bugs | caught by `make test` | by `make test-all` | equivalent | survive | tried |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    total = [0, 0, 0, 0, 0]
    details: list[str] = []
    for path in sorted((FOLDER / "results").glob("*.json")):
        record = json.loads(path.read_text())
        bugs = [Result(**bug) for bug in record["bugs"]]
        quick = sum(bug.caught_by == QUICK for bug in bugs)
        caught = sum(bug.caught_by != NOTHING for bug in bugs)
        equivalent = sum(bug.caught_by == NOTHING and bool(bug.equivalent) for bug in bugs)
        row = [len(bugs), quick, caught, equivalent, len(bugs) - caught - equivalent]
        total = [a + b for a, b in zip(total, row, strict=True)]
        lines.append(f"| {path.stem} | {' | '.join(map(str, row))} | {record['date']}, {record['machine']} |")
        details += [f"- {path.stem}: {bug.what} (`{bug.file}`): {bug.equivalent or 'no test sees it'}"
                    for bug in bugs if bug.caught_by == NOTHING]  # fmt: skip
        details += [f"- {path.stem}: {bug.what} (`{bug.file}`): only `make test-all` sees it"
                    for bug in bugs if bug.caught_by == ALL]  # fmt: skip
    lines.append(f"| **all** | {' | '.join(map(str, total))} | |")
    if total[0] > total[3]:
        able = total[0] - total[3]
        quick, caught = total[1] / able, total[2] / able
        lines += ["", f"Of the {able} bugs that change what the code does, `make test` catches {quick:.1%}, "
                      f"`make test-all` {caught:.1%}."]  # fmt: skip
    if details:
        lines += ["", "Not caught by `make test`, and why:", "", *details]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("lessons", nargs="*", help="names of files in tests/mutants; default: all")
    parser.add_argument("--list", action="store_true", help="print one line for each bug, and try none")
    parser.add_argument("-k", default="", metavar="WORD", help="only bugs whose description or file holds WORD")
    parser.add_argument("--quick", action="store_true", help="leave the slow tests out")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests without a bug first")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="bugs tried at a time")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before the server imports torch
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    if unknown := sorted(set(options.lessons) - set(known)):
        parser.error(f"there is no tests/mutants/{unknown[0]}.yaml; there are: {', '.join(known)}")
    survivors = 0
    try:
        for lesson in options.lessons or known:
            whole = read_table(lesson)
            mutants = [mutant for mutant in whole if options.k in mutant.what or options.k in mutant.file]
            if options.list:
                print("\n".join(f"{m.lesson:16} {m.file:40} {m.what}" for m in mutants))
                continue
            results = measure(lesson, mutants, not options.quick, options.workers, not options.no_baseline)
            survivors += sum(result.caught_by == NOTHING and not result.equivalent for result in results)
            for result in results:
                print(f"{lesson:16} {result.caught_by:14} {result.seconds:6.1f} s  {result.what}  [{result.test}]")
            if not options.quick:
                keep(lesson, results, whole)
                (FOLDER / "README.md").write_text(report())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
