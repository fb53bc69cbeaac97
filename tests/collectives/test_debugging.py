"""collectives/debugging.md: every text of its tables is what the program beside it prints, and each program ends."""

import re
import shutil

import pytest
from launching import ROOT, OnRanks

ON_RANKS = OnRanks("tests/collectives/debugging_on_ranks.py")
FOLDER = "collectives/debugging"
PAGE = ROOT / "collectives" / "debugging.md"
ENDS_S = 60  # a limit for machines under load; on a quiet one all end within ten seconds
ROW = re.compile(r"^\| `([^`]+)` \| `([^`]+)` \|")


def read_tables() -> dict[str, list[str]]:
    """The texts by the command that prints them."""
    texts: dict[str, list[str]] = {}
    for line in PAGE.read_text().splitlines():
        if row := ROW.match(line):
            texts.setdefault(row[2], []).append(row[1])
    return texts


TABLES = read_tables()
slow = pytest.mark.slow  # together five minutes: most of these programs wait for something that never comes
# Those that wait for nothing, and whose ranks outlive it, run on ranks that are up already.
QUICK = ["joining.py --mistake port_in_use", "joining.py --mistake half_set", "joining.py --mistake wrong_interface",
         "TORCH_DISTRIBUTED_DEBUG=DETAIL mismatch.py --what collective",
         "TORCH_DISTRIBUTED_DEBUG=DETAIL mismatch.py --what shape",
         "TORCH_DISTRIBUTED_DEBUG=DETAIL mismatch.py --what dtype", "mismatch.py --what dtype",
         "mismatch.py --what operation", "drift.py", "drift.py --check true"]  # fmt: skip


def start(launch, command: str, nproc: int = 2):
    """A command as the tables abbreviate it: variables, the program, its options. Returns what it said, all in one."""
    words = command.split()
    variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    program, *options = words[len(variables) :]
    alone = program == "joining.py"  # one process that poses as one of several
    finished = launch(f"{FOLDER}/{program}", *options, nproc=0 if alone else nproc, env=variables, timeout=ENDS_S,
                      check=False)  # fmt: skip
    return finished.returncode, finished.stdout + finished.stderr


def test_the_tables_are_read():
    rows = sum(line.startswith("| `") for line in PAGE.read_text().splitlines())
    assert sum(map(len, TABLES.values())) == rows >= 25
    programs = {word for command in TABLES for word in command.split() if word.endswith(".py")}
    files = {file.name for file in (ROOT / FOLDER).glob("*.py")} - {"reporting.py"}
    assert programs - {"../point_to_point.py"} == files  # each program is in a table


@slow
@pytest.mark.parametrize("command", TABLES)
def test_a_program_says_what_the_page_says(launch, command):
    code, said = start(launch, command)
    check(command, said)
    if "joining.py" in command:
        assert code == 2
    else:
        # torchrun turns every failure into 1; the guard of drift.py finds the fault after some harmless steps
        assert code == (0 if is_harmless(command, said) else 1)


@pytest.mark.parametrize("command", QUICK)
def test_a_program_says_it_on_ranks_too(group, command):
    """Every rank ends as the mistake says: with 2 by this project's words, with 1 by torch's, or unharmed."""
    assert command in TABLES
    answers = group(1 if "joining.py" in command else 2)(ON_RANKS.program, command)
    said = "\n".join(text for _, text in answers)
    check(command, said)
    ours = "joining.py" in command or "--check" in command
    assert [code for code, _ in answers] == [2 if ours else 0 if is_harmless(command, said) else 1] * len(answers)


def check(command, said):
    """Every text of the page stands in what was said."""
    said = " ".join(said.split())
    for text in TABLES[command]:
        pattern = ".*?".join(map(re.escape, text.split("…")))
        assert re.search(pattern, said), f"{text!r} is not in the output of {command}:\n{said[-4000:]}"


def is_harmless(command, said):
    return ("no error" in said or "../point_to_point.py" in command) and "--check" not in command


@slow
def test_patience_is_the_cure_for_a_late_rank(launch):
    code, said = start(launch, "late_rank.py --timeout_s 40")
    assert code == 0 and said.count("all have come: 2 ranks") == 2


@slow
@pytest.mark.parametrize(("size", "command", "words"), [
    (3, "missing_rank.py --tool monitored_barrier", ["Ranks 2 failed to pass monitoredBarrier"]),
    (4, "drift.py --check true", ["on rank(s) 3"]),
    (3, "TORCH_DISTRIBUTED_DEBUG=DETAIL mismatch.py --what shape", ["Tensor Tensor shapes: "]),
    (4, "missing_rank.py --tool timeout", ["RuntimeError"]),
])  # fmt: skip
def test_more_ranks(launch, size, command, words):
    code, said = start(launch, command, nproc=size)
    assert code == 1 and all(word in said for word in words), said[-4000:]


@slow
def test_the_recorder_shows_who_did_not_come(launch):
    _, said = start(launch, "TORCH_FR_BUFFER_SIZE=2000 missing_rank.py --tool flight_recorder")
    numbers = {rank: re.findall(rf"\[rank {rank}\] collective (\d+): gloo:(\w+) of", said) for rank in (0, 1)}
    # A group counts its own calls: the all-reduces are of one with a short timeout, the others of the world.
    assert numbers[1] == [("1", "barrier"), ("1", "all_reduce"), ("2", "all_gather"), ("3", "all_gather")]
    assert numbers[0] == [*numbers[1], ("2", "all_reduce")]


@slow
def test_py_spy(launch):
    """Needs py-spy, which is no requirement of the project, and the right to trace."""
    if not shutil.which("py-spy"):
        pytest.skip("py-spy is not installed (pip install py-spy)")
    _, said = start(launch, "missing_rank.py --tool py_spy")
    if "ermission denied" in said:
        pytest.skip("py-spy may not look into other processes here")
    assert "py-spy, rank 1: evaluate_alone (missing_rank.py:" in said


@pytest.mark.parametrize(("command", "words"), [
    ("missing_rank.py --tool flight_recorder", ["TORCH_FR_BUFFER_SIZE", "2000"]),
    ("missing_rank.py --tool strace", ["tool = strace", "py_spy"]),
    ("mismatch.py --what shape --shape 3", ["unknown key shape"]),
    ("late_rank.py --late_s 99", ["late_s = 99", "0 to 10"]),
])  # fmt: skip
def test_mistakes_are_one_line(group, command, words):
    ((code, said),) = group(1)(ON_RANKS.program, command)
    (line,) = [line for line in said.splitlines() if "error: " in line]
    assert code == 2 and all(word in line for word in words), line
    assert "Traceback" not in said
