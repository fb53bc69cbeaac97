"""DeepSpeed's engine must answer what the model alone answers, on any number of ranks."""

import re

import pytest
import torch
from launching import OnRanks, assert_refused

SCRIPT = "deepspeed/inference.py"
ON_RANKS = OnRanks("tests/deepspeed/deepspeed_on_ranks.py")
SMALL = ["--model.width", "64", "--model.ffn_width", "96", "--model.layers", "2", "--tokens", "8", "--repeats", "1"]


def difference(printed: str) -> float:
    return float(re.search(r"largest difference ([\d.e+-]+)", printed)[1])


def bytes_by_rank(printed: str) -> tuple[int, list[int]]:
    whole, parts = re.search(r"([\d,]+) alone; by rank: ([\d, ]+)", printed).groups()
    return int(whole.replace(",", "")), [int(part.replace(",", "")) for part in parts.split()]


@pytest.fixture
def answer(group):
    """`answer(2, "--tokens", "8")`: what rank 0 printed. New ranks each time: after other engines of the same process,
    DeepSpeed's engine was seen to answer wrongly."""

    def get(ranks, *options):
        group.stop()
        return group(ranks)(ON_RANKS.printed, SCRIPT, list(options))[0]

    yield get
    group.stop()


# 3 divides neither the 8 heads nor the 4 key-value heads: the ranks get unequal parts.
@pytest.mark.parametrize("ranks", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_the_same_answer(answer, ranks):
    printed = answer(ranks, *SMALL)  # the script fails if the answers differ
    assert "8 tokens, the same: " in printed
    assert difference(printed) <= 1e-5  # fp32: the same sums in another order
    whole, parts = bytes_by_rank(printed)
    assert len(parts) == ranks
    if ranks == 1:
        assert difference(printed) == 0.0
        assert parts == [whole]
    else:
        # What is not split is on every rank: embedding and norms, (256 + 5) x 64 numbers of 4 bytes here.
        assert sum(parts) == whole + (ranks - 1) * 4 * (256 + 5) * 64
        assert "LinearAllreduce" in printed


def test_an_answer_that_differs_on_one_rank_ends_all_with_an_error(group):
    """The last checks of the script: logits far apart; logits within the tolerance are tested above."""
    group.stop()
    for code, message in group(2)(ON_RANKS.ends_with_another_head, SCRIPT, SMALL, 1, 1.0):
        assert isinstance(code, str) and "error: the engine's logits differ by" in code, (code, message)
    group.stop()


@pytest.mark.slow
def test_torchrun(launch):
    assert "8 tokens, the same: " in launch(SCRIPT, *SMALL, nproc=2).stdout


def test_bf16_runs(answer):
    printed = answer(2, *SMALL, "--precision", "bf16")
    assert 1e-4 < difference(printed) <= 0.2  # some roundings to 8 bits of logits of about 3


def test_weights_of_transformers(answer, tmp_path):
    """A model that transformers wrote; the text is the one that transformers generates from it in this process."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape)).save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    prompt = torch.tensor([list(b"abc")])
    mask = torch.ones_like(prompt)
    made = model.generate(prompt, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    printed = answer(2, "--weights", str(tmp_path / "model"), "--prompt", "abc", "--tokens", "8", "--repeats", "1")
    assert f"8 tokens, the same: {bytes(made[0, 3:].tolist())!r}" in printed


@pytest.mark.parametrize(("options", "words"), [
    (["--kernels", "true"], "kernels = true on the CPU"),
    (["--model.heads", "1", "--model.kv_heads", "1"], "2 ranks, but the model has 1 key-value heads"),
    (["--tokens", "1000"], "the model takes 128"),
    (["--tokens", "0"], "tokens = 0 cannot work"),
    (["--weights", "no/such/folder"], "no/such/folder/config.json does not exist"),
    (["--prompt", ""], 'prompt = "" has the wrong type or value (it is empty)'),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)  # fmt: skip
def test_bad_input(group, options, words):
    assert_refused(group(2)(ON_RANKS.ends, SCRIPT, [*SMALL, *options]), words)
