"""Exercises: one source file that runs is the solution; the task is made from it.

In ROOM/exercises/NAME.py:

    # exercise 2: Average the gradients          the first line: number and title
    def average(model):
        # solution
        for parameter in model.parameters(): …   what the learner is to write
        # task: raise NotImplementedError("…")    what stands in its place in the task, line by line
        # end

In a lab, the `# task:` lines are the planted bug; a single bare `# task:` leaves nothing. The check stands in
ROOM/exercises/checks/NAME.py (see tools/grading.py); its WORLD_SIZES says on how many ranks it runs (default: 2 and 3).

    python tools/exercises.py write ddp                      ROOM/exercises/tasks/NAME.py, for you to edit
    python tools/exercises.py grade ddp [NAME …]             grade your files
    python tools/exercises.py grade ddp --solutions          grade the solutions
"""

import argparse
import ast
import hashlib
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import grading
from docs_markdown import ROOT, DocsError

TITLE = re.compile(r"# exercise (\d+): (\S.*)")
STAMP = re.compile(r"# Your copy of (\S+), version ([0-9a-f]{12})\. .*\n")


@dataclass(frozen=True)
class Exercise:
    """One exercise: its source file, its place in the row, and the task text made from it."""

    source: Path
    number: int
    title: str
    task: str

    @property
    def name(self) -> str:
        return self.source.stem


@dataclass(frozen=True)
class Grade:
    """The result of one exercise; `world_size` is where it stopped."""

    exercise: Exercise
    status: str
    world_size: int
    message: str
    output: str
    seconds: float


def make_task(text: str, name: str) -> str:
    """The task of a source text: `# solution` blocks give way to their `# task:` lines. Raises DocsError."""
    lines: list[str] = []
    opened, task, indent = 0, [], ""
    for number, line in enumerate(text.split("\n"), start=1):
        marker = line.strip()
        if marker == "# solution":
            if opened:
                raise DocsError(f"{name}:{number}: `# solution` inside the one of line {opened}")
            opened, task, indent = number, [], line[: len(line) - len(line.lstrip())]
        elif marker.startswith("# task:"):
            if not opened:
                raise DocsError(f"{name}:{number}: `# task:` outside a solution")
            task.append(marker.removeprefix("# task:").removeprefix(" "))
        elif marker == "# end":
            if not opened or not task:
                raise DocsError(f"{name}:{number}: `# end` without `# solution` and `# task:` above it")
            lines += [(indent + words).rstrip() for words in task] if any(task) else []
            opened = 0
        elif not opened:
            lines.append(line)
        elif task and marker:
            raise DocsError(f"{name}:{number}: code between `# task:` and `# end`")
    if opened:
        raise DocsError(f"{name}:{opened}: `# solution` without `# end`")
    made = "\n".join(lines)
    if made == text:
        raise DocsError(f"{name}: no `# solution` block: nothing to do")
    return made


def find(root: Path, room: str) -> list[Exercise]:
    """The exercises of a room in their order. Raises DocsError for a file that breaks the rules."""
    folder = root / room / "exercises"
    if not folder.is_dir():
        with_exercises = sorted(path.parent.name for path in root.glob("*/exercises"))
        raise DocsError(f"there is no {room}/exercises; rooms with exercises: {', '.join(with_exercises) or 'none'}")
    exercises = []
    for source in sorted(folder.glob("*.py")):
        text = source.read_text()
        title = TITLE.fullmatch(text.split("\n", 1)[0])
        if not title:
            raise DocsError(f"{source.relative_to(root)}:1: expected `# exercise NUMBER: TITLE`")
        task = make_task(text, str(source.relative_to(root)))
        exercises.append(Exercise(source, int(title[1]), title[2], task))
    return sorted(exercises, key=lambda exercise: exercise.number)


def choose(exercises: list[Exercise], names: list[str]) -> list[Exercise]:
    """The exercises with these names, or all."""
    known = {exercise.name for exercise in exercises}
    for name in names:
        if name.removesuffix(".py") not in known:
            raise DocsError(f"there is no exercise {name}; there are: {', '.join(sorted(known))}")
    wanted = {name.removesuffix(".py") for name in names} or known
    return [exercise for exercise in exercises if exercise.name in wanted]


