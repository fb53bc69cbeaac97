"""By hand against the libraries: the contestants do the same work, and who does not is found out."""

import json
import sys
from pathlib import Path

import pytest
from launching import SCRIPTS, OnRanks, assert_refused

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import by_hand  # noqa: E402  (needs the path above)
import by_hand_contestants  # noqa: E402

ON_RANKS = OnRanks("tests/benchmarks/by_hand_on_ranks.py")
KEPT = ROOT / "benchmarks" / "results" / "by_hand"
PARAMETERS = 1 + 8 * 9 + 1 + 1  # of "deep": embedding, nine in each block, the last norm, head


@pytest.mark.parametrize(("comparison", "case"), [
    ("ddp", "deep"), ("naive", "deep"), ("fsdp", "tiny"), ("ring", "4096"), ("hidden", "deep"),
])  # fmt: skip
@pytest.mark.parametrize("ranks", [2, 3])
def test_fair_contests(group, ranks, comparison, case) -> None:
    """On two ranks to the bit, on three within the rounding that `verdict` allows."""
    assert group(ranks)(ON_RANKS.contest, comparison, case) == [None] * ranks


@pytest.mark.parametrize(("comparison", "case", "who", "cheat", "expected"), [
    ("ddp", "deep", 1, "silent", "bucketed by hand: "),
    ("ddp", "deep", 0, "one step less", "bucketed by hand: "),
    ("ddp", "deep", 1, "one bit", "bucketed by hand: embedding.weight differs"),
    ("ddp", "deep", 0, "idle", "never moved"),
    ("naive", "deep", 0, "all silent", "the ranks ended with different parameters"),
    ("fsdp", "tiny", 1, "one step less", "by hand: "),
    ("fsdp", "tiny", 1, "one bit", "by hand: "),
    ("ring", "4096", 1, "one step less", "ring by hand: sum differs"),
    ("ring", "4096", 0, "one step less", "ring by hand: sum differs"),
    ("hidden", "deep", 3, "talks", "no communication: 1 collectives a step, expected none"),
    ("hidden", "deep", 1, "silent", "bucketed by hand: "),
])  # fmt: skip
def test_who_does_other_work_is_found_out(group, comparison, case, who, cheat, expected) -> None:
    for problem in group(2)(ON_RANKS.contest, comparison, case, who, cheat):
        assert expected in problem


def test_other_work_is_more_than_rounding(group) -> None:
    """On three ranks some difference is allowed; a step, or a message, left out is more than that."""
    for cheat in ("one step less", "silent"):
        for problem in group(3)(ON_RANKS.contest, "ddp", "deep", 1, cheat):
            assert "bucketed by hand: " in problem


@pytest.mark.parametrize(("comparison", "case", "expected"), [
    ("ddp", "deep", [1, 1]),
    ("ddp", "wide", [3, 3]),
    ("naive", "deep", [PARAMETERS, PARAMETERS, 1]),
    # five units, of which one, the root, is gathered once, the others twice; and reduced once. By hand matrices and
    # vectors travel apart.
    ("fsdp", "tiny", [14, 28]),
    ("hidden", "wide", [3, 3, 3, 0]),
])  # fmt: skip
def test_collectives_of_a_step(group, comparison, case, expected) -> None:
    assert group(2)(ON_RANKS.collectives, comparison, case) == [expected] * 2


def test_who_begins_changes(group) -> None:
    two, three = (group(2)(ON_RANKS.order_of_turns, count, 6)[0] for count in (2, 3))
    assert two == [0, 1, 1, 0, 1, 0, 0, 1, 0, 1, 1, 0]
    assert three == [0, 1, 2, 1, 2, 0, 2, 0, 1, 2, 1, 0, 0, 2, 1, 1, 0, 2]


def test_hidden_share() -> None:
    assert by_hand.hidden_share(3.0, compute=2.0, after=6.0) == 0.75
    assert by_hand.hidden_share(6.0, compute=2.0, after=6.0) == 0
    assert by_hand.hidden_share(2.0, compute=2.0, after=6.0) == 1


FULL = [
    ("ddp", "deep"), ("ddp", "wide"), ("naive", "deep"), ("naive", "wide"), ("fsdp", "tiny"),
    ("ring", "4 KiB"), ("ring", "64 KiB"), ("ring", "1,024 KiB"), ("ring", "16,384 KiB"), ("hidden", "balanced"),
]  # fmt: skip
ROWS = {"ddp": 2, "naive": 3, "fsdp": 2, "ring": 2, "hidden": 4}  # contestants


