"""ddp/communication_overlap.py: buckets, messages, bytes, order, and what lies inside backward. Never seconds."""

import json

import pytest
from launching import SCRIPTS, OnRanks

from common.transformer import ModelConfig, Transformer

SCRIPT = "ddp/communication_overlap.py"
ON_RANKS = OnRanks("tests/ddp/starts_on_ranks.py")
CAP_MB = 0.1
SMALL = ["--model.width", "64", "--model.ffn_width", "96", "--model.layers", "3", "--data.sequence_length", "32",
         "--bucket_cap_mb", str(CAP_MB), "--train.steps", "3"]  # fmt: skip
SIZES = {  # bytes of each parameter in fp32, in the order of the model
    name: parameter.numel() * 4
    for name, parameter in Transformer(ModelConfig(width=64, ffn_width=96, layers=3)).named_parameters()
}
TOTAL = sum(SIZES.values())
BY_HAND, ONE, DEFAULT, CAPPED, QUARTER, VIEWS, STATIC, FP16, BF16, POWER_SGD = range(10)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, group):
    """A run of the script: what all ranks printed, results.json, and the folder."""
    folder = tmp_path_factory.mktemp("two_ranks")
    arguments = [*SMALL, "--device", "cpu", "--output", str(folder)]
    printed, texts = zip(*group(2)(ON_RANKS.printed_and_first_text, SCRIPT, arguments), strict=True)
    assert texts[0] != texts[1]  # with equal gradients no average would show
    return "".join(printed), json.loads((folder / "results.json").read_text()), folder


@pytest.fixture(scope="module", params=[2, 3])
def results(request, tmp_path_factory, group):
    if request.param == 2:
        return request.getfixturevalue("two_ranks")[1]
    folder = tmp_path_factory.mktemp("three_ranks")
    group(3)(SCRIPTS.train, SCRIPT, [*SMALL, "--device", "cpu", "--output", str(folder)])
    return json.loads((folder / "results.json").read_text())


def divide(names: list[str], cap_bytes: int) -> list[list[str]]:
    """DDP's rule: fill a bucket until it has reached the cap, then open the next one."""
    buckets: list[list[str]] = [[]]
    for name in names:
        if sum(SIZES[member] for member in buckets[-1]) >= cap_bytes:
            buckets.append([])
        buckets[-1].append(name)
    return buckets


def test_bucket_size_decides_the_number_of_all_reduces(results):
    caps = dict.fromkeys((BY_HAND, CAPPED, VIEWS, STATIC, FP16, BF16), CAP_MB) | {QUARTER: CAP_MB / 4, DEFAULT: 1}
    for index, row in enumerate(results):
        order = [name for bucket in row["buckets"] for name in bucket["parameters"]]
        assert sorted(order) == sorted(SIZES)  # every gradient is sent, none twice
        assert order[0].startswith("head") and order[-1].startswith("embedding")  # as backward makes them
        cap_bytes = int(caps[index] * 2**20) if index in caps else TOTAL
        assert [bucket["parameters"] for bucket in row["buckets"]] == divide(order, cap_bytes)
        assert [bucket["bytes"] for bucket in row["buckets"]] == [
            sum(SIZES[name] for name in bucket["parameters"]) for bucket in row["buckets"]
        ]
    counts = [len(row["buckets"]) for row in results]
    assert counts[ONE] == counts[DEFAULT] == counts[POWER_SGD] == 1  # the model is smaller than 1 MiB
    assert 1 < counts[CAPPED] < counts[QUARTER]


