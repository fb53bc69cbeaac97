"""The table of who divides by what is measured, and says the same with other numbers of ranks and micro-batches."""

import re

import pytest
from launching import OnRanks, assert_refused

SCRIPT = "deepspeed/who_divides.py"
ON_RANKS = OnRanks("tests/deepspeed/deepspeed_on_ranks.py")


@pytest.mark.parametrize(("ranks", "accumulation"), [(2, 3), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_divisors(group, ranks, accumulation):
    group.stop()  # each framework keeps a state in the process
    printed = group(ranks)(ON_RANKS.printed, SCRIPT, ["--accumulation", str(accumulation)])[0]
    group.stop()
    rows = re.findall(r"^(\S.*?) +([\d.]+)   ([^\d\n]+)$", printed, re.MULTILINE)
    found = {name: (float(gradient), words) for name, gradient, words in rows}
    over_ranks, over_all = (accumulation, "ranks"), (1, "ranks × micro-batches")
    items = "all items of the global batch"
    assert found == {
        "DDP": over_ranks,
        "Lightning, Fabric": over_ranks,
        "Lightning, Trainer": over_all,
        "DeepSpeed, engine.backward(loss)": over_all,
        "DeepSpeed, engine.backward(loss, scale_wrt_gas=False)": over_ranks,
        "transformers, Trainer, a model that is told no count": over_all,
        "transformers, Trainer, a model that divides by the count": (pytest.approx(1 / 3, abs=1e-5), items),
    }


@pytest.mark.parametrize("accumulation", ["1", "2"])
def test_what_could_not_be_told_apart(group, accumulation):
    words = f"2 ranks and accumulation {accumulation}; expected two different numbers above 1"
    assert_refused(group(2)(ON_RANKS.ends, SCRIPT, ["--accumulation", accumulation]), words)


def test_no_accumulation(group):
    assert_refused(group(2)(ON_RANKS.ends, SCRIPT, ["--accumulation", "0"]), "accumulation = 0 cannot work")


@pytest.mark.slow
def test_torchrun(launch):
    assert "ranks × micro-batches" in launch(SCRIPT, "--accumulation", "3", nproc=2).stdout
