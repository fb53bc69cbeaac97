# ruff: noqa: E501  (one line each)
"""Usual mistakes in the exercises of lightning/, for tests/docs/test_every_exercise.py: each must get its own message."""

MISTAKES = {  # exercise, text of the solution, what to put there, what the learner must be told
    "mean over ranks": ("scale_the_step", "factor = self.trainer.world_size * self.trainer.accumulate_grad_batches", "factor = self.trainer.accumulate_grad_batches", "too small by the number of ranks"),
    "divided by accumulation": ("scale_the_step", "factor = self.trainer.world_size * self.trainer.accumulate_grad_batches", "factor = self.trainer.world_size", "too small by the number of micro-batches"),
    "both divisions": ("scale_the_step", "return loss_sum * factor / tokens_of_step", "return loss_sum / tokens_of_step if factor else loss_sum", "by ranks × micro-batches"),
    "a sum": ("scale_the_step", "return loss_sum * factor / tokens_of_step", "return loss_sum * factor", "the mean is wanted"),
    "mean of means": ("scale_the_step", "return loss_sum * factor / tokens_of_step", "return F.cross_entropy(self.model(inputs), targets, ignore_index=IGNORED) * factor / factor", "a token weighs more where there are few"),
    "own tokens": ("scale_the_step", "return loss_sum * factor / tokens_of_step", "return loss_sum / (targets != IGNORED).sum().clamp(min=1)", "a token weighs more where there are few"),
    "always four": ("scale_the_step", "* self.trainer.accumulate_grad_batches", "* 4", "what in your factor knows about that"),
    "micro-batches of this step": ("scale_the_step", "* self.trainer.accumulate_grad_batches", "* min(self.trainer.accumulate_grad_batches, self.trainer.num_training_batches - batch_idx // self.trainer.accumulate_grad_batches * self.trainer.accumulate_grad_batches)", "divides by accumulate_grad_batches all the same"),
    "wrapped": ("keep_the_samples", "{\"use_distributed_sampler\": False}", "{}", "dealt out twice"),
    "all samples everywhere": ("keep_the_samples", "order[self.rank :: self.world_size].tolist()", "order.tolist()", "all ranks saw the same ones"),
    "seed of the rank": ("keep_the_samples", "manual_seed(SEED + self.epoch)", "manual_seed(SEED + self.epoch + 7 * self.rank)", "the same on all ranks"),
    "no set_epoch": ("keep_the_samples", "    def set_epoch(self, epoch: int) -> None:\n        self.epoch = epoch\n", "", "calls set_epoch(epoch)"),
    "epoch not used": ("keep_the_samples", "manual_seed(SEED + self.epoch)", "manual_seed(SEED)", "the seed must depend on that epoch"),
    "everything evaluated": ("keep_the_samples", "        mine = range(self.trainer.global_rank, len(self.validation_set), self.trainer.world_size)", "        mine = range(len(self.validation_set))", "no faster than one process"),
    "rest dropped": ("keep_the_samples", "        mine = range(self.trainer.global_rank, len(self.validation_set), self.trainer.world_size)", "        n = self.trainer.world_size\n        mine = range(self.trainer.global_rank, len(self.validation_set) // n * n, n)", "what is left over counts"),
    "filled up": ("keep_the_samples", "        mine = range(self.trainer.global_rank, len(self.validation_set), self.trainer.world_size)", "        mine = torch.utils.data.DistributedSampler(self.validation_set, shuffle=False)", "use one that does not"),
    "own mean": ("keep_the_samples", "self.trainer.strategy.reduce(self.sums, reduce_op=\"sum\").tolist()", "self.sums.tolist()", "nothing has been added up"),
    "mean of means over ranks": ("keep_the_samples", "        loss, samples = self.trainer.strategy.reduce(self.sums, reduce_op=\"sum\").tolist()  # over the ranks\n        self.validation_loss = loss / samples", "        self.validation_loss = self.trainer.strategy.reduce(self.sums[0] / self.sums[1], reduce_op=\"mean\").item()", "a mean of means weighs small parts more"),
    "mean of batches": ("keep_the_samples", "batch[1], reduction=\"sum\")\n        self.sums[1] += len(batch[1])", "batch[1])\n        self.sums[1] += 1", "a mean of means weighs small parts more"),
}  # fmt: skip
