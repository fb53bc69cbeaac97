"""DeepSpeed inference: a model of transformers, its matrices split over the ranks, generates what it generates alone.

    python deepspeed/inference.py                                         # one process: the engine splits nothing
    torchrun --nproc-per-node=2 deepspeed/inference.py                    # tensor parallel on two ranks
    torchrun --nproc-per-node=2 deepspeed/inference.py --weights runs/zero/model --prompt "def "

`deepspeed.init_inference` finds the linear layers by itself (AutoTP): their rows or columns are split, and outputs of
the split columns are all-reduced. Every rank feeds the same tokens and gets the same logits. The model alone and the
engine answer the same prompt, greedily; the exit code is 1 if one token differs. DeepSpeed's own kernels
(`--kernels true`) need a GPU; AutoTP runs on the CPU too.
"""

import contextlib
import io
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from environment import deepspeed
from settings import start_deepspeed
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from common.config import parse
from common.config_fields import PathText
from common.hf_weights import save_hugging_face
from common.ranks import Ranks, fail, join
from common.transformer import ModelConfig, Transformer

TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2}  # of the logits, relative to the largest: another order of sums, in this dtype


@dataclass
class InferenceConfig:
    weights: PathText | None = None
    """A folder in the format of transformers (config.json, model.safetensors); by default a random small Llama."""
    prompt: str = "To be, or not to be"
    """Its UTF-8 bytes are the tokens: what the models of this tutorial are trained on."""
    tokens: int = 32
    """How many to generate."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What both models compute in."""
    kernels: bool = False
    """Put DeepSpeed's fused CUDA kernels in the place of whole blocks (GPU only)."""
    repeats: int = 3
    """Generations to time; a first one is not timed."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The shape of the random model."""
    seed: int = 1234
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("repeats", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)} cannot work; allowed: at least {least}")
        if not self.prompt:
            raise ValueError("prompt is empty; allowed: at least one character")


@record
def main(config: InferenceConfig) -> None:
    ranks = join(config.device)
    start_deepspeed(ranks)  # takes the process group that is there
    if config.kernels and ranks.device.type == "cpu":
        fail("kernels = true on the CPU: DeepSpeed has these kernels for GPUs only; leave it out, AutoTP needs none")
    alone = load(config, ranks)
    check_shape(alone.config, config, ranks)
    prompt = torch.tensor([list(config.prompt.encode())], device=ranks.device)

    # ---- the lesson: one call. The model is changed in place, so that the engine gets a second one.
    engine = load(config, ranks)
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):  # every rank prints its plan; below is what came of it
        engine = deepspeed.init_inference(
            engine,
            tensor_parallel={"tp_size": ranks.world_size, "tp_grain_size": 1},  # 64 by default: some ranks get nothing
            dtype=next(alone.parameters()).dtype,
            replace_with_kernel_inject=config.kernels,
        )
    seconds = time.perf_counter() - start
    kinds = {type(m).__name__ for m in engine.module.modules() if type(m).__module__.startswith("deepspeed")}
    ranks.print(f"init_inference: {seconds:.2f} s, {ranks.world_size} rank(s); layers of DeepSpeed: "
               f"{', '.join(sorted(kinds)) or 'none'}")  # fmt: skip
    whole, mine = (sum(p.nbytes for p in m.parameters()) for m in (alone, engine.module))
    held = "  ".join(f"{size:,}" for size in ranks.all_gather(mine))
    ranks.print(f"bytes of weights: {whole:,} alone; by rank: {held}")

    # ---- the proof: logits, and the tokens that greedy decoding makes of them
    with torch.no_grad():
        expected, found = alone(prompt).logits.float(), engine(prompt).logits.float()
    difference, largest = (expected - found).abs().max().item(), expected.abs().max().item()
    difference = max(ranks.all_gather(difference))
    ranks.print(f"logits up to {largest:.4f}, largest difference {difference:.1e}")
    answer, rate = generate(alone, prompt, config, ranks)
    engine_answer, engine_rate = generate(engine, prompt, config, ranks)
    same = all(ranks.all_gather(torch.equal(answer, engine_answer)))
    ranks.print(f"{config.tokens} tokens, {'the same' if same else 'NOT the same'}: {show(answer, prompt)}")
    ranks.print(f"model alone {rate:,.1f} tokens/s, engine {engine_rate:,.1f} tokens/s (median of {config.repeats})")
    ranks.leave()
    if difference > TOLERANCE[config.precision] * max(1.0, largest):
        raise SystemExit(f"error: the engine's logits differ by {difference:.1e}")
    if config.precision == "fp32" and not same:  # bf16 may choose otherwise where two logits are next to each other
        raise SystemExit("error: the engine generated other tokens than the model alone")


def load(config: InferenceConfig, ranks: Ranks) -> Any:
    """The model, on this rank's device: from the folder, or random ones of this tutorial in transformers' format."""
    logging.disable_progress_bar()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]
    if config.weights:
        folder = Path(config.weights)
        if not (folder / "config.json").is_file():
            fail(f"{folder}/config.json does not exist; expected a model's folder; make one with convert_checkpoint.py")
        try:  # safetensors alone: pickled weights may run code
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
        except Exception as error:  # whatever a damaged or foreign config makes the library raise
            fail(f"{folder} is no causal model with safetensors: {' '.join(str(error).split()):.200}")
    else:
        with tempfile.TemporaryDirectory() as folder:
            random = Transformer(config.model, config.seed)
            with torch.no_grad():  # five times the usual start: logits far enough apart for a varied answer
                for parameter in random.parameters():
                    parameter.mul_(5.0 if parameter.dim() > 1 else 1.0)
            save_hugging_face(random, folder)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval().to(ranks.device)


def check_shape(shape: Any, config: InferenceConfig, ranks: Ranks) -> None:
    """End with one line if the model cannot be split among so many ranks, or take so many tokens."""
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    if ranks.world_size > heads:
        fail(f"{ranks.world_size} ranks, but the model has {heads} key-value heads; expected at most one rank a head")
    length = len(config.prompt.encode()) + config.tokens
    if length > shape.max_position_embeddings:
        fail(f"prompt and answer are {length} tokens; the model takes {shape.max_position_embeddings}; lower --tokens")
    if (top := max(config.prompt.encode())) >= shape.vocab_size:
        fail(
            f"prompt: byte {top} is no token of this model ({shape.vocab_size} tokens); expected a vocabulary of bytes"
        )


@torch.no_grad()
def generate(model: Any, prompt: torch.Tensor, config: InferenceConfig, ranks: Ranks) -> tuple[torch.Tensor, float]:
    """Greedy decoding of exactly `tokens` tokens; returns (batch, prompt + tokens) int64 and tokens per second."""
    options: dict[str, Any] = dict(max_new_tokens=config.tokens, min_new_tokens=config.tokens, do_sample=False)
    options |= dict(attention_mask=torch.ones_like(prompt), pad_token_id=0)
    answer = model.generate(prompt, **options)
    seconds = []
    for _ in range(config.repeats):
        ranks.barrier()
        start = time.perf_counter()
        model.generate(prompt, **options)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
        seconds.append(time.perf_counter() - start)
    return answer, config.tokens / max(ranks.all_gather(statistics.median(seconds)))


def show(answer: torch.Tensor, prompt: torch.Tensor) -> str:
    """The generated tokens as text, if they are bytes; else their numbers."""
    tokens = answer[0, prompt.shape[1] :].tolist()
    return repr(bytes(tokens)) if max(tokens) < 256 else str(tokens)


if __name__ == "__main__":
    main(parse(InferenceConfig))
