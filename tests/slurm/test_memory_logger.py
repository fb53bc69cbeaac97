"""The memory logger sees what a process takes, sums up correctly, and never outlives what it watches."""

import csv
import importlib.util
import os
import signal
import subprocess
import sys
import time
import uuid

import psutil
import pytest
from launching import ROOT, clean_environment, run_command

SCRIPT = ROOT / "slurm" / "memory_logger.py"
MIB = 2**20

spec = importlib.util.spec_from_file_location("memory_logger", SCRIPT)
memory_logger = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory_logger)


def until(condition, seconds=20):
    """Wait for a condition; what it returned, or a failure at the deadline."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := condition():
            return answer
        time.sleep(0.05)
    raise AssertionError(f"{condition.__name__} did not come true within {seconds} s")


def logger(folder, *more, **environment):
    command = [sys.executable, str(SCRIPT), "--output", str(folder), "--interval", "0.1", *more]
    return subprocess.Popen(
        command, env=clean_environment(**environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def rows(folder, host="here"):
    path = folder / f"{host}.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_the_memory_of_a_jobs_process_is_seen_and_nobody_elses(tmp_path):
    """200 MiB come and stay, then go: the peak rises by them, and by nothing that belongs to another job."""
    job = f"memory-test-{uuid.uuid4()}"  # as Slurm sets it: only processes that carry it count
    code = "import sys; print(0, flush=True); input(); b = bytearray(b'x') * (200 << 20); print(1, flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    child, stranger = (
        subprocess.Popen([sys.executable, "-c", code], env=clean_environment(SLURM_JOB_ID=name), **pipes)
        for name in (job, f"another-{job}")
    )
    watching = logger(tmp_path, "--host", "here", SLURM_JOB_ID=job)

    def job_bytes():
        return [int(row["job_used_bytes"]) for row in rows(tmp_path)]

    def seen(count):
        def enough():
            return len(job_bytes()) >= count

        until(enough)

    try:
        child.stdout.readline()
        stranger.stdout.readline()
        ready = len(job_bytes()) + 1  # the sample being taken now may have begun before both were there
        seen(ready + 2)
        before = len(job_bytes())
        for process in (child, stranger):
            process.stdin.write("\n")
            process.stdin.flush()
            process.stdout.readline()
        seen(len(job_bytes()) + 5)
        watching.send_signal(signal.SIGTERM)
        out, err = watching.communicate(timeout=20)
    finally:
        for process in (child, stranger, watching):
            process.kill()
            process.communicate()
    assert watching.returncode == 0 and err == ""
    values = job_bytes()
    grown = max(values) - max(values[ready:before])
    # What the interpreter itself takes for one more statement, and the last free pages that malloc reuses: below 4 MiB.
    assert abs(grown - 200 * MIB) < 4 * MIB
    device_line = next(line.split() for line in out.splitlines() if " job " in line)
    assert float(device_line[2]) == round(max(values) / 2**30, 3)
    assert f"here: {len(values)} samples" in out
    assert (tmp_path / "here.csv").read_text().endswith("\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_it_with_a_whole_file_and_a_summary(tmp_path, number):
    watching = logger(tmp_path, "--host", "here", "--interval", "0.05")
    until(lambda: len(rows(tmp_path)) >= 3)
    watching.send_signal(number)
    out, err = watching.communicate(timeout=20)
    assert (watching.returncode, err) == (0, "")
    text = (tmp_path / "here.csv").read_text()
    assert text.endswith("\n")
    found = rows(tmp_path)
    assert all(row["host_used_bytes"] and row["host_available_bytes"] and row["job_used_bytes"] for row in found)
    seconds = [float(row["seconds"]) for row in found]
    assert seconds[0] == 0.0 and seconds == sorted(set(seconds))
    assert f"here: {len(found)} samples" in out and str(tmp_path / "here.csv") in out
    again = run_command([sys.executable, str(SCRIPT), "summary", str(tmp_path)])
    assert again.stdout.strip() == "\n".join(out.splitlines()[:-1])


@pytest.mark.parametrize("interval", ["0.1", "3600"])
def test_killing_the_parent_ends_it(tmp_path, interval):
    """Also in the middle of a long interval, and when nobody reads its output any more."""
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path), "--host", "here", "--interval", interval]
    code = f"import subprocess; p = subprocess.Popen({command!r}); print(p.pid, flush=True); p.wait()"
    parent = subprocess.Popen(
        [sys.executable, "-c", code], env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    pid = int(parent.stdout.readline())
    try:
        until(lambda: len(rows(tmp_path)) >= 1)
        assert not gone(pid)
        parent.kill()
        parent.stdout.close()
        parent.wait()
        until(lambda: gone(pid))
        assert "Traceback" not in parent.stderr.read()
    finally:
        parent.stderr.close()
        if psutil.pid_exists(pid) and not gone(pid):
            os.kill(pid, signal.SIGKILL)


def test_it_ends_with_the_process_that_it_was_told_to_watch(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as job:
        watching = logger(tmp_path, "--host", "here", "--pid", str(job.pid))
        until(lambda: len(rows(tmp_path)) >= 2)
        assert watching.poll() is None
        job.kill()  # not waited for: a zombie has ended too
        out, err = watching.communicate(timeout=20)
    assert (watching.returncode, err) == (0, "") and "peak" in out


@pytest.mark.slow
def test_a_second_run_on_a_host_writes_over_nothing(tmp_path):
    for expected in (["here.csv"], ["here-2.csv", "here.csv"]):
        watching = logger(tmp_path, "--host", "here")
        until(lambda expected=expected: len(list(tmp_path.glob("*.csv"))) == len(expected))
        until(lambda expected=expected: rows(tmp_path, expected[0].removesuffix(".csv")))
        watching.terminate()
        watching.communicate(timeout=20)
        assert sorted(path.name for path in tmp_path.iterdir()) == expected


HEADER = "time,seconds,host_used_bytes,host_available_bytes,host_busy_percent,job_used_bytes"


def write_host(folder, host, used_mib, more_columns=(), more=()):
    """A CSV as the logger writes it; by sample the MiB of the host, a quarter of it the job's."""
    lines = [",".join([HEADER, *more_columns])]
    for i, mib in enumerate(used_mib):
        busy = "" if i == 0 else "50.0"
        row = [f"2026-01-01T00:00:0{i}.000+00:00", f"{i}.000", mib * MIB, 1000 * MIB, busy, mib * MIB // 4]
        lines.append(",".join(map(str, [*row, *(more[i] if more else ())])))
    (folder / f"{host}.csv").write_text("\n".join(lines) + "\n")


def test_summary_of_two_hosts(tmp_path):
    """By hand, in MiB. a: bins of 64 are 1, 4, 4, 4, 9: the mode is the middle of 256, 260, 300.
    b: bins 2, 2, 8, 8: of two equally full bins the higher, and of its two values the lower, 512.
    """
    gpu = [(1024 * MIB, 0), (2049 * MIB, 100), (2048 * MIB, 80), ("", "")]  # the last: NVML gave no answer
    write_host(tmp_path, "a", [100, 300, 256, 260, 584])
    write_host(tmp_path, "b", [128, 130, 512, 520], ["gpu3_used_bytes", "gpu3_busy_percent"], gpu)
    command = [sys.executable, str(SCRIPT), "summary", str(tmp_path), "--plot", str(tmp_path / "memory.png")]
    lines = [line.split() for line in run_command(command).stdout.splitlines()]

    def gib(*mib):
        return [f"{value / 1024:.3f}" for value in mib]

    assert ["a", "host", *gib(584, 300, 260), "50"] in lines
    assert ["a", "job", *gib(146, 75, 65)] in lines  # quarters: 25, 75, 64, 65, 146; bin 1 holds 64, 65, 75
    assert ["b", "host", *gib(520, 322.5, 512), "50"] in lines
    assert ["b", "gpu3", *gib(2049, 1707, 2048), "60"] in lines
    assert ["a:", "5", "samples", "in", "4.0", "s"] in lines and ["b:", "4", "samples", "in", "3.0", "s"] in lines
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_mode():
    assert memory_logger.mode([5.0]) == 5.0
    assert memory_logger.mode([63 * MIB, 64 * MIB, 65 * MIB]) == 64 * MIB  # 64 and 65 share a bin, 63 lies below
    assert memory_logger.mode([0, 1, 2, 200 * MIB, 300 * MIB]) == 1


UUIDS = ["GPU-aa11", "GPU-aa22", "GPU-bb33", "GPU-cc44"]


@pytest.mark.parametrize(("variable", "expected"), [
    (None, {"gpu0": "GPU-aa11", "gpu1": "GPU-aa22", "gpu2": "GPU-bb33", "gpu3": "GPU-cc44"}),
    ("2,1", {"gpu2": "GPU-bb33", "gpu1": "GPU-aa22"}),
    (" 3 ", {"gpu3": "GPU-cc44"}),
    ("0,2,-1,1", {"gpu0": "GPU-aa11", "gpu2": "GPU-bb33"}),  # the example of CUDA's own page
    ("0,7,1", {"gpu0": "GPU-aa11"}),
    ("GPU-bb33,GPU-aa22", {"gpu2": "GPU-bb33", "gpu1": "GPU-aa22"}),
    ("GPU-c", {"gpu3": "GPU-cc44"}),
    ("GPU-aa", {}),  # fits two
    ("", {}),
    ("NoDevFiles", {}),  # what Slurm sets for a job without GPUs
    ("MIG-1234-5,MIG-1234-6", {"mig0": "MIG-1234-5", "mig1": "MIG-1234-6"}),
])  # fmt: skip
def test_visible_gpus(variable, expected):
    found = memory_logger.visible_gpus(variable, UUIDS)
    assert list(found.items()) == list(expected.items())  # in CUDA's order


def ends_with_one_line(*arguments, words):
    result = run_command([sys.executable, str(SCRIPT), *map(str, arguments)], timeout=30, check=False)
    assert result.returncode == 2, result
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line
    assert result.stdout == ""


def test_mistakes_of_logging(tmp_path):
    (tmp_path / "file").write_text("")
    ends_with_one_line("--output", tmp_path / "file" / "folder", words=["file/folder", "write to"])
    ends_with_one_line("--output", "/proc/nowhere", words=["/proc/nowhere", "write to"])
    ends_with_one_line("--output", tmp_path, "--interval", "0", words=["--interval 0", "more than 0"])
    ends_with_one_line("--output", tmp_path, "--interval", "soon", words=["--interval", "soon"])
    no_process = next(pid for pid in range(2**22 - 1, 1, -1) if not psutil.pid_exists(pid))
    ends_with_one_line("--output", tmp_path, "--pid", no_process, words=[f"--pid {no_process}", "no such process"])
    ends_with_one_line(words=["--output"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_mistakes_of_summing_up(tmp_path):
    ends_with_one_line("summary", tmp_path, words=[str(tmp_path), "no CSV"])
    ends_with_one_line("summary", tmp_path / "missing", words=["missing", "no CSV"])
    for text, words in [
        ("a,b\n1,2\n", ["not a CSV of this logger"]),
        ("", ["not a CSV of this logger"]),
        (HEADER + "\n", ["no samples"]),
        (HEADER + "\n2026-01-01T00:00:00.000+00:00,0.000,1,", ["no samples"]),  # cut short, and nothing before it
        (HEADER + "\nyesterday,0.000,1,1,,1\n", ["line 2", "yesterday"]),
    ]:
        (tmp_path / "x.csv").write_text(text)
        ends_with_one_line("summary", tmp_path, words=["x.csv", *words])
    write_host(tmp_path, "x", [100, 200])
    with open(tmp_path / "x.csv", "a") as file:
        file.write("2026-01-01T00:00:02.000+00:00,2.0")  # killed while it wrote
    assert "x: 2 samples" in run_command([sys.executable, str(SCRIPT), "summary", str(tmp_path)]).stdout
    result = run_command([sys.executable, str(SCRIPT), "summary", str(tmp_path), "--plot", "/proc/x.png"], check=False)
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1 and "--plot" in result.stderr
