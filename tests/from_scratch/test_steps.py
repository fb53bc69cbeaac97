"""The course's scripts: each prints the numbers of one process, and sends and holds what the README says.

They run here under step_meter.py, with fewer steps in `make test`; the README's commands run them under torchrun as
they stand.
"""

import re

import pytest
from equality import STEPS as STEPS_COMPARED
from launching import ROOT, SCRIPTS, OnRanks, assert_refused

ON_RANKS = OnRanks("tests/from_scratch/step_on_ranks.py")
STEPS = sorted(path.name for path in (ROOT / "from_scratch").glob("step_[0-9]*.py"))
# Data parallelism and ZeRO-1 at 4 ranks are left to buckets, ZeRO-2 and FSDP; test_data_parallel.py has the rest.
AT_4_RANKS = [script for script in STEPS[1:] if script not in (*STEPS[1:4], STEPS[5])]
RUNS = [(script, 3) for script in STEPS[1:]]
RUNS += [pytest.param(script, 2, marks=pytest.mark.slow) for script in STEPS[1:]]
ALL_STEPS = 12  # of the scripts
FEW = ALL_STEPS if STEPS_COMPARED > ALL_STEPS else 3  # the meter takes the second one
RUNS += [pytest.param(script, 4, marks=pytest.mark.slow) for script in AT_4_RANKS]  # half of the time of all
LINE = re.compile(r"step +(\d+)  loss (\S+)  grad norm (\S+)")
METER = re.compile(
    r"rank (\d)  sent (\S+) P \((.*)\)  held, in P: parameters (\S+), gradients (\S+), optimizer state (\S+)"
)

# The model and the batch of the scripts.
PARAMETERS = 1 + 4 * 9 + 1 + 1  # tensors: embedding, nine in each of four blocks, the last norm, head
WHOLE = 2 * 264 * 48 + 48 + 4 * (2 * 48 + 4 * 48 * 48 + 3 * 48 * 96)  # numbers in them
NORMS = 9 * 48
MICRO_BATCHES = 12  # of a step, over all ranks
ACTIVATION = 2 * 24 * 48 / WHOLE  # of one micro-batch between two layers: samples x positions x width, in units of P
NUMBER_A_TOKEN = 2 * 24 / WHOLE


@pytest.fixture(scope="module")
def outputs(group):
    """What each rank printed: `outputs(script, ranks)`, run once, in a process group that ends with the script."""
    known = {}

    def get(script: str, ranks: int) -> tuple[str, ...]:
        if (script, ranks) not in known:
            steps = FEW if ranks > 1 else ALL_STEPS
            known[script, ranks], outlived = zip(*group(ranks)(ON_RANKS.metered, script, steps), strict=True)
            # What still holds it (a hook, a circle that Python cannot see) ends it too late, now and then by an abort.
            assert not any(outlived), f"{script}: the process group is still there when the script has ended"
        return known[script, ranks]

    return get


def numbers(text: str) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    rows = LINE.findall(text)
    assert [int(step) for step, _, _ in rows] in (list(range(FEW)), list(range(ALL_STEPS))), text
    return [(float(loss), float(norm)) for _, loss, norm in rows]


def test_one_process_learns(outputs):
    rows = numbers(outputs(STEPS[0], 1)[0])
    assert rows[0][0] == pytest.approx(5.55, abs=0.1)  # ln 264 is 5.58: a model that knows nothing
    assert rows[-1][0] < 4.2
    assert all(norm > 1 for _, norm in rows)  # so every step is clipped


@pytest.mark.parametrize(("script", "ranks"), RUNS)
def test_every_step_prints_the_numbers_of_one_process(outputs, script, ranks):
    """fp64 sums in another order differ by some 1e-16 of their size; losses and norms are of order 1."""
    first, *others = outputs(script, ranks)
    assert not any(LINE.search(text) for text in others)  # rank 0 prints
    expected = numbers(outputs(STEPS[0], 1)[0])[:FEW]
    for (loss, norm), (expected_loss, expected_norm) in zip(numbers(first), expected, strict=True):
        assert abs(loss - expected_loss) <= 1e-12
        assert norm == pytest.approx(expected_norm, rel=1e-12)


