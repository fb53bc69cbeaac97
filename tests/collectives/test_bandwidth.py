"""The bandwidth tool: its factors, what it writes, that it notices wrong results, its gate, and a user's mistakes."""

import json
import statistics
import subprocess
import sys

import pytest
from launching import ROOT, OnRanks, clean_environment, free_port

sys.path.insert(0, str(ROOT / "collectives"))

import bandwidth
import bandwidth_measure
import bandwidth_operations

ON_RANKS = OnRanks("tests/collectives/bandwidth_on_ranks.py")
ALL = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "reduce", "send_recv"]
slow = pytest.mark.slow
QUICK = ["--warmup", "1", "--repeats", "2"]
# By hand, from the table in nccl-tests' doc/PERFORMANCE.md, at 2, 3 and 4 ranks.
FACTORS = {
    "all_reduce": (1, 4 / 3, 3 / 2),
    "all_gather": (1 / 2, 2 / 3, 3 / 4),
    "reduce_scatter": (1 / 2, 2 / 3, 3 / 4),
    "all_to_all": (1 / 2, 2 / 3, 3 / 4),
    "broadcast": (1, 1, 1),
    "reduce": (1, 1, 1),
    "send_recv": (1, 1, 1),
}


def test_bus_factors():
    assert list(bandwidth_operations.RUN) == ALL == list(FACTORS)
    for collective, factors in FACTORS.items():
        assert [bandwidth_operations.bus_factor(collective, n) for n in (2, 3, 4)] == pytest.approx(factors, rel=1e-15)


