# ruff: noqa: E501  (one line each)
"""Usual mistakes in the exercises of ddp/, for tests/docs/test_every_exercise.py: each must get its own message."""

MISTAKES = {  # exercise, text of the solution, what to put there, what the learner must be told
    "stride": ("shard_the_data", "range(first, first + share)", "range(step * global_size + rank, (step + 1) * global_size, world_size)", "another order"),
    "no step": ("shard_the_data", "step * global_size + rank", "rank", "the samples 24 to 47"),
    "remainder": ("shard_the_data", "if global_size % world_size:", "if False:", "silent remainder"),
    "sum": ("average_the_gradients", "parameter.grad /= dist.get_world_size()", "pass", "2 times too much"),
    "alone": ("average_the_gradients", "dist.all_reduce(parameter.grad)", "parameter.grad *= dist.get_world_size()", "of this rank alone"),
    "weights": ("average_the_gradients", "dist.all_reduce(parameter.grad)", "dist.all_reduce(parameter.data)", "itself has changed"),
    "tied": ("average_the_gradients", "in model.parameters():", "in (p for m in model.modules() for p in m._parameters.values() if p is not None):", "each gradient once"),
    "zeros": ("average_the_gradients", "if parameter.grad is not None:", "parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad\n        if True:", "had no gradient and has one now"),
    "mean of means": ("accumulate_correctly", "loss * dist.get_world_size() / valid", "loss / (targets != IGNORED).sum().clamp(min=1) / len(micro_batches)", "off by"),
    "nan": ("accumulate_correctly", 'reduction="sum")', 'reduction="mean")', "0/0"),
    "always sync": ("accumulate_correctly", "nullcontext() if is_last else model.no_sync()", "nullcontext()", "3 all-reduces"),
    "never sync": ("accumulate_correctly", "nullcontext() if is_last else model.no_sync()", "model.no_sync()", "did not communicate"),
    "sync decided too late": ("accumulate_correctly", "        with nullcontext() if is_last else model.no_sync():  # around the forward too\n            loss", "        if True:\n            loss", "the forward that decides"),
    "local loss": ("accumulate_correctly", "    dist.all_reduce(total)\n", "", "accumulate returned"),
    "no rng": ("resume_exactly", "    torch.set_rng_state(", "    str(", "one file per rank"),
    "rng of rank 0": ("resume_exactly", 'torch.load(folder / f"rng_{dist.get_rank()}.pt")', 'torch.load(folder / "rng_0.pt")', "on rank 1 the rng"),
    "no optimizer": ("resume_exactly", '    for name in ("model", "optimizer", "schedule"):', '    for name in ("model", "schedule"):', "the optimizer is not"),
    "no schedule": ("resume_exactly", '    for name in ("model", "optimizer", "schedule"):', '    for name in ("model", "optimizer"):', "the schedule is not"),
    "no step kept": ("resume_exactly", 'trainer.step = checkpoint["step"]', "pass", "the step is not"),
    "seed by rank": ("lab_two_ranks_no_faster", "DistributedSampler(dataset, shuffle=True, drop_last=True)", "DistributedSampler(dataset, seed=dist.get_rank(), drop_last=True)", "different samples"),
    "no set_epoch": ("lab_two_ranks_no_faster", "sampler.set_epoch(epoch)", "sampler.set_epoch(0)", "learns of a new epoch only"),
    "whole batch each": ("lab_two_ranks_no_faster", "share = global_size // dist.get_world_size()", "share = global_size", "divided by the world size"),
    "every micro-batch": ("lab_overlap_by_hand", "        if is_last:\n", "        if True:\n", "hint"),
    "sum not mean": ("lab_overlap_by_hand", "            parameter.grad /= world_size\n", "", "away from the training of one process"),
}  # fmt: skip