def written(folder, *compare):
    """Options for a short run of some comparisons, whose results land in a folder."""
    options = ["--turns=3", "--steps=2", "--network=a wire", f"--json={folder}/a.json", f"--plot={folder}/a.png"]
    return [*options, "--compare", *compare]


def check_result(folder, printed, compare) -> None:
    result = json.loads((folder / "a.json").read_text())
    assert result["world_size"] == 2 and result["hosts"] == 1 and result["network"] == "a wire"
    found = [(one["comparison"], one["case"].split(":")[0]) for one in result["comparisons"]]
    assert found == [row for row in FULL if row[0] in compare]
    for one in result["comparisons"]:
        assert one["same_result"] is True and one["turns"] == 3 and one["steps_per_turn"] == 2
        assert one["rows"][0]["ratio"] == {"median": 1.0, "lower_quartile": 1.0, "upper_quartile": 1.0}
        for row in one["rows"]:
            for key in ("step_seconds", "step_cpu_seconds", "ratio"):
                assert 0 < row[key]["lower_quartile"] <= row[key]["median"] <= row[key]["upper_quartile"]
            assert (row["collectives_per_step"] is None) == (one["comparison"] == "ring")
            assert "hidden" not in row or row["contestant"] in ("bucketed by hand", "torch DDP")
    if "ring" in compare:
        assert [
            one["bytes"] for one in result["comparisons"] if one["comparison"] == "ring"
        ] == by_hand_contestants.SIZES
    assert printed.strip().endswith(by_hand.table(result))  # rank 0 alone prints, and prints what it keeps
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1 and len(rows) == 2 + sum(ROWS[name] for name, _ in found)
    assert str(folder) not in json.dumps(result) and str(ROOT) not in json.dumps(result)
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_result(group, tmp_path) -> None:
    compare = ["ddp", "ring"]
    printed = group(2)(SCRIPTS.printed, "benchmarks/by_hand.py", written(tmp_path, *compare))
    check_result(tmp_path, printed[0], compare)
    assert printed[1] == ""
    both, one = tmp_path / "both.png", str(tmp_path / "a.json")
    group(1)(SCRIPTS.train, "benchmarks/by_hand.py", [one, one, "--plot", str(both)])  # results drawn together
    assert both.read_bytes().startswith(b"\x89PNG") and both.read_bytes() != (tmp_path / "a.png").read_bytes()


@pytest.mark.slow
def test_all_comparisons_under_torchrun(launch, tmp_path) -> None:
    printed = launch("benchmarks/by_hand.py", *written(tmp_path, *ROWS), timeout=200).stdout
    check_result(tmp_path, printed, list(ROWS))


@pytest.mark.parametrize(("options", "ranks", "message"), [
    (["--compare", "dpp"], 2, "invalid choice: 'dpp'"),
    (["--turns", "0"], 2, "--turns 0 and --steps None must both be at least 1"),
    (["--turns", "many"], 2, "invalid int value: 'many'"),
    (["--network"], 2, "expected one argument"),
    (["--json", "/nowhere/a.json"], 2, "No such file or directory"),
    ([], 1, "one process has nobody to send to; start several with torchrun"),
    (["README.md"], 1, "results are drawn, and there is no --plot"),
    (["README.md", "--plot", "a.png"], 1, "expected a file that --json wrote"),
    (["missing.json", "--plot", "a.png"], 1, "missing.json"),
])  # fmt: skip
def test_mistakes_end_in_one_line(group, options, ranks, message) -> None:
    assert_refused(group(ranks)(SCRIPTS.ends, "benchmarks/by_hand.py", options), message)


def test_the_readme_shows_the_kept_results() -> None:
    """Every row of the kept results stands in benchmarks/README.md, with commit and date."""
    page = (ROOT / "benchmarks" / "README.md").read_text()
    kept = sorted(KEPT.glob("*.json"))
    assert len(kept) >= 2
    for file in kept:
        result = json.loads(file.read_text())
        missing = [line for line in by_hand.table(result).splitlines() if line.startswith("|") and line not in page]
        assert not missing, f"benchmarks/README.md does not show {file.name}:\n" + "\n".join(missing)
        assert f"commit {result['git_commit']}; {result['date']}" in page
