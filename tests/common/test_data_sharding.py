"""Which samples belong to which rank, step and micro-batch: exact at any world size, and nothing to save."""

import gc
import itertools
import multiprocessing
import re

import pytest
import torch

from common.data_sharding import BatchConfig, BatchPlan, Loader, derive_seed, evaluation_batches

SAMPLES, GLOBAL, SEED = 250, 96, 7  # 250 = 2 × 96 + 58: the third batch crosses the end of an epoch
CPU = torch.device("cpu")


def plan(rank=0, world_size=1, accumulation=1, samples=SAMPLES, seed=SEED):
    micro = GLOBAL // world_size // accumulation
    return BatchPlan(BatchConfig(GLOBAL, micro), samples, seed, rank, world_size)


class Numbers:
    """Sample i is (i, a random number): the random number stands for a random crop."""

    augments = True

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return torch.tensor(index), torch.rand((), dtype=torch.float64)


def batches(plan, steps, workers=0):
    """The samples of each step as this rank gets them: one list of (index, random number) a step."""
    loader = Loader(Numbers(), plan, CPU, workers)
    found = []
    for step in steps:
        parts = [zip(i.tolist(), r.tolist(), strict=True) for (i, r), _ in loader.micro_batches(step)]
        found.append(list(itertools.chain(*parts)))
    return found


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8])
def test_the_ranks_of_a_step_make_up_the_global_batch(world_size, accumulation):
    for step in (0, 1, 2, 1000):
        plans = [plan(rank, world_size, accumulation) for rank in range(world_size)]
        assert {p.accumulation for p in plans} == {accumulation}
        parts = [p.positions(step) for p in plans]
        assert all(len(part) == accumulation and len(r) == p.micro_size for p, part in zip(plans, parts, strict=True)
                   for r in part)  # fmt: skip
        # Rank after rank, micro-batch after micro-batch: the positions of the global batch, in order, none twice.
        together = [position for part in parts for micro_batch in part for position in micro_batch]
        assert together == list(range(step * GLOBAL, (step + 1) * GLOBAL))


def test_every_sample_comes_once_an_epoch_also_where_a_batch_crosses_its_end():
    drawn = [index for step in batches(plan(), range(8)) for index, _ in step]  # 768 = 3 epochs and 18
    epochs = [drawn[start : start + SAMPLES] for start in (0, SAMPLES, 2 * SAMPLES)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(SAMPLES))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != list(range(SAMPLES))
    third = batches(plan(), [2])[0]
    assert [index for index, _ in third] == epochs[0][192:] + epochs[1][:38]


def test_the_order_depends_on_the_seed_alone():
    assert batches(plan(), [0, 3]) == batches(plan(), [0, 3])
    assert batches(plan(), [0]) != batches(plan(seed=SEED + 1), [0])
    torch.manual_seed(99)
    assert batches(plan(), [0, 3]) == batches(plan(), [0, 3])


def test_derived_seeds_stay_what_they_are():
    """Fixed numbers: were they to change, every run made so far would go on with other data."""
    assert derive_seed(1234, "epoch", 0) == 5949542624596576468
    assert derive_seed("a:b") != derive_seed("a", "b", "")
    seeds = {derive_seed(seed, what, n) for seed in range(4) for what in ("epoch", "augment") for n in range(50)}
    assert len(seeds) == 400 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_restarted_at_a_step_continues_the_stream(workers):
    whole = batches(plan(1, 4, 2), range(6))
    assert batches(plan(1, 4, 2), range(3, 6), workers) == whole[3:]


def test_a_loader_goes_to_any_step():
    steps = [4, 0, 1, 1, 5]
    whole = batches(plan(0, 8), range(6))
    assert batches(plan(0, 8), steps) == [whole[step] for step in steps]


def test_a_step_that_was_broken_off_starts_again():
    """As when Ctrl-C ends a notebook cell between two micro-batches and the cell is run again."""
    loader = Loader(Numbers(), plan(0, 8, 4), CPU)
    list(loader.micro_batches(0))
    first, _ = next(loader.micro_batches(1))
    again, _ = next(loader.micro_batches(1))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_augmentation_depends_on_the_position_alone():
    """Not on world size, accumulation or loader processes; and a sample looks different in each epoch."""
    steps = range(6)
    reference = batches(plan(), steps)
    for world_size, accumulation, workers in ((2, 1, 0), (2, 4, 2), (3, 2, 0), (8, 1, 0)):
        ranks = [batches(plan(r, world_size, accumulation), steps, workers) for r in range(world_size)]
        together = [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]
        assert together == reference, (world_size, accumulation, workers)
    crops = [crop for step in reference for _, crop in step]
    assert len(set(crops)) == len(crops)
    assert batches(plan(seed=SEED + 1), [0])[0][0][1] != reference[0][0][1]


