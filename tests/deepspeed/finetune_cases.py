"""What the ranks of a `group` run for test_finetune.py."""

import importlib.util
import inspect
import os
from pathlib import Path

import torch

SCRIPT = "deepspeed/finetune.py"
spec = importlib.util.spec_from_file_location("deepspeed_cases", Path(__file__).with_name("cases.py"))
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)


def forget() -> None:
    """What transformers and accelerate remember of the training before, in this process: only tests have two in one."""
    import transformers.integrations.deepspeed
    from accelerate.state import AcceleratorState, GradientState

    transformers.integrations.deepspeed.unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_TORCH_DEVICE"):
        os.environ.pop(name, None)


def train(arguments: list[str]) -> dict:
    """Run the script on this rank, and watch.

    Returns:
        samples: the token rows that this rank's model saw in training, in order; micro_batches: how many rows each
        time; optimizer_steps: of the torch optimizer itself; answers and asked: what was scored at the end.
    """
    import transformers
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from common import question_answering

    seen: dict = {"samples": [], "micro_batches": [], "optimizer_steps": 0, "answers": [], "asked": []}
    llama = transformers.LlamaForCausalLM
    forward, score = llama.forward, question_answering.score

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
    llama.forward, question_answering.score = watch, keep
    try:
        cases.train(SCRIPT, arguments)
    finally:
        llama.forward, question_answering.score = forward, score
        handle.remove()
    return seen


def train_until(arguments: list[str], steps: int) -> None:
    """Run the script, and tell it to stop when `steps` steps are done."""
    forget()
    cases.train_until(SCRIPT, arguments, steps)


def ends(arguments: list[str]) -> tuple[int, str]:
    """The exit code of a script that must end with a message, and that message."""
    forget()
    return cases.ends(SCRIPT, arguments)


train.joins_itself = train_until.joins_itself = ends.joins_itself = True
