"""The table of who divides by what is measured, and says the same with other numbers of ranks and micro-batches."""

import re

import pytest

SCRIPT = "deepspeed/who_divides.py"


@pytest.mark.parametrize(("ranks", "accumulation"), [(2, 3), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_divisors(launch, ranks, accumulation):
    printed = launch(SCRIPT, "--accumulation", accumulation, nproc=ranks).stdout
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


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", ["2", "0"])
def test_what_could_not_be_told_apart(launch, accumulation):
    result = launch(SCRIPT, "--accumulation", accumulation, check=False)
    assert result.returncode != 0
    assert "error: " in result.stderr and "accumulation" in result.stderr
