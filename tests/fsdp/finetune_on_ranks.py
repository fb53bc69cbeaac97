"""What the ranks of a `group` run for test_finetune.py."""

import contextlib
import importlib.util
import io
import sys
from pathlib import Path

import scripts_on_ranks
from own_folder import own_folder
from rank_worker import starts_its_own_group

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "fsdp/finetune.py"


@contextlib.contextmanager
def double_norms():
    """Let Llama's norm compute in the dtype of its input: transformers rounds to fp32 inside it, in fp64 too.

    A sum that differs in its last bit of 2^-53 is then now and then rounded to another fp32 number, 6e-8 away.
    """
    import torch.nn.functional as F
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    usual = LlamaRMSNorm.forward
    LlamaRMSNorm.forward = lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)
    try:
        yield
    finally:
        LlamaRMSNorm.forward = usual


@starts_its_own_group
def train(arguments: list[str]) -> None:
    """Run the script on this rank."""
    with double_norms():
        scripts_on_ranks.train(SCRIPT, arguments)


@starts_its_own_group
def printed(arguments: list[str]) -> str:
    """Run the script on this rank; what it printed."""
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        train(arguments)
    return stdout.getvalue()


@starts_its_own_group
def train_until(arguments: list[str], steps: int) -> None:
    """Run the script, and tell it to stop when `steps` steps are done."""
    with double_norms():
        scripts_on_ranks.train_until(SCRIPT, arguments, steps)


@starts_its_own_group
def asked_and_answered(arguments: list[str]) -> tuple[list[str], list[str], list[int]]:
    """Run the script: ids and answers that were scored at the end, and the prompts in each batch of this rank."""
    from finetuning import answers as finetuning_answers
    from finetuning import scores

    score, left_padded = scores.score, finetuning_answers.left_padded
    scored, batches = {}, []

    def keep(answers, questions):
        scored.setdefault("all", ([question.id for question in questions], answers))
        return score(answers, questions)

    def count(prompts, *rest):
        batches.append(len(prompts))
        return left_padded(prompts, *rest)

    scores.score, finetuning_answers.left_padded = keep, count
    try:
        train(arguments)
    finally:
        scores.score, finetuning_answers.left_padded = score, left_padded
    return *scored["all"], batches


@starts_its_own_group
def ends_without(package: str, arguments: list[str]) -> tuple[int, str]:
    """How the script ends where a package is not installed."""
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == package}
    sys.modules[package] = None
    try:
        return scripts_on_ranks.ends(SCRIPT, arguments)
    finally:
        del sys.modules[package]
        sys.modules.update(kept)


def lesson():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("finetune_under_test", ROOT / SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with own_folder(ROOT / SCRIPT):
        spec.loader.exec_module(module)
    return module


def counted(path: str) -> tuple[int, int]:
    """Tokens of this rank's part of step 0 that count, and what the script makes of them."""
    import torch
    import torch.distributed as dist

    from common.data_sharding import BatchConfig, BatchPlan, Loader
    from finetuning.squad import read_questions
    from finetuning.tokens import QuestionDataset, load_tokenizer

    dataset = QuestionDataset(read_questions(path), load_tokenizer(None), 80, training=True)
    plan = BatchPlan(BatchConfig(48, 4), len(dataset), 1234, dist.get_rank(), dist.get_world_size())
    micro_batches = list(Loader(dataset, plan, torch.device("cpu")).micro_batches(0))
    mine = sum(int((targets != -100).sum()) for (_, targets), _ in micro_batches)
    return mine, int(lesson().count_tokens(micro_batches))
