"""A decoder-only transformer of the Llama architecture, in plain PyTorch that knows nothing of parallelism.

RMSNorm (arXiv 1910.07467), rotary embeddings (2104.09864), SwiGLU (2002.05202), grouped-query attention
(2305.13245), optionally a mixture of experts (2401.04088). What strategies need from outside is here: head
counts come from the weights' shapes, so that a tensor-parallel shard just works; `positions` is an argument;
the attention function can be replaced; embedding and head can be left out (pipeline stages); there are no
buffers.
"""

import dataclasses
import difflib
import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.loss import chunked_cross_entropy

_TINY: dict[str, Any] = dict(vocabulary=256, width=128, layers=4, heads=8, kv_heads=4, max_sequence=128)
_LLAMA: dict[str, Any] = dict(vocabulary=128256, kv_heads=8, max_sequence=131072, rope_theta=500000.0)
_GPT: dict[str, Any] = dict(vocabulary=50304, width=768, layers=12, heads=12, kv_heads=12, max_sequence=1024)
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _TINY | dict(ffn_width=384),
    "tiny_moe": _TINY | dict(ffn_width=192, experts=4),
    "gpt_124m": _GPT | dict(ffn_width=2048, tied=True),
    "llama_1b": _LLAMA | dict(width=2048, layers=16, heads=32, ffn_width=8192, rope_factor=32.0, tied=True),
    "llama3_8b": _LLAMA | dict(width=4096, layers=32, heads=32, ffn_width=14336, rope_factor=8.0),
    "llama3_70b": _LLAMA | dict(width=8192, layers=80, heads=64, ffn_width=28672, rope_factor=8.0),
}
_UNLESS_PRESET: dict[str, Any] = dict(
    rope_theta=10000.0, rope_factor=1.0, rope_low_frequency_factor=1.0, rope_high_frequency_factor=4.0,
    rope_original_sequence=8192, norm_eps=1e-5, tied=False, experts=0, experts_per_token=2,
)  # fmt: skip


def _from_preset() -> Any:
    """The default of a field whose value comes from the preset: None until `ModelConfig.__post_init__` has run."""
    return dataclasses.field(default=None, metadata={"default": "from the preset"})


@dataclasses.dataclass
class ModelConfig:
    """The shape of a model: a preset, and what is given beside it.

    Fields left None take the preset's value (head_size: width / heads), so that a config always shows the
    numbers in force, and one written to a file and read again is the same. Raises ValueError, in one line.
    """

    preset: str = "tiny"
    """A named shape: tiny, tiny_moe, gpt_124m, llama_1b, llama3_8b, llama3_70b."""
    vocabulary: int = _from_preset()
    """Number of different tokens."""
    width: int = _from_preset()
    """Size of the residual stream."""
    layers: int = _from_preset()
    """Transformer blocks."""
    heads: int = _from_preset()
    """Attention heads."""
    kv_heads: int = _from_preset()
    """Key-value heads; fewer than heads: grouped-query attention."""
    head_size: int = _from_preset()
    """Size of one head; if not given, width / heads."""
    ffn_width: int = _from_preset()
    """Inner width of the feed-forward layer (of each expert)."""
    max_sequence: int = _from_preset()
    """Longest sequence that the model accepts."""
    rope_theta: float = _from_preset()
    """Base of the rotary embedding's frequencies."""
    rope_factor: float = _from_preset()
    """1: plain rotary embedding; above: Llama 3.1's scaling, with the three settings below."""
    rope_low_frequency_factor: float = _from_preset()
    """Wavelengths above rope_original_sequence / this are stretched by rope_factor."""
    rope_high_frequency_factor: float = _from_preset()
    """Wavelengths below rope_original_sequence / this stay as they are."""
    rope_original_sequence: int = _from_preset()
    """The sequence length before the scaling."""
    norm_eps: float = _from_preset()
    """Added to the mean square in RMSNorm."""
    tied: bool = _from_preset()
    """The head uses the embedding's weight."""
    experts: int = _from_preset()
    """Experts of each feed-forward layer; 0: dense."""
    experts_per_token: int = _from_preset()
    """How many experts each token goes to."""

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            near = difflib.get_close_matches(self.preset, PRESETS, n=1, cutoff=0.3) or ["tiny"]
            found, allowed = f"model.preset is {self.preset!r}", ", ".join(PRESETS)
            raise ValueError(f"{found}; expected one of {allowed}; did you mean {near[0]}?")
        for field, value in (_UNLESS_PRESET | PRESETS[self.preset]).items():
            if getattr(self, field) is None:
                setattr(self, field, value)
        head_size: Any = self.head_size  # None unless given
        if head_size is None and self.heads > 0 and self.width % self.heads == 0:
            self.head_size = self.width // self.heads
        for field, value in dataclasses.asdict(self).items():
            least = 0 if field == "experts" else 1 if isinstance(value, int) else 1e-12
            if isinstance(value, int | float) and not isinstance(value, bool) and not value >= least:
                raise ValueError(f"model.{field} is {value}; expected at least {least}; raise it")
        for field, divisor in (("width", "heads"), ("heads", "kv_heads")):
            number, parts = getattr(self, field), getattr(self, divisor)
            if number % parts:
                raise ValueError(
                    f"model.{field} is {number} and model.{divisor} {parts}; expected a multiple; "
                    f"set model.{divisor} to a divisor of {number}, or model.{field} to a multiple of {parts}"
                )
        if self.head_size % 2:
            raise ValueError(
                f"model.head_size is {self.head_size} (width / heads unless set); expected an even number, "
                "because rotary embeddings turn pairs; change model.width or model.heads"
            )
        if self.experts and self.experts_per_token > self.experts:
            raise ValueError(
                f"model.experts_per_token is {self.experts_per_token}; expected at most model.experts, "
                f"{self.experts}; lower it"
            )