@pytest.mark.parametrize(("size", "dtype"), [(2, "fp32"), (3, "bf16"), pytest.param(4, "fp64", marks=slow)])
def test_every_collective_at_every_size(group, tmp_path, size, dtype):
    file, image = tmp_path / "result.json", tmp_path / "result.png"
    options = ["--sizes", "1,1000,8k", "--dtype", dtype, "--json", str(file)]
    plot = ["--plot", str(image)] if size == 2 else []
    answers = group(size)(ON_RANKS.run, [*options, *plot, *QUICK])
    assert [code for code, _, _ in answers] == [0] * size
    assert [bool(out) for _, out, _ in answers] == [True] + [False] * (size - 1)  # rank 0 speaks for all
    result = json.loads(file.read_text())
    assert (result["world_size"], result["backend"], result["missing"]) == (size, "gloo", {})
    assert result["hosts"] == [list(range(size))]
    assert all(value > 0 for value in result["memory_copy"].values())
    rows = result["rows"]
    assert [(row["collective"], row["size"]) for row in rows] == [(c, s) for c in ALL for s in (1, 1000, 8192)]
    item = {"fp32": 4, "bf16": 2, "fp64": 8}[dtype]
    for row in rows:
        seconds, sent = row["seconds"], row["bytes"]
        # Whole elements for every rank: rounded down, but one each at least.
        assert sent == max(1, row["size"] // (size * item)) * size * item
        assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
        assert row["algorithm_gbytes_per_second"] == pytest.approx(sent / seconds["median"] / 1e9, rel=1e-12)
        factor = FACTORS[row["collective"]][size - 2]
        assert row["bus_gbytes_per_second"] == pytest.approx(row["algorithm_gbytes_per_second"] * factor, rel=1e-12)
    printed = answers[0][1]
    assert all(printed.count(f" {c} ") == 3 for c in ALL)
    assert f"ranks 0-{size - 1}" in printed and "memory copy" in printed
    assert image.exists() == bool(plot) and (not plot or image.read_bytes().startswith(b"\x89PNG"))


def test_the_slowest_rank_counts(group):
    assert group(3)(ON_RANKS.slowest_of) == [[3.0, 30.0, 9.0]] * 3  # rank 2 has 3, 10, 9; rank 0 has 1, 30, 9


@slow
def test_under_torchrun_without_a_word_on_stderr(launch, tmp_path):
    file = tmp_path / "result.json"
    finished = launch("collectives/bandwidth.py", "--sizes", "4K", "--collective", "reduce, all_gather, reduce_scatter",
                      "--json", file, *QUICK)  # fmt: skip
    assert "Warning" not in finished.stderr  # such as those at names that torch has renamed
    assert [row["collective"] for row in json.loads(file.read_text())["rows"]] == [
        "reduce",
        "all_gather",
        "reduce_scatter",
    ]


@pytest.mark.parametrize("collective", ALL)
def test_a_wrong_result_is_noticed_on_all_ranks(group, collective):
    on_rank = 0 if collective == "reduce" else 2  # a reduce ends on rank 0
    answers = group(3)(ON_RANKS.tampered, collective, on_rank)
    for code, text in answers:
        (line,) = text.strip().splitlines()
        assert code == 2
        assert f"{collective} of 60 bytes gave a wrong result on rank(s) {on_rank} of 3" in line
    assert group(3)(ON_RANKS.tampered, collective, 7) == [(0, "")] * 3  # nobody tampers


@pytest.mark.parametrize("collective", ALL)
def test_a_collective_that_does_nothing_is_noticed(group, collective):
    passed = group(3)(ON_RANKS.idle, collective)
    excused = {"broadcast": [0], "reduce": [1, 2]}.get(collective, [])  # these ranks have nothing to receive
    assert [rank for rank in range(3) if passed[rank]] == excused


def test_what_the_backend_lacks_is_named_and_passed_over(group):
    answers = group(2)(ON_RANKS.unsupported)
    assert all(isinstance(answer, str) and "Sparse" in answer for answer in answers), answers


def test_groups_within_hosts(group):
    """Two hosts of two ranks each: the same collective over all four, and over each host's two."""
    answers = group(4)(ON_RANKS.hosts_of_two, [2, 2])
    for rank, rows in enumerate(answers):
        mine = [0, 1] if rank < 2 else [2, 3]
        assert rows == [("all ranks", [0, 1, 2, 3], 4, 240), ("within nodes", mine, 2, 240)]


@pytest.mark.parametrize("counts", [[1, 1, 1], [2, 1]])
def test_hosts_that_cannot_be_compared(group, counts):
    for code, text in group(3)(ON_RANKS.hosts_of_two, counts):
        assert code == 2 and len(text.strip().splitlines()) == 1
        assert ", ".join(map(str, counts)) in text and "equally many ranks, two or more" in text


def as_srun_starts_it(*arguments, tasks=2):
    """One process a rank, as srun does it; no launcher turns their exit codes into its own."""
    job = str(free_port())  # the port is derived from it: other than that of other tests
    variables = {"SLURM_JOB_ID": job, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(tasks), "DEVICE": "cpu",
                 "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": str(tasks)}  # fmt: skip
    processes = [
        subprocess.Popen([sys.executable, "collectives/bandwidth.py", *arguments], cwd=ROOT, text=True,
                         env=clean_environment(**variables, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(tasks)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


@slow
@pytest.mark.parametrize(("minimum", "code"), [("0", 0), ("1e9", 3)])
def test_gate_under_srun(minimum, code):
    check_gate(as_srun_starts_it(*gate_options(minimum)), code, "srun")


@pytest.mark.parametrize(("minimum", "code"), [("0", 0), ("1e9", 3)])
def test_gate(group, minimum, code):
    check_gate(group(2)(ON_RANKS.run, gate_options(minimum)), code, "torchrun")


def gate_options(minimum):
    return ["--collective", "all_reduce", "--sizes", "4K,64K", "--minimum_gbytes_per_second", minimum, *QUICK]


def check_gate(answers, code, launcher):
    """All ranks end with the same exit code; the first one says why."""
    assert [answer[0] for answer in answers] == [code, code]
    (_, out, err), (_, other_out, other_err) = answers
    assert f"2 ranks under {launcher}" in out and out.count("all_reduce ") == 2
    lines = [line for line in err.splitlines() if "error" in line]
    if code:
        assert len(lines) == 1
        words = [
            "all_reduce of 65,536 bytes",
            "2 ranks on 1 host(s)",
            "expected at least 1e+09",
            "interface: ",
            "NCCL_DEBUG=INFO",
        ]
        assert all(word in lines[0] for word in words), lines
    else:
        assert lines == []
    assert other_out == "" and "error" not in other_err and "Traceback" not in err + other_err


def test_gate_goes_by_the_largest_size_over_all_ranks():
    config = bandwidth.BandwidthConfig(collective="all_reduce", minimum_gbytes_per_second=5.0)
    row = {"collective": "all_reduce", "bytes": 1024}
    rows = [
        row | {"group": "all ranks", "bus_gbytes_per_second": 1.0},
        row | {"group": "all ranks", "bus_gbytes_per_second": 5.0},
        row | {"group": "within nodes", "bus_gbytes_per_second": 0.5},
    ]
    result = {"world_size": 2, "hosts": [[0], [1]], "missing": {}, "backend": "gloo", "rows": rows}
    assert bandwidth.gate(result, config, "eth0") is None
    rows[1]["bus_gbytes_per_second"] = 4.999
    verdict = bandwidth.gate(result, config, "eth0")
    assert "found 5 GB/s" in verdict and "interface: eth0" in verdict


@pytest.mark.parametrize(("arguments", "words"), [
    (["--collective", "allreduce"], ["'allreduce'", "did you mean all_reduce?", "send_recv"]),
    (["--collective", "all_reduce,gather"], ["'gather'", "did you mean all_gather?"]),
    (["--sizes", "0"], ["sizes = '0'", "above 0"]),
    (["--sizes=-4K"], ["sizes = '-4K'"]),
    (["--sizes", "4K,big"], ["sizes = '4K,big'"]),
    (["--dtype", "int4"], ["dtype = int4", "bf16"]),
    (["--repeats", "0"], ["repeats = 0", "at least 1"]),
    (["--repeat", "3"], ["repeat", "did you mean repeats?"]),
    (["--minimum_gbytes_per_second", "5"], ["one collective", "--collective all_reduce"]),
    (["--collective", "reduce", "--minimum_gbytes_per_second", "-5"], ["minimum_gbytes_per_second = -5", "0 or more"]),
    (["--json", "/nowhere/x.json"], ["json = /nowhere/x.json", "folder"]),
    (["--network_profile", "token-ring"], ["token-ring", "infiniband"]),
])  # fmt: skip
def test_mistakes_are_one_line_on_every_rank(group, arguments, words):
    for code, out, err in group(2)(ON_RANKS.run, arguments, timeout=60):
        (line,) = [line for line in err.splitlines() if "error: " in line]
        assert (code, out) == (2, "") and "Traceback" not in err
        assert all(word in line for word in words), line


def test_one_process_alone(group):
    ((code, out, err),) = group(1)(ON_RANKS.run, [])
    (line,) = [line for line in err.splitlines() if "error: " in line]
    assert (code, out) == (2, "") and "torchrun --nproc-per-node=2" in line


def test_sizes():
    def sizes(text, device="cpu"):
        return bandwidth.BandwidthConfig(sizes=text).bytes_by_device(device)

    assert sizes("1M, 4k,16") == [16, 4096, 2**20]
    assert sizes("auto") == [4096, 65536, 2**20, 2**24]
    assert sizes("auto", "cuda")[-1] == 2**30
    assert statistics.median(sizes("1KiB")) == 1024


def test_spans():
    assert bandwidth_measure.spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
