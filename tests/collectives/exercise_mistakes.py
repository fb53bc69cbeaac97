# ruff: noqa: E501  (one line each)
"""Usual mistakes in the exercises of collectives/, for tests/docs/test_every_exercise.py: each must get its own message."""

MISTAKES = {  # exercise, text of the solution, what to put there, what the learner must be told
    "root to each": ("tree_broadcast", "    have = 1 ", "    for peer in range(1, n):\n        if number == 0:\n            dist.send(tensor, (peer + root) % n)\n        elif number == peer:\n            dist.recv(tensor, root)\n    have = n ", "takes 3 rounds"),
    "root 0": ("tree_broadcast", "n = dist.get_world_size()\n    number = (dist.get_rank() - root) % n", "n, root = dist.get_world_size(), 0\n    number = dist.get_rank()", "holds the tensor of rank 0"),
    "library": ("tree_broadcast", "    have = 1 ", "    dist.broadcast(tensor, root)\n    have = n ", "a call of broadcast"),
    "nothing": ("tree_broadcast", "    have = 1 ", "    have = n ", "holds the tensor of rank 1"),
    "other chunk": ("ring_reduce_scatter", "chunks[(rank - step - 2) % n]  # what leaves is what was added to in the step before\n        received = torch.empty_like(come)\n        pass_on(chunks[(rank - step - 1) % n], received)", "chunks[(rank - step - 1) % n]\n        received = torch.empty_like(come)\n        pass_on(chunks[(rank - step) % n], received)", "start at another rank"),
    "once too often": ("ring_reduce_scatter", "    for step in range(n - 1):\n        pass_on(", "    for step in range(n):\n        pass_on(", "sent 2 messages"),
    "stale chunk": ("ring_reduce_scatter", "pass_on(chunks[(rank - step) % n], chunks[", "pass_on(chunks[rank], chunks[", "has a wrong chunk"),
    "no addition": ("ring_reduce_scatter", "come += received", "come.copy_(received)", "follow one chunk"),
    "everybody": ("ring_reduce_scatter", "    n, rank = dist.get_world_size(), dist.get_rank()\n    for step in range(n - 1):\n        come", "    n, rank = dist.get_world_size(), dist.get_rank()\n    dist.all_reduce(chunks[rank].clone())\n    for step in range(n - 1):\n        come", "a call of allreduce"),
    "any number": ("recursive_doubling", "if n & (n - 1):", "if False:", "a ValueError that names the 3 ranks"),
    "no number": ("recursive_doubling", "on {n} ranks; expected", "cannot be done; expected", "a ValueError that names the 3 ranks"),
    "late error": ("recursive_doubling", "    if n & (n - 1):", "    if n & (n - 1):\n        dist.barrier()", "1 messages before the error"),
    "one round": ("recursive_doubling", "while distance < n:", "while distance < 2:", "the sum"),
    "no sum": ("recursive_doubling", "tensor += received", "tensor.copy_(received)", "add what the partner sent"),
    "each with each": ("recursive_doubling", "    while distance < n:\n        peer = rank ^ distance\n        both = [dist.P2POp(dist.isend, tensor, peer)", "    mine = tensor.clone()\n    for distance in range(1, n):\n        peer = rank ^ distance\n        both = [dist.P2POp(dist.isend, mine, peer)", "differ between ranks in their last bits"),
    "once more": ("recursive_doubling", "        distance *= 2\n", "        distance *= 2\n    for request in dist.batch_isend_irecv(both):\n        request.wait()\n", "messages of [28, 28] bytes"),
    "alone": ("lab_deadlock", "all_agree(loss.item() < target)", "all_agree(True) and loss.item() < target", "up to the first in which every"),
    "never": ("lab_deadlock", "all_agree(loss.item() < target)", "all_agree(False)", "every rank's loss"),
    "no exchange": ("lab_deadlock", "return torch.stack(parts).sum(0)", "return tensor * n", "those of one process"),
    "padded": ("lab_wrong_mean", "torch.arange(len(kinds))[dist.get_rank() :: dist.get_world_size()]", "torch.tensor(list(torch.utils.data.DistributedSampler(kinds, shuffle=False)))", "count twice"),
    "mean of means": ("lab_wrong_mean", "    dist.all_reduce(total)\n", "    total /= total[2].clone()\n    dist.all_reduce(total)\n", "do not average"),
    "no sample": ("lab_wrong_mean", "    dist.all_reduce(total)\n", "    total = total / total[2] * total[2] / len(kinds)\n    dist.all_reduce(total)\n", "0/0"),
    "rank alone": ("lab_wrong_mean", "    dist.all_reduce(total)\n", "", "as in one process"),
}  # fmt: skip