def initial_weight(name: str, shape: tuple[int, ...] | torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The weight that the parameter `name` of the whole model starts from: an fp32 CPU tensor of `shape`.

    A pure function: neither torch's global generator nor what was built before matters, so that a shard or a
    stage anywhere can compute its part. Ones for norms; otherwise normal with standard deviation 0.02, for
    projections into the residual stream 0.02 / sqrt(2 x layers) as in GPT-2, lest it grow with depth.
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.float32, device="cpu")
    if config.tied and name == "head.weight":  # a last pipeline stage holds its own copy of the tied weight
        name = "embedding.weight"
    into_residual = name.endswith(("attention.output.weight", "ffn.down.weight", "ffn.down"))
    std = 0.02 / math.sqrt(2 * config.layers) if into_residual else 0.02
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)


def rotary_angles(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (..., sequence, head_size / 2), of positions (sequence,) or (batch, sequence).

    With rope_factor other than 1, slow frequencies are lowered as in Llama 3.1: by rope_factor those that
    turn less than low_frequency_factor times in rope_original_sequence, not at all those that turn more than
    high_frequency_factor times, and smoothly in between.
    """
    exponents = torch.arange(0, config.head_size, 2, device=positions.device).to(dtype) / config.head_size
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_factor != 1.0:
        low, high = config.rope_low_frequency_factor, config.rope_high_frequency_factor
        turns = config.rope_original_sequence * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / config.rope_factor)
    angles = positions.to(dtype).unsqueeze(-1) * frequencies
    if positions.dim() == 2:
        angles = angles.unsqueeze(1)  # one row of angles for all heads
    return angles.cos(), angles.sin()


def rotate(heads: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (i, i + head_size / 2) of heads (batch, heads, sequence, head_size) by the angles."""
    cos, sin = rotary
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(heads.dtype)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention: the default of `Attention.attend`, and the signature of whatever replaces it.

    query: (batch, heads, sequence, head_size); key, value: (batch, kv_heads, keys, head_size), kv_heads a
    divisor of heads. Causal over equal lengths without a mask, which is (sequence, keys) bool: True may look.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not takes_groups(query, mask):
        key, value, groups = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1), 1
    causal = mask is None
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=groups > 1)