def test_loading_leaves_the_global_generator_alone():
    """Else the dropout of a step would depend on whether the loader was opened in it, that is, on a resume."""
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    batches(plan(0, 8), [0])
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(1)
    list(evaluation_batches([torch.tensor(0)], 1, CPU))
    assert torch.equal(torch.rand(3), expected)


def test_the_processes_of_a_loader_end_with_it():
    """Not when the garbage collector comes round to it: they hold on to files and pipes of this process."""
    before = set(multiprocessing.active_children())  # ranks of other tests
    loader = Loader(Numbers(), plan(0, 8), CPU, workers=2)
    list(loader.micro_batches(0))
    assert len(set(multiprocessing.active_children()) - before) == 2
    gc.disable()
    try:
        del loader
        assert not set(multiprocessing.active_children()) - before
    finally:
        gc.enable()


def test_micro_batches_say_which_is_the_last():
    loader = Loader(Numbers(), plan(0, 2, 4), CPU)
    for step in (0, 1):
        flags = [(len(index), is_last) for (index, _), is_last in loader.micro_batches(step)]
        assert flags == [(12, False)] * 3 + [(12, True)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("samples", [1, 2, 10, 24])
def test_evaluation_sees_every_sample_once(samples, workers):
    """On exactly one rank, also when the samples do not divide, or are fewer than the ranks: no padding."""
    dataset = [(torch.tensor(i), torch.tensor(-i)) for i in range(samples)]
    for world_size in (1, 2, 3, 4, 8) if not workers else (3,):
        parts = []
        for rank in range(world_size):
            mine = list(evaluation_batches(dataset, 4, CPU, rank, world_size, workers))
            assert all(1 <= len(a) <= 4 and torch.equal(a, -b) for a, b in mine)
            parts.append([int(i) for a, _ in mine for i in a])
        assert sorted(itertools.chain(*parts)) == list(range(samples)), world_size
        assert max(map(len, parts)) - min(map(len, parts)) <= 1  # nobody waits long for another


@pytest.mark.parametrize("samples", [1, 2, 9, 13, 24])
def test_evaluation_with_equally_many_batches_counts_each_sample_once(samples):
    """What is added so that all ranks have as many batches has only targets that do not count."""
    dataset = [(torch.full((3,), i), torch.full((3,), i)) for i in range(samples)]
    for world_size in (1, 2, 3, 4):
        ranks = [
            list(evaluation_batches(dataset, 4, CPU, r, world_size, equal_batches=True)) for r in range(world_size)
        ]
        assert len({len(batches) for batches in ranks}) == 1
        assert all(inputs.shape == targets.shape for batches in ranks for inputs, targets in batches)
        counted = [int(t) for batches in ranks for _, targets in batches for t in targets.flatten() if t != -100]
        assert sorted(counted) == sorted(3 * list(range(samples))), world_size


@pytest.mark.parametrize(("batch", "samples", "world_size", "says"), [
    ((25, None), 100, 2, r"batch.global_size = 25 does not divide among 2 .* multiple of 2, such as 24"),
    ((2, None), 100, 4, r"batch.global_size = 2 does not divide among 4 .* such as 4"),
    ((24, 5), 100, 2, r"batch.micro_size = 5 does not divide the 12 samples .*allowed: \[1, 2, 3, 4, 6, 12\]"),
    ((24, 24), 100, 2, r"batch.micro_size = 24 does not divide the 12 samples"),
    ((24, None), 23, 2, r"training set has 23 samples, fewer than batch.global_size = 24"),
])  # fmt: skip
def test_what_does_not_divide_is_one_clear_line(capsys, batch, samples, world_size, says):
    with pytest.raises(SystemExit) as ended:
        BatchPlan(BatchConfig(*batch), samples, SEED, 0, world_size)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and re.search(says, lines[0]), lines


@pytest.mark.parametrize("batch", [(0, None), (24, 0), (-1, 1)])
def test_impossible_sizes_are_refused(batch):
    with pytest.raises(ValueError, match=r"batch\.(global|micro)_size = (0|-1) cannot work"):
        BatchConfig(*batch)


def test_the_seed_decides_the_order():
    orders = {seed: [BatchPlan(BatchConfig(8), 64, seed).sample(i) for i in range(64)] for seed in (1, 2)}
    assert orders[1] != orders[2]
    assert orders[1] == [BatchPlan(BatchConfig(8), 64, 1).sample(i) for i in range(64)]
