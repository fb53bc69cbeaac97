"""Converted weights are the engine's, bit by bit; and what resumes elsewhere trains as if it had never stopped."""

import os
import re
import shutil

import pytest
import torch
from launching import OnRanks
from safetensors.torch import load_file

OWN, CONVERT = "deepspeed/own_checkpoint.py", "deepspeed/convert_checkpoint.py"
ON_RANKS = OnRanks("tests/deepspeed/deepspeed_on_ranks.py")
SMALL = ["--model.width", "32", "--model.ffn_width", "48", "--model.layers", "2", "--data.sequence_length", "16"]


def weights_of(printed: str) -> str:
    return re.search(r"weights (\w{12})", printed)[1]


def losses(printed: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+): loss ([\d.]+)", printed)}


@pytest.fixture(scope="module")
def saved(group, tmp_path_factory):
    """`saved(stage, precision, ranks)`: a run folder that `save` wrote, and what it printed; made once for each."""
    made = {}

    def get(stage, precision="fp32", ranks=2, steps=3):
        key = stage, precision, ranks, steps
        if key not in made:
            folder = tmp_path_factory.mktemp("zero") / "run"
            options = ["--stage", str(stage), "--precision", precision, "--steps", str(steps), "--output", str(folder)]
            made[key] = folder, group(ranks)(ON_RANKS.printed, OWN, ["save", *SMALL, *options])[0]
        return made[key]

    return get


SLOW = pytest.mark.slow
MATRIX = [(3, "fp32"), (2, "bf16"), pytest.param(1, "fp32", marks=SLOW), pytest.param(3, "bf16", marks=SLOW)]


@pytest.mark.parametrize(("stage", "precision"), MATRIX)
def test_converted_weights_are_the_gathered_ones(group, saved, tmp_path, stage, precision):
    """`save` prints a checksum over all bits of what the engine gathers, `convert` of what the shards give."""
    folder, printed = saved(stage, precision)
    converted = group(1)(ON_RANKS.printed, CONVERT, ["convert", str(folder), "--output", str(tmp_path / "model")])[0]
    assert weights_of(converted) == weights_of(printed)
    assert "largest difference to this model 0.0e+00" in converted  # the same operations in transformers' Llama
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert len(tensors) == 3 + 2 * 9
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_a_model_that_computes_something_else_is_an_error(group, saved, tmp_path):
    """The last check of `convert`: the logits of transformers are those of this model."""
    given = ["convert", str(saved(3)[0]), "--output", str(tmp_path / "model")]
    ((code, _),) = group(1)(ON_RANKS.ends_with_another_model, CONVERT, given)
    assert isinstance(code, str) and "error: transformers computes something else" in code


@pytest.mark.parametrize(("stage", "ranks"), [(3, 1), pytest.param(2, 3, marks=SLOW), pytest.param(3, 4, marks=SLOW)])
def test_universal_goes_on_at_another_world_size(group, saved, tmp_path, stage, ranks):
    """Three steps on 2 ranks and three on others are six in one go: weights bit by bit, losses as in one run."""
    source, printed = saved(stage)
    folder = tmp_path / "run"
    shutil.copytree(source, folder)
    made = group(1)(ON_RANKS.printed, CONVERT, ["universal", str(folder)])[0]
    assert weights_of(made) == weights_of(printed)
    resumed = group(ranks)(ON_RANKS.printed, OWN, ["resume", str(folder), "--steps", "3"])[0]
    assert weights_of(resumed) == weights_of(printed)
    expected = losses(saved(stage, steps=6)[1])
    assert losses(resumed).keys() == {4, 5, 6}
    for step, loss in losses(resumed).items():
        # fp32, sums over the ranks in another order. What DeepSpeed forgets in stage 3 costs 7e-5 and more here.
        assert abs(loss - expected[step]) <= 1e-5, (step, loss, expected)