def takes_groups(query: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel takes fewer key heads than query heads: of those on GPUs, the flash and cuDNN kernels do, for
    16-bit types without a mask. The memory-efficient one, for fp32 and masks, does not: torch would fall back to the
    plain formula, and hold all scores."""
    return query.is_cuda and mask is None and query.dtype.itemsize == 2 and _has_flash_attention()


@torch.compiler.assume_constant_result
def _has_flash_attention() -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)


class LayerCache:
    """Keys and values of one layer, of fixed size from the first call on: compiled code sees one shape."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, key: Tensor, value: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store key and value (batch, kv_heads, sequence, head_size) at positions (sequence,); return all."""
        if self.keys is None or self.values is None:
            batch, kv_heads, _, head_size = key.shape  # of a shard: its own heads
            self.keys = key.new_zeros(batch, kv_heads, self.max_length, head_size)
            self.values = torch.zeros_like(self.keys)
        self.keys.index_copy_(2, positions, key)
        self.values.index_copy_(2, positions, value)
        return self.keys, self.values


class KVCache:
    """What decoding keeps of the past: `model(tokens, cache=cache)` for the prompt, then for each new token.

    `length` counts the tokens seen and gives the next positions; a caller that passes `positions`
    (sequence,) keeps count itself. Memory: 2 x layers x batch x kv_heads x max_length x head_size elements.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.length = 0
        self._layers: dict[str, LayerCache] = {}

    def layer(self, number: str) -> LayerCache:
        return self._layers.setdefault(number, LayerCache(self.max_length))


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        normed = F.rms_norm(hidden.to(dtype), hidden.shape[-1:], self.weight.to(dtype), self.eps)
        return normed.to(hidden.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.query = nn.Linear(config.width, config.heads * config.head_size, bias=False)
        self.key = nn.Linear(config.width, config.kv_heads * config.head_size, bias=False)
        self.value = nn.Linear(config.width, config.kv_heads * config.head_size, bias=False)
        self.output = nn.Linear(config.heads * config.head_size, config.width, bias=False)
        self.attend: Callable[..., Tensor] = causal_attention

    def forward(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], positions: Tensor, cache: LayerCache | None
    ) -> Tensor:
        def split(projected: Tensor) -> Tensor:  # into as many heads as the weights hold
            return projected.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

        query, key, value = split(self.query(hidden)), split(self.key(hidden)), split(self.value(hidden))
        query, key = rotate(query, rotary), rotate(key, rotary)
        mask = None
        if cache is not None:
            key, value = cache.update(key, value, positions)
            mask = torch.arange(cache.max_length, device=positions.device) <= positions.unsqueeze(-1)
        return self.output(self.attend(query, key, value, mask).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.ffn_width, bias=False)
        self.up = nn.Linear(config.width, config.ffn_width, bias=False)
        self.down = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(hidden)) * self.up(hidden))


class MixtureOfExperts(nn.Module):
    """Each token goes to its `experts_per_token` most probable experts, weighted by their probabilities, which
    are made to sum to 1 (Mixtral, arXiv 2401.04088). Dropless: experts have no capacity limit."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.experts_per_token = config.experts_per_token
        self.router = nn.Linear(config.width, config.experts, bias=False)
        self.gate = nn.Parameter(torch.empty(config.experts, config.ffn_width, config.width))
        self.up = nn.Parameter(torch.empty(config.experts, config.ffn_width, config.width))
        self.down = nn.Parameter(torch.empty(config.experts, config.width, config.ffn_width))

    @torch.compiler.disable  # the number of an expert's tokens is data, at which a graph breaks anyway
    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.flatten(0, -2)
        scores = self.router(tokens)
        probabilities = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        shares, chosen = probabilities.topk(self.experts_per_token, dim=-1)
        shares = shares / shares.sum(-1, keepdim=True)
        output = torch.zeros_like(tokens)
        for expert in range(self.gate.shape[0]):
            rows, slots = (chosen == expert).nonzero(as_tuple=True)
            taken = tokens[rows]
            inner = F.silu(F.linear(taken, self.gate[expert])) * F.linear(taken, self.up[expert])
            result = F.linear(inner, self.down[expert]) * shares[rows, slots].unsqueeze(-1)
            output = output.index_add(0, rows, result.to(output.dtype))
        return output.view_as(hidden)


def load_balancing_loss(router_scores: Tensor, experts_per_token: int) -> Tensor:
    """experts x sum of (share of assignments x mean probability): 1 when balanced (arXiv 2101.03961).

    router_scores: (tokens, experts), the output of a block's `ffn.router` (a forward hook collects it).
    """
    experts = router_scores.shape[-1]
    probabilities = router_scores.softmax(-1, dtype=torch.promote_types(router_scores.dtype, torch.float32))
    chosen = probabilities.topk(experts_per_token, dim=-1).indices
    shares = F.one_hot(chosen.flatten(), experts).to(probabilities.dtype).mean(0)
    return experts * (shares * probabilities.mean(0)).sum()


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn = MixtureOfExperts(config) if config.experts else FeedForward(config)

    def forward(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], positions: Tensor, cache: LayerCache | None
    ) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), rotary, positions, cache)
        return hidden + self.ffn(self.ffn_norm(hidden))


