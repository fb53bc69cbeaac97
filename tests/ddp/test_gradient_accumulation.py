"""ddp/gradient_accumulation.py: its table says what it must, and the script notices when it does not."""

import re

import pytest
from launching import ROOT, SCRIPTS, OnRanks

ON_RANKS = OnRanks("tests/ddp/starts_on_ranks.py")
SCRIPT = "ddp/gradient_accumulation.py"
# Two layers of width 32: neither the counts nor the equality depend on the size.
SMALL = ["--model.width", "32", "--model.ffn_width", "48", "--model.layers", "2", "--train.steps", "2"]
BLOCK = 2 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48  # norms; query, output; key, value (4 of 8 heads); ffn
PARAMETERS = 2 * 256 * 32 + 32 + 2 * BLOCK  # embedding and head, last norm, two blocks

VARIANTS = {  # what must be found, and whether once or in every micro-batch
    "one batch per rank": ("right", "once"),
    "sync in every micro-batch": ("sends every time", "always"),
    "no_sync, forward and backward": ("right", "once"),
    "no_sync, backward only": ("sends every time", "always"),
    "mean of micro-batch means": ("wrong gradient", "once"),
    "sync the first, not the last": ("wrong gradient, ranks differ", "once"),
}


def read_table(output: str) -> dict[str, tuple[int, float, float, float, str]]:
    """Variant → (all-reduces a step, MB sent, gradient off by, loss after, found)."""
    row = re.compile(r"^(\S.*?) {2,}(\d+) +([\d.]+) +(\d\.\de[+-]\d+) +([\d.]+) +(\S.*)$", re.MULTILINE)
    return {
        name: (int(count), float(sent), float(off), float(loss), found)
        for name, count, sent, off, loss, found in row.findall(output)
    }


@pytest.mark.parametrize("ranks", [2, 3])
def test_right_ways_are_equal_and_wrong_ones_are_found(group, ranks):
    output, *others = group(ranks)(SCRIPTS.printed, SCRIPT, SMALL)
    assert others == [""] * (ranks - 1)  # rank 0 speaks for all
    table = read_table(output)
    # All gradients of so small a model fit into one bucket: to send them once is one all-reduce.
    times = {"once": 1, "always": 24 // 2 // ranks}
    expected = {name: (times[how_often], found) for name, (found, how_often) in VARIANTS.items()}
    assert {name: (row[0], row[4]) for name, row in table.items()} == expected
    right = table["one batch per rank"]
    at_first = float(re.search(r"before the first step: ([\d.]+)", output)[1])
    for name, (count, sent, off, loss, found) in table.items():
        assert sent == pytest.approx(count * PARAMETERS * 8 / 1e6, abs=0.005), name  # fp64; printed with two decimals
        assert loss < at_first, name  # it falls, whatever is wrong
        if "gradient" in found:
            assert off > 1e-4, name
            assert loss != right[3], name
        else:
            assert off < 1e-12, name  # fp64: only the order of the additions differs
            assert loss == right[3], name


def test_the_largest_difference_is_that_of_any_rank(group):
    """A gradient that is wrong on one rank only is told to all of them."""
    for wrong_on in (0, 2):
        assert group(3)(ON_RANKS.largest_gradient_difference, str(ROOT / "ddp"), wrong_on) == [1.0] * 3


def test_the_script_fails_when_it_finds_something_else(group, tmp_path):
    """Put right code where a mistake is announced, and the other way round: each of them must be reported."""
    swapped = tmp_path / "swapped.py"
    swapped.write_text(
        "import sys\n"
        "sys.path.insert(0, 'ddp')\n"
        "import gradient_accumulation as lesson\n"
        "right, wrong = lesson.no_sync_until_last, lesson.mean_of_means\n"
        "for name, (_, expected) in lesson.VARIANTS.items():\n"
        "    lesson.VARIANTS[name] = (right if expected else wrong, expected)\n"
        "lesson.main(lesson.parse(lesson.AccumulationConfig))\n"
    )
    for message, _ in group(2)(SCRIPTS.ends, str(swapped), SMALL):  # a message instead of a code: exit code 1
        assert "error: not what this lesson says" in message
        assert all(f"{name}: " in message for name in VARIANTS), message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.steps", "1"], "train.steps = 1 cannot work; allowed: at least 2"),
        (["--batch.micro_size", "12"], "nothing to accumulate; make batch.global_size larger"),
        (["--batch.global_size", "25"], "batch.global_size = 25 does not divide among 2 data-parallel ranks"),
    ],
)
def test_mistakes_end_in_one_line(group, arguments, message):
    for code, text in group(2)(SCRIPTS.ends, SCRIPT, arguments):
        assert code == 2
        assert message in text
        assert text.count("error: ") == 1, text
        assert "Traceback" not in text


def test_one_process_is_told_how_to_start_several(group):
    [(code, stderr)] = group(1)(ON_RANKS.ends_with, {}, SCRIPT, [])
    assert code == 2
    assert "\nerror: one process cannot drift apart; use torchrun" in f"\n{stderr}" and "Traceback" not in stderr