def test_bytes_on_the_wire(results):
    for index, row in enumerate(results):
        sizes = [bucket["bytes"] for bucket in row["buckets"]]
        if index in (FP16, BF16):
            sizes = [size // 2 for size in sizes]
        if index != POWER_SGD:
            assert row["message_bytes"] == sizes, row["setting"]
    assert sum(results[CAPPED]["message_bytes"]) == TOTAL
    # Norms go as they are; of each matrix (rows, columns) go two factors of rank 2, all left ones, then all right ones.
    shapes = [p.shape for p in Transformer(ModelConfig(width=64, ffn_width=96, layers=3)).parameters()]
    norms = sum(4 * shape[0] for shape in shapes if len(shape) == 1)
    left, right = (sum(4 * 2 * shape[i] for shape in shapes if len(shape) == 2) for i in (0, 1))
    assert results[POWER_SGD]["message_bytes"] == [norms, left, right]


def test_views_save_the_second_copy_of_the_gradients(results):
    for index, row in enumerate(results):
        assert row["gradient_memory_bytes"] == (TOTAL if index in (BY_HAND, VIEWS) else 2 * TOTAL), row["setting"]


def test_gradients_are_equal_unless_compressed(results):
    for index, row in enumerate(results):
        error = row["relative_gradient_error"]
        if index in (FP16, BF16):
            # Each value is rounded a few times, to 11 or 8 significant bits; fp16 also loses what is very small.
            assert 0 < error < {FP16: 2**-8, BF16: 2**-6}[index], row["setting"]
        elif index == POWER_SGD:
            assert error > 0.1  # rank 2 of 64
        else:
            assert error < 1e-6, row["setting"]  # fp32: three ranks may add up in another order


def test_what_lies_inside_backward(results):
    for index, row in enumerate(results):
        step = row["median_step"]
        starts = [start for start, _ in step["all_reduces"]]
        assert starts == sorted(starts)
        assert len(starts) == len(row["buckets"])
        assert all(start <= end <= step["end"] for start, end in step["all_reduces"])
        if index == BY_HAND:
            assert starts[0] >= step["compute_end"]
        else:  # a bucket starts when it is full: the first while backward goes on, the last when it is over
            assert starts[-1] == step["compute_end"]
            assert len(starts) == 1 or starts[0] < step["compute_end"]
        overlaps = len(row["buckets"]) > 1 and index != BY_HAND
        assert (row["share_inside_backward"] > 0) == overlaps, row["setting"]


def test_the_trace_says_the_same(two_ranks):
    """An independent witness: the profiler sees each all-reduce in Gloo's own threads."""
    _, results, folder = two_ranks
    for name, index in (("by_hand", BY_HAND), ("overlapped", CAPPED)):
        events = json.loads((folder / f"trace_{name}.json").read_text())["traceEvents"]
        reduces = [event for event in events if event["name"] == "gloo:all_reduce"]
        sizes = sorted(4 * event["args"]["Input Dims"][0][0] for event in reduces)
        assert sizes == sorted(results[index]["message_bytes"])
        first = min(event["ts"] for event in reduces)
        computed = [event["ts"] for event in events if event["name"].startswith("autograd::engine::evaluate_function")]
        assert (first < max(computed)) == (name == "overlapped")


def test_output(two_ranks):
    output, results, folder = two_ranks
    assert (folder / "timeline.png").read_bytes().startswith(b"\x89PNG")
    for row in results:
        line = next(line for line in output.splitlines() if line.startswith(row["setting"]))
        words = line.removeprefix(row["setting"]).split()
        assert words[:2] == [str(len(row["buckets"])), str(len(row["message_bytes"]))]
        assert words[2] == f"{sum(row['message_bytes']) / 1e6:.2f}"
    assert "gain little: there is no network to wait for" in output
    assert output.count("in turns") == 1  # rank 0 speaks for all


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bucket_cap_mb", "0"], "bucket_cap_mb = 0.0 must be above 0"),
        (["--batch.global_size", "25"], "batch.global_size = 25 does not divide among 2 data-parallel ranks"),
        (["--output", "/dev/null/folder"], "output folder /dev/null/folder: Not a directory; choose one"),
    ],
)
def test_mistakes_end_in_one_line(group, arguments, message):
    for code, text in group(2)(SCRIPTS.ends, SCRIPT, arguments):
        assert code == 2
        assert message in text
        assert text.count("error: ") == 1, text
        assert "Traceback" not in text
