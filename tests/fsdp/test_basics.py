"""fsdp/basics.py: its formula holds at 2, 3 and 4 ranks, and the script notices when it does not."""

import re

import pytest
from launching import SCRIPTS, assert_refused

SCRIPT = "fsdp/basics.py"
# Two layers of width 32: 3 and 4 ranks divide neither 50 nor, for 3, 32. Bytes do not depend on the sequence.
SMALL = ["--model.width", "32", "--model.ffn_width", "50", "--model.layers", "3", "--data.sequence_length", "8"]
EMBEDDING, NORM = 4 * 256 * 32, 4 * 32
BLOCK = 4 * (2 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 50)


def read_table(output: str) -> dict[str, list[int]]:
    """Moment -> the numbers of its row."""
    rows = re.findall(r"^(\w.{19})((?: +[\d,]+){6,})$", output, re.MULTILINE)
    return {moment.strip(): [int(value.replace(",", "")) for value in values.split()] for moment, values in rows}


@pytest.mark.parametrize(("ranks", "options"), [
    (2, ["--model.tied", "true"]),
    (3, []),
    (3, ["--model.layers", "1"]),
    *(pytest.param(*rest, marks=pytest.mark.slow) for rest in (
        (2, []), (2, ["--model.layers", "1"]), (3, ["--model.tied", "true"]),
        (4, []), (4, ["--model.tied", "true"]), (4, ["--model.layers", "1"]))),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)  # fmt: skip
def test_every_byte_is_as_predicted(group, ranks, options):
    """The script compares every number itself; padding at 3 and 4 ranks, a tied head, one block that is both ends."""
    for code, text in group(ranks)(SCRIPTS.ends, SCRIPT, [*SMALL, *options]):
        assert code == 0, code
        assert "error: " not in text


def test_the_table_in_numbers_of_its_own(group):
    """Bytes worked out here, from the shapes alone, not by the script's formula; two ranks divide everything."""
    output = group(2)(SCRIPTS.printed, SCRIPT, SMALL)[0]
    table = read_table(output)
    root, everything = 2 * EMBEDDING + NORM, 2 * EMBEDDING + NORM + 3 * BLOCK
    # columns: shards, whole (FULL_SHARD, SHARD_GRAD_OP), gradient shards, whole gradients, AdamW, in transit
    half = everything // 2
    assert table["after sharding"][:6] == [half, 0, 0, 0, 0, 0]
    assert table["before the forward"][:6] == [half, 0, 0, 0, 0, everything]
    assert table["forward, in block 0"][:6] == [half, root + BLOCK, root + BLOCK, 0, 0, everything]
    assert table["forward, in block 2"][:6] == [half, root + BLOCK, root + 3 * BLOCK, 0, 0, everything]
    assert table["after the forward"][:6] == [half, root, everything, 0, 0, everything]
    late = EMBEDDING + NORM + BLOCK  # gradients of head, last norm and the block; the embedding has none yet
    assert table["backward, in block 2"][:6] == [half, root + BLOCK, everything, 0, late, everything]
    assert table["backward, in block 0"][:6] == [half, root + BLOCK, root + BLOCK, BLOCK, late, everything]
    assert table["after the step"][:6] == [half, 0, 0, half, 0, everything]
    assert table["after zero_grad"][:6] == [half, 0, 0, 0, 0, everything]
    assert "FULL_SHARD: 7 all-gathers (1 + 2 × 3 blocks), 4 reduce-scatters" in output
    assert "SHARD_GRAD_OP: 4 all-gathers (1 + 1 × 3 blocks), 4 reduce-scatters" in output
    assert "Every byte and every collective is as the formula says, on all ranks." in output


def test_hybrid(group):
    """Two copies on four ranks: each rank holds what it would on two, and all-reduces a shard of each unit."""
    output = group(4)(SCRIPTS.printed, SCRIPT, [*SMALL, "--fsdp.replicate", "2"])[0]
    assert read_table(output)["after sharding"][0] == (2 * EMBEDDING + NORM + 3 * BLOCK) // 2
    assert "FULL_SHARD: 7 all-gathers (1 + 2 × 3 blocks), 4 reduce-scatters (1 + 3), 4 all-reduces" in output


def test_one_strategy_alone(group):
    output = group(2)(SCRIPTS.printed, SCRIPT, [*SMALL, "--fsdp.reshard_after_forward", "false"])[0]
    assert "SHARD_GRAD_OP: 4 all-gathers" in output
    assert "FULL_SHARD: 7" not in output


@pytest.mark.parametrize(("mistake", "words"), [
    # Blocks that are no units: the root gathers all, and sends all at the end.
    ("lesson.fully_shard = lambda m, **o: torch_fully_shard(m, **o) if hasattr(m, 'blocks') else m",
     "of whole parameters"),
    # The strategy announced is not the one applied.
    ("lesson.STRATEGIES = {'FULL_SHARD': False, 'SHARD_GRAD_OP': True}\n"
     "predict = lesson.predict\n"
     "lesson.predict = lambda model, reshard, *rest: predict(model, not reshard, *rest)", "all-gathers"),
    # Gradients that are never sent.
    ("step = lesson.fill_shards\n"
     "lesson.fill_shards = lambda model, s: (step(model, s), model.set_requires_gradient_sync(False))",
     "of gradient shards"),
    # What one rank alone finds ends all.
    ("lesson.predict = lambda model, reshard, copies, ranks, predict=lesson.predict: predict(\n"
     "    model, reshard, 1 + ranks.rank, ranks)", "[rank 1] FULL_SHARD, after sharding"),
], ids=["one unit", "other strategy", "no sync", "rank 1"])  # fmt: skip
def test_the_script_fails_when_it_finds_something_else(group, tmp_path, mistake, words):
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import sys\n"
        "sys.path.insert(0, 'fsdp')\n"
        "sys.modules.pop('basics', None)\n"  # with the mistake of the test before
        "import basics as lesson\n"
        "from torch.distributed.fsdp import fully_shard as torch_fully_shard\n"
        f"{mistake}\n"
        "lesson.main(lesson.parse(lesson.BasicsConfig))\n"
    )
    for message, _ in group(2)(SCRIPTS.ends, str(broken), SMALL):  # a message instead of a code: exit code 1
        assert "error: not what the formula says" in message
        assert words in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.sequence_length", "129"], "data.sequence_length = 129 cannot work"),
        (["--fsdp.reshard_after_forward", "maybe"], "fsdp.reshard_after_forward"),
        (["--model.preset", "tyni"], "did you mean tiny"),
        (["--fsdp.replicate", "3"], "fsdp.replicate = 3 with 2 ranks"),
    ],
)
def test_mistakes_end_in_one_line(group, arguments, words):
    for code, text in group(2)(SCRIPTS.ends, SCRIPT, arguments):
        assert code == 2
        assert words in text
        assert text.count("error: ") == 1, text


def test_one_process_is_told_how_to_start_several(group):
    assert_refused(group(1)(SCRIPTS.ends, SCRIPT, []), "error: one process has nobody to share with; use torchrun")
