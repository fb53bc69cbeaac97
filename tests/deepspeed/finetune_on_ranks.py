"""What the ranks of a `group` run for test_finetune.py."""

import inspect
import os

import deepspeed_on_ranks
import torch
from rank_worker import starts_its_own_group

SCRIPT = "deepspeed/finetune.py"


def forget() -> None:
    """What transformers and accelerate remember of the training before, in this process: only tests have two in one."""
    import transformers.integrations.deepspeed
    from accelerate.state import AcceleratorState, GradientState

    transformers.integrations.deepspeed.unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_TORCH_DEVICE"):
        os.environ.pop(name, None)


@starts_its_own_group
def train(arguments: list[str]) -> dict:
    """Run the script on this rank, and watch.

    Returns:
        samples: the token rows that this rank's model saw in training, in order; micro_batches: how many rows each
        time; optimizer_steps: of the torch optimizer itself; answers and asked: what was scored at the end.
    """
    import transformers
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from finetuning import scores

    seen: dict = {"samples": [], "micro_batches": [], "optimizer_steps": 0, "answers": [], "asked": []}
    llama = transformers.LlamaForCausalLM
    forward, score = llama.forward, scores.score

    def watch(self, input_ids=None, **more):
        if self.training and torch.is_grad_enabled():
            seen["samples"] += [tuple(row) for row in input_ids.tolist()]
            seen["micro_batches"].append(len(input_ids))
        return forward(self, input_ids=input_ids, **more)

    def keep(answers, asked):
        if not seen["answers"]:
            seen["answers"], seen["asked"] = answers, [question.id for question in asked]
        return score(answers, asked)

    def count(optimizer, *_):
        # ZeRO steps one group of parameters (matrices, vectors) after the other; the others are empty meanwhile.
        seen["optimizer_steps"] += sum(bool(group["params"]) for group in optimizer.param_groups) / 2

    forget()
    handle = register_optimizer_step_post_hook(count)
    watch.__signature__ = inspect.signature(forward)  # Trainer looks at it
    llama.forward, scores.score = watch, keep
    try:
        deepspeed_on_ranks.train(SCRIPT, arguments)
    finally:
        llama.forward, scores.score = forward, score
        handle.remove()
    return seen


@starts_its_own_group
def train_until(arguments: list[str], steps: int) -> None:
    """Run the script, and tell it to stop when `steps` steps are done."""
    forget()
    deepspeed_on_ranks.train_until(SCRIPT, arguments, steps)


@starts_its_own_group
def ends(arguments: list[str]) -> tuple[int, str]:
    """The exit code of a script that must end with a message, and that message."""
    forget()
    return deepspeed_on_ranks.ends(SCRIPT, arguments)