def write(root: Path, room: str, exercises: list[Exercise], tasks: Path, force: bool) -> None:
    """Write the task files. A file that the learner has edited stays as it is unless `force`."""
    tasks.mkdir(parents=True, exist_ok=True)
    for exercise in exercises:
        version = hashlib.sha256(exercise.task.encode()).hexdigest()[:12]
        origin = exercise.source.relative_to(root)
        text = f"# Your copy of {origin}, version {version}. Edit it, then: make grade M={room}\n{exercise.task}"
        path = tasks / exercise.source.name
        shown = path.relative_to(root) if path.is_relative_to(root) else path
        if path.exists() and not force and _is_edited(path.read_text()):
            print(f"kept   {shown}: you have edited it (--force starts it again)")
        else:
            path.write_text(text)
            print(f"wrote  {shown}: {exercise.title}")


def _is_edited(text: str) -> bool:
    stamp = STAMP.match(text)
    body = text[stamp.end() :] if stamp else text
    return not stamp or hashlib.sha256(body.encode()).hexdigest()[:12] != stamp[2]


def grade(exercises: list[Exercise], folder: Path | None, timeout_s: float = 30.0) -> list[Grade]:
    """Grade the files of `folder` (None: the solutions), each on every world size until one does not pass."""
    grades = []
    for exercise in exercises:
        check = exercise.source.parent / "checks" / exercise.source.name
        path = folder / exercise.source.name if folder else exercise.source
        started = time.monotonic()
        world_size, outcome = (
            0,
            grading.Outcome(grading.NOT_STARTED, f"{path.name} is missing; make exercise writes it"),
        )
        if path.is_file():
            for world_size in _world_sizes(check):
                outcome = grading.run_check(path, check, world_size, timeout_s)
                if outcome.status != grading.PASSED:
                    break
        seconds = time.monotonic() - started
        grades.append(Grade(exercise, outcome.status, world_size, outcome.message, outcome.output, seconds))
    return grades


def _world_sizes(check: Path) -> tuple[int, ...]:
    """From the line `WORLD_SIZES = (…)` of the check, read without importing it; else 2 and 3 ranks."""
    for node in ast.parse(check.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "WORLD_SIZES":
            return tuple(ast.literal_eval(node.value))
    return (2, 3)


def report(grades: list[Grade]) -> str:
    """The messages of what did not pass, then a table of all."""
    parts = []
    for result in grades:
        if result.message and result.status != grading.NOT_STARTED:
            at = f" at {result.world_size} rank{'s' * (result.world_size > 1)}"
            text = f"{result.exercise.name}: {result.status}{at}\n{result.message}"
            if result.output.strip():
                text += "\nyour output on rank 0:\n  " + "\n  ".join(result.output.strip().split("\n")[-10:])
            parts.append(text)
    width = max(len(result.exercise.name) for result in grades)
    table = [f"{'exercise':{width + 3}} {'result':12} seconds"]
    for result in grades:
        name = f"{result.exercise.number}  {result.exercise.name:{width}}"
        table.append(f"{name} {result.status:12} {result.seconds:7.1f}")
    passed = sum(result.status == grading.PASSED for result in grades)
    return "\n\n".join([*parts, "\n".join(table), f"{passed} of {len(grades)} passed"])


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the exercises of a room, or grade them.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("write", "write the task files"), ("grade", "grade your files on the CPU")):
        command = commands.add_parser(name, help=text)
        command.add_argument("room", help="the folder, for example ddp")
        command.add_argument("names", nargs="*", help="only these exercises")
        command.add_argument("--tasks", type=Path, help="where your files are (default: ROOM/exercises/tasks)")
        if name == "write":
            command.add_argument("--force", action="store_true", help="overwrite files that you have edited")
        else:
            command.add_argument("--solutions", action="store_true", help="grade the solutions instead of your files")
            command.add_argument("--timeout", type=float, default=30.0, help="seconds until a check counts as hanging")
    arguments = parser.parse_args()
    try:
        exercises = choose(find(ROOT, arguments.room), arguments.names)
        tasks = arguments.tasks or ROOT / arguments.room / "exercises" / "tasks"
        if arguments.command == "write":
            write(ROOT, arguments.room, exercises, tasks, arguments.force)
            return 0
        grades = grade(exercises, None if arguments.solutions else tasks, arguments.timeout)
    except DocsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(grades))
    return 0 if all(result.status == grading.PASSED for result in grades) else 1


if __name__ == "__main__":
    sys.exit(main())
