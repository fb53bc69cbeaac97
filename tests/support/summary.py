"""What a test run says before it starts and after it ends.

Before: how many tests, what they are, and how long the same selection took last time here. After: skips by reason,
seconds by folder, the slowest tests. When the run was meant to cover the whole suite, a folder in which no test ran
makes it fail: green means that something was tested.
"""

import os
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

LAST = "summary/last"  # in pytest's cache: seconds, workers and date by selection
SECONDS = "summary/seconds"  # of every test of the last whole run, the slowest first
SLOWEST = 20


def folder_of(node_id: str) -> str:
    """`tests/common/test_loss.py::test_x` → `common`; files in tests/ itself belong to `tests`."""
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


def minutes(seconds: float) -> str:
    """`432.1` → `7 min 12 s`."""
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


class Summary:
    """Counts and times, by folder, the tests that ran, and counts those that were skipped, with their reasons."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.started = time.time()
        self.ran: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)  # by node id: set-up, call and tear-down
        self.skipped: Counter[tuple[str, str]] = Counter()  # (folder, reason)
        tests = config.rootpath / "tests"
        self.folders = {folder_of(str(file.relative_to(config.rootpath))) for file in tests.rglob("test_*.py")}

    # ------------------------------------------------------------------------------------------ before

    def pytest_report_header(self) -> list[str]:
        if hasattr(self.config, "workerinput") or not covers_everything(self.config):
            return []
        quick = self.config.option.markexpr == "not slow"
        what = (
            "make test: every strategy of every lesson against one process, replicas, resume, refusals, the exercises, "
            "the front page's commands, a two-node job of each launch pattern"
            if quick
            else "make test-all: everything, with all README commands, long trainings, faults on the cluster"
        )
        last = self.config.cache.get(LAST, {}).get(self.config.option.markexpr)
        before = (
            f"last time here: {minutes(last['seconds'])} on {last['date']} ({last['workers']} workers)"
            if last
            else "no whole run has ended here yet; on two cores `make test` takes about 10 minutes, `make test-all` 90"
        )
        return [what, before]

    # ------------------------------------------------------------------------------------------ while it runs

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.skipped and not hasattr(report, "wasxfail"):
            self._note_skip(report)
        elif report.when == "call":
            self.ran[folder_of(report.nodeid)] += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:  # a whole file, by pytest.importorskip or pytest.skip
            self._note_skip(report)

    def _note_skip(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        self.skipped[folder_of(report.nodeid), reason.removeprefix("Skipped: ")] += 1

    # ------------------------------------------------------------------------------------------ after

    def empty(self) -> list[str]:
        return sorted(folder for folder in self.folders if not self.ran[folder])

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if hasattr(self.config, "workerinput"):  # one of several workers: it sees a part of the tests
            return
        if covers_everything(self.config):
            self.config.cache.set(SECONDS, dict(sorted(self.seconds.items(), key=lambda item: -item[1])))
        if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            return
        if not covers_everything(self.config):
            return
        if self.empty():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        else:
            kept = self.config.cache.get(LAST, {})
            record = {
                "seconds": time.time() - self.started,
                "date": time.strftime("%Y-%m-%d"),
                "workers": self._workers(),
            }
            self.config.cache.set(LAST, kept | {self.config.option.markexpr: record})

    def _workers(self) -> int:
        return len(getattr(self.config.option, "tx", None) or [1])

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        whole = covers_everything(self.config)
        if hasattr(self.config, "workerinput") or not (self.skipped or whole):
            return
        terminalreporter.section("skipped tests" if not whole else "by folder")
        lines = [f"{folder}: {count} skipped: {reason}" for (folder, reason), count in sorted(self.skipped.items())]
        if whole:
            lines += ["", *self.table()]
        for line in lines:
            terminalreporter.write_line(line)
        if whole:
            for folder in self.empty():
                terminalreporter.write_line(f"error: no test ran in tests/{folder}; see the skips above", red=True)
        if path := os.environ.get("TEST_SUMMARY"):  # .ci/run shows it once more at its end
            with open(path, "a") as file:
                file.write("\n".join(lines) + "\n")

    def table(self) -> list[str]:
        """Seconds and counts by folder, then the slowest tests."""
        by_folder: Counter[str] = Counter()
        for node_id, seconds in self.seconds.items():
            by_folder[folder_of(node_id)] += seconds
        skipped: Counter[str] = Counter()
        for (folder, _), count in self.skipped.items():
            skipped[folder] += count
        total = sum(by_folder.values())
        lines = [f"{'folder':16} {'seconds':>8} {'ran':>6} {'skipped':>8}"]
        for folder in sorted(self.folders, key=lambda name: -by_folder[name]):
            lines.append(f"{folder:16} {by_folder[folder]:8.0f} {self.ran[folder]:6} {skipped[folder]:8}")
        lines.append(f"{'all':16} {total:8.0f} {sum(self.ran.values()):6} {sum(skipped.values()):8}"
                     f"   in {minutes(time.time() - self.started)} with {self._workers()} workers")  # fmt: skip
        slowest = sorted(self.seconds.items(), key=lambda item: -item[1])[:SLOWEST]
        return [*lines, "", f"the {len(slowest)} slowest tests:", *(f"{s:8.1f} s  {node}" for node, s in slowest)]