def sent(script: str, n: int, rank: int) -> float:
    """The README's table: bytes that a rank sends in a step, in units of P, for n ranks. Losses and norms left out."""
    part, own = (n - 1) / n, MICRO_BATCHES / n  # micro-batches of each data-parallel rank
    pairs = 2 * 4 + 1  # of a column- and a row-parallel matrix: two in each of four blocks, embedding and head
    layers = MICRO_BATCHES * 2 * part * (2 * pairs * ACTIVATION + 3 * NUMBER_A_TOKEN)
    return {
        "naive": 2 * part * own,
        "accumulation": 2 * part,
        "overlap": 2 * part,
        "buckets": 2 * part,
        "zero_1": 3 * part,
        "zero_2": part * own + part,
        "fsdp": 3 * part * own,
        "tensor": layers,
        "sequence": layers + MICRO_BATCHES * 2 * part * NORMS / WHOLE,
        "pipeline": MICRO_BATCHES * ACTIVATION * ((rank < n - 1) + (rank > 0)),
        "context": 2 * part + MICRO_BATCHES * 4 * (3 * n - 2) * 2 * ACTIVATION / n,
    }[name_of(script)]


def messages(script: str, n: int, rank: int) -> dict[str, int]:
    """How many of each kind, losses and norms included."""
    own, pairs = MICRO_BATCHES // n, 2 * 4 + 1
    return {
        "naive": {"all-reduce": own * PARAMETERS + 1},
        "accumulation": {"all-reduce": PARAMETERS + 1},
        "overlap": {"all-reduce": PARAMETERS + 1},
        "buckets": {"all-reduce": 5 + 1},
        "zero_1": {"all-reduce": 5 + 2, "all-gather": 1},
        "zero_2": {"all-reduce": 2, "reduce-scatter": own * PARAMETERS, "all-gather": 1},
        "fsdp": {"all-reduce": 2, "reduce-scatter": own * 5 * 2, "all-gather": own * 2 * 5 * 2},
        "tensor": {"all-reduce": MICRO_BATCHES * (2 * pairs + 3) + 1},
        "sequence": {
            "all-reduce": MICRO_BATCHES * (9 + 3) + 1,
            "reduce-scatter": MICRO_BATCHES * 2 * pairs,
            "all-gather": MICRO_BATCHES * 2 * pairs,
        },
        "pipeline": {"all-reduce": 2, "send": MICRO_BATCHES * ((rank < n - 1) + (rank > 0))},
        "context": {"all-reduce": PARAMETERS + 1, "send": MICRO_BATCHES * 4 * (3 * n - 2)},
    }[name_of(script)]


def name_of(script: str) -> str:
    return re.fullmatch(r"step_\d\d_(\w+)\.py", script)[1]


@pytest.mark.parametrize(("script", "ranks"), RUNS)
def test_bytes_and_messages_are_those_of_the_table(outputs, script, ranks):
    for text in outputs(script, ranks):
        rank, total, parts, *_ = METER.search(text).groups()
        # Printed to 3 decimals; a loss and a norm are 1e-5 of P; padding to multiples of n some 1e-4.
        assert float(total) == pytest.approx(sent(script, ranks, int(rank)), abs=2e-3)
        found = {kind: int(count) for kind, count in re.findall(r"([a-z-]+) \S+ in (\d+)", parts)}
        assert found == messages(script, ranks, int(rank))


@pytest.mark.parametrize(("script", "ranks"), RUNS)
def test_memory_is_that_of_the_table(outputs, script, ranks):
    """(parameters, gradients, optimizer state) in units of P, printed to 3 decimals, with padding."""
    held = [tuple(map(float, METER.search(text).groups()[3:])) for text in outputs(script, ranks)]
    n, name = ranks, name_of(script)
    if name == "pipeline":  # stages are not equal: one has the embedding, one the head
        assert [sum(kind) for kind in zip(*held, strict=True)] == pytest.approx([1, 1, 2], abs=5e-3)
        assert all(state == pytest.approx(2 * own, abs=2e-3) and own < 1 for own, _, state in held)
        return
    slices = 1 / n + (1 - 1 / n) * NORMS / WHOLE  # all ranks hold the norms
    expected = {
        "zero_1": (1 + 1 / n, 1 + 1 / n, 2 / n),
        "zero_2": (1 + 1 / n, 1 / n, 2 / n),
        "fsdp": (1 / n, 1 / n, 2 / n),
        "tensor": (slices, slices, 2 * slices),
        "sequence": (slices, slices, 2 * slices),
    }.get(name, (1, 1, 2))
    for seen in held:
        assert seen == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(("script", "words"), [
    ("step_08_tensor.py", "model.kv_heads is 12, which does not divide among 5 tensor ranks"),
    ("step_09_sequence.py", "model.kv_heads is 12, which does not divide among 5 tensor ranks"),
    ("step_10_pipeline.py", "model.layers is 4 for 5 stages; expected a layer for each"),
    ("step_11_context.py", "a sequence of 24 tokens does not divide into 10 pieces"),
])  # fmt: skip
def test_ranks_that_do_not_fit_end_in_one_line(group, script, words):
    """On every rank, without a traceback."""
    assert_refused(group(5)(SCRIPTS.ends, f"from_scratch/{script}", []), words)
