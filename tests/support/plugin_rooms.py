"""A room (a folder under tests/) whose tests were all skipped is not a tested room.

At the end of every run the skips are listed by reason. When the run was meant to cover the whole suite, each
room is counted, and a room in which no test ran makes the run fail: green means that something was tested.
"""

from collections import Counter
from pathlib import Path

import pytest


def room_of(node_id: str) -> str:
    """`tests/common/test_loss.py::test_x` → `common`; files in tests/ itself form the room `tests`."""
    parts = Path(node_id.split("::")[0]).parts
    return parts[1] if len(parts) > 2 else parts[0]


def covers_everything(config: pytest.Config) -> bool:
    """Whether this run was asked for all tests: no path, no -k, no -m, nothing else that selects some."""
    option = config.option
    selected = option.keyword or option.deselect or option.ignore or option.ignore_glob
    selected = (
        selected
        or option.markexpr not in ("", "not slow")
        or getattr(option, "lf", False)
        or getattr(option, "stepwise", False)
    )
    everything = {str(Path(path)) for path in config.getini("testpaths")}
    return not selected and not option.collectonly and {str(Path(path)) for path in config.args} == everything


class Rooms:
    """Counts, per room, the tests that ran and those that were skipped, with their reasons."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.ran: Counter[str] = Counter()
        self.skipped: Counter[tuple[str, str]] = Counter()  # (room, reason)
        tests = config.rootpath / "tests"
        self.rooms = {room_of(str(file.relative_to(config.rootpath))) for file in tests.rglob("test_*.py")}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self._note_skip(report)
        elif report.when == "call":
            self.ran[room_of(report.nodeid)] += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:  # a whole file, by pytest.importorskip or pytest.skip
            self._note_skip(report)

    def _note_skip(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        self.skipped[room_of(report.nodeid), reason.removeprefix("Skipped: ")] += 1

    def empty(self) -> list[str]:
        return sorted(room for room in self.rooms if not self.ran[room])

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if hasattr(self.config, "workerinput"):  # one of several workers: it sees a part of the tests
            return
        passed_so_far = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        if passed_so_far and covers_everything(self.config) and self.empty():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        write = terminalreporter.write_line
        whole = covers_everything(self.config)
        if self.skipped or whole:
            terminalreporter.section("rooms")
        for (room, reason), count in sorted(self.skipped.items()):
            write(f"{room}: {count} skipped: {reason}")
        if whole:
            skipped = Counter[str]()
            for (room, _), count in self.skipped.items():
                skipped[room] += count
            for room in sorted(self.rooms):
                write(f"{room}: {self.ran[room]} ran, {skipped[room]} skipped")
            for room in self.empty():
                write(f"error: no test ran in the room {room}; see the skips above", red=True)