class Foreign:
    """A pickle that would run a command when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_what_may_run_code_is_not_read(group, saved, tmp_path):
    source, _ = saved(3)
    folder, witness = tmp_path / "run", tmp_path / "it_ran"
    shutil.copytree(source, folder)
    shard = next(folder.rglob("*pp_rank_1_*_optim_states.pt"))
    torch.save({"optimizer_state_dict": Foreign(witness)}, shard)
    ((code, message),) = group(1)(ON_RANKS.ends, CONVERT, ["convert", str(folder), "--output", str(tmp_path / "out")])
    assert code == 2
    assert re.search(r"pp_rank_1_.* asks for (posix|nt)\.system", message), message
    assert not witness.exists()
    torch.load(shard, weights_only=False)  # the proof that it would have
    assert witness.exists()


def lose_latest(folder):
    (folder / "checkpoints" / "latest").unlink()


def lose_first_shard(folder):
    next(folder.rglob("*pp_rank_0_*_optim_states.pt")).unlink()


def lose_last_shard(folder):
    next(folder.rglob("*pp_rank_1_*_optim_states.pt")).unlink()


def lose_all_shards(folder):
    for path in folder.rglob("*_optim_states.pt"):
        path.unlink()


def tear_shard(folder):
    path = next(folder.rglob("*pp_rank_1_*_optim_states.pt"))
    path.write_bytes(path.read_bytes()[:1000])


def link_shard(folder):
    path = next(folder.rglob("*pp_rank_1_*_optim_states.pt"))
    path.rename(folder.parent / path.name)
    path.symlink_to(folder.parent / path.name)


def lead_elsewhere(folder):
    (folder / "checkpoints" / "global_step3").rename(folder / "elsewhere")
    (folder / "checkpoints" / "latest").write_text("../elsewhere")


def lose_everything(folder):
    shutil.rmtree(folder)


@pytest.mark.parametrize(("damage", "words"), [
    (lose_everything, "config.yaml does not exist"),
    (lose_latest, "latest does not exist"),
    (lose_all_shards, "is no ZeRO checkpoint"),
    (lose_first_shard, "the optimizer shard of rank 0 is missing"),
    (lose_last_shard, "Expected 2 of|tp_degree or dp_degree mismatch"),
    (tear_shard, "is no whole file of torch.save"),
    (link_shard, "_optim_states.pt is a link"),
    (lead_elsewhere, "latest names '../elsewhere'"),
], ids=lambda value: value.__name__ if callable(value) else None)  # fmt: skip
def test_damage_is_one_line(group, saved, tmp_path, damage, words):
    source, _ = saved(3)
    folder = tmp_path / "run"
    shutil.copytree(source, folder)
    damage(folder)
    for command in (["convert", str(folder), "--output", str(tmp_path / "out")], ["universal", str(folder)]):
        ((code, message),) = group(1)(ON_RANKS.ends, CONVERT, command)
        assert code == 2, message
        lines = [line for line in message.splitlines() if "error: " in line]
        assert len(lines) == 1, message
        assert re.search(words, lines[0]), message
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*_universal*"))


def test_what_a_killed_conversion_left_is_no_checkpoint(group, saved, tmp_path):
    """Half of one lies there under another name: nothing goes on from it, and the next conversion makes it anew."""
    source, _ = saved(3)
    folder = tmp_path / "run"
    shutil.copytree(source, folder)
    left = folder / "checkpoints" / "global_step3_universal.unfinished" / "zero" / "half"
    left.mkdir(parents=True)
    for code, message in group(2)(ON_RANKS.ends, OWN, ["resume", str(folder)]):
        assert code == 2
        assert "expected a universal checkpoint" in message
    printed = group(1)(ON_RANKS.printed, CONVERT, ["universal", str(folder)])[0]
    assert weights_of(printed) == weights_of(saved(3)[1])
    assert not left.exists()
    made = sorted(path.name for path in (folder / "checkpoints").glob("*universal*"))
    assert made == ["global_step3_universal", "latest_universal"]
    assert (folder / "checkpoints" / "latest_universal").read_text() == "global_step3_universal"


def test_one_process_converts(group, saved):
    folder, _ = saved(3)
    for code, message in group(2)(ON_RANKS.ends, CONVERT, ["universal", str(folder)]):
        assert code == 2
        assert "is a script for one process" in message


def test_nothing_to_resume(group, saved):
    folder, _ = saved(3)
    for code, message in group(2)(ON_RANKS.ends, OWN, ["resume", str(folder)]):
        assert code == 2
        assert "expected a universal checkpoint; make it: python deepspeed/convert_checkpoint.py universal" in message


def test_used_folder(group, saved):
    folder, _ = saved(3)
    for code, message in group(2)(ON_RANKS.ends, OWN, ["save", *SMALL, "--output", str(folder)]):
        assert code == 2
        assert "File exists; choose a new folder" in message
