# ruff: noqa: E501  (one line each)
"""Usual mistakes in the exercises of deepspeed/, for tests/docs/test_every_exercise.py: each must get its own message."""

MISTAKES = {  # exercise, text of the solution, what to put there, what the learner must be told
    "no copy in fp32": ("bytes_per_rank", "has_copy = stage > 0 or weight_bytes < 4", "has_copy = weight_bytes < 4", "keeps a copy in fp32 as well"),
    "always a copy": ("bytes_per_rank", "has_copy = stage > 0 or weight_bytes < 4", "has_copy = True", "updates the weights themselves"),
    "whole copy": ("bytes_per_rank", "master=4 * of_optimizer", "master=4 * parameters", "the copy is the optimizer's"),
    "gradients cut too early": ("bytes_per_rank", "(part if stage >= 2 else", "(part if stage >= 1 else", "gradients are cut up from stage 2 on"),
    "weights never cut": ("bytes_per_rank", "(part if stage >= 3 else parameters)", "parameters", "weights are cut up from stage 3 on"),
    "whole moments": ("bytes_per_rank", "moments=2 * 4 * of_optimizer", "moments=2 * 4 * parameters", "stage 1 is where"),
    "moments in bf16": ("bytes_per_rank", "moments=2 * 4 * of_optimizer", "moments=2 * weight_bytes * of_optimizer", "two averages for each parameter"),
    "gradients in fp32": ("bytes_per_rank", "gradients=weight_bytes *", "gradients=4 *", "gradients have 2 bytes each"),
    "mean over ranks": ("scale_the_loss", "factor = dist.get_world_size() / count.item()", "factor = 1 / count.item()", "too small by the number of ranks"),
    "divided twice": ("scale_the_loss", "    if scale_wrt_gas:\n        factor *= len(micro_batches)", "    if scale_wrt_gas:\n        assert micro_batches", "with scale_wrt_gas=True the engine divides, too"),
    "never divided": ("scale_the_loss", "    if scale_wrt_gas:\n", "    if True:\n", "nobody divides by them"),
    "always scaled": ("scale_the_loss", "factor, scale_wrt_gas=scale_wrt_gas)", "factor)", "too small by the number of micro-batches"),
    "own tokens": ("scale_the_loss", "    dist.all_reduce(count)", "    count *= dist.get_world_size()", "a token weighs more where there are few"),
    "mean of means": ("scale_the_loss", "ignore_index=IGNORED, reduction=\"sum\")", "ignore_index=IGNORED)", "a token weighs more where there are few"),
    "a sum": ("scale_the_loss", "factor = dist.get_world_size() / count.item()", "factor = dist.get_world_size()", "the mean is wanted"),
    "padding counted": ("scale_the_loss", "(targets != IGNORED).sum()", "(targets != 7).sum()", "times what it should be"),
    "one step call": ("scale_the_loss", "        engine.step()", "    engine.step()", "after every backward"),
    "sorted by ndim": ("decay_the_matrices", "len(getattr(p, \"ds_shape\", p.shape))", "p.ndim", "look at p.ds_shape"),
    "the part's axes": ("decay_the_matrices", "len(getattr(p, \"ds_shape\", p.shape))", "getattr(p, \"ds_tensor\", p).ndim", "look at p.ds_shape"),
    "frozen too": ("decay_the_matrices", "model.parameters() if p.requires_grad]", "model.parameters()]", "only those with requires_grad"),
    "other way round": ("decay_the_matrices", "return [{\"params\": matrices, \"weight_decay\": weight_decay}, {\"params\": vectors, \"weight_decay\": 0.0}]", "return [{\"params\": vectors, \"weight_decay\": 0.0}, {\"params\": matrices, \"weight_decay\": weight_decay}]", "first the matrices"),
    "decay swapped": ("decay_the_matrices", "return [{\"params\": matrices, \"weight_decay\": weight_decay}, {\"params\": vectors, \"weight_decay\": 0.0}]", "return [{\"params\": matrices, \"weight_decay\": 0.0}, {\"params\": vectors, \"weight_decay\": weight_decay}]", "with the matrices and 0 with the vectors"),
    "one group": ("decay_the_matrices", "return [{\"params\": matrices, \"weight_decay\": weight_decay}, {\"params\": vectors, \"weight_decay\": 0.0}]", "return [{\"params\": matrices + vectors, \"weight_decay\": weight_decay}]", "two, matrices and vectors"),
    "nothing counted": ("decay_the_matrices", "getattr(p, \"ds_numel\", p.numel())", "p.numel()", "when it is whole it has p.ds_numel"),
}  # fmt: skip