class Head(nn.Module):
    """Logits, or the sum of token losses. A tied head has no weight of its own, but is given one."""

    def __init__(self, config: ModelConfig, own_weight: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocabulary, config.width)) if own_weight else None

    def forward(self, hidden: Tensor, targets: Tensor | None, tied_weight: Tensor | None) -> Tensor:
        weight = self.weight if tied_weight is None else tied_weight
        assert weight is not None
        return F.linear(hidden, weight) if targets is None else chunked_cross_entropy(hidden, weight, targets)


class Transformer(nn.Module):
    """The whole model, or a pipeline stage: some of its `layers`, with or without embedding and head.

    Parameters bear the same names in a stage as in the whole model, and start equal for equal seeds. They
    stay unset on the meta device (`with torch.device("meta")`) and with seed None: initialize or load them.
    """

    def __init__(
        self,
        config: ModelConfig,
        seed: int | None = 0,
        with_embedding: bool = True,
        with_head: bool = True,
        layers: range | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        device = torch.get_default_device()
        with torch.device("meta"):  # where torch's own initialization draws nothing from the global generator
            self.embedding = nn.Embedding(config.vocabulary, config.width) if with_embedding else None
            numbers = range(config.layers) if layers is None else layers
            self.blocks = nn.ModuleDict({str(number): Block(config) for number in numbers})
            self.norm = RMSNorm(config.width, config.norm_eps) if with_head else None
            self.head = Head(config, own_weight=not (config.tied and with_embedding)) if with_head else None
        if device.type != "meta":
            self.to_empty(device=device)
            if seed is not None:
                self.initialize(seed)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Fill the parameters that are here from `initial_weight`; those on the meta device are skipped."""
        for name, parameter in self.named_parameters():
            if not parameter.is_meta:
                parameter.copy_(initial_weight(name, parameter.shape, self.config, seed))

    def compile_blocks(self, **options: Any) -> None:
        """Compile each block in place, with torch.compile's options; parameter names stay as they are.

        torch would cut the graphs of a DDP model at its buckets, so that gradients can leave during backward. Blocks
        are small enough for that, and each is to stay one graph.
        """
        torch._dynamo.config.optimize_ddp = False
        for block in self.blocks.values():
            block.compile(**options)

    def checkpoint_activations(self) -> None:
        """From now on keep only each block's input, and compute the block again in backward (1604.06174)."""
        self.checkpointing = True

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (batch, sequence, vocabulary), or with targets the sum of token losses (fp32; fp64 in fp64).

        tokens, targets: (batch, sequence) int64; target -100 is ignored. A stage without embedding takes
        hidden states (batch, sequence, width) as tokens, one without head returns them. positions: int64
        (sequence,), without a cache also (batch, sequence); by default they count on from what the cache has
        seen. Raises ValueError where more tokens are given than config.max_sequence, or than the cache has room for.
        """
        if tokens.shape[1] > self.config.max_sequence:
            raise ValueError(
                f"sequence of {tokens.shape[1]} tokens; expected at most model.max_sequence = "
                f"{self.config.max_sequence}; shorten it or raise max_sequence"
            )
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
            if cache is not None:
                positions = positions + cache.length
                cache.length += tokens.shape[1]
                if cache.length > cache.max_length:
                    raise ValueError(f"{cache.length} tokens; a cache of {cache.max_length}; make it longer")
        hidden = tokens if self.embedding is None else self.embedding(tokens)
        rotary = rotary_angles(positions, self.config, torch.promote_types(hidden.dtype, torch.float32))
        for number, block in self.blocks.items():
            if self.checkpointing and cache is None and torch.is_grad_enabled():
                hidden = checkpoint(  # without dropout there is no random state to keep
                    block, hidden, rotary, positions, None, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden = block(hidden, rotary, positions, None if cache is None else cache.layer(number))
        if self.head is None or self.norm is None:
            return hidden
        tied_weight = self.embedding.weight if self.config.tied and self.embedding is not None else None
        return self.head(self.norm(hidden), targets, tied_weight)
