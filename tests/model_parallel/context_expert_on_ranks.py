"""What the ranks of a `group` run for the tests of context and expert parallelism."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
from own_folder import own_folder
from rank_worker import starts_its_own_group
from scripts_on_ranks import train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.experimental._context_parallel import _attention as torch_ring
from torch.utils._python_dispatch import TorchDispatchMode

import common.meta_device
import common.transformer
from common.transformer import ModelConfig, Transformer, initial_weight

ROOT = Path(__file__).resolve().parent.parent.parent


@contextmanager
def imported(name: str) -> Iterator[ModuleType]:
    """A module of model_parallel/, which a script that runs meanwhile imports as the same one."""
    with own_folder(ROOT / "model_parallel" / f"{name}.py"):
        yield importlib.import_module(name)


class Sent(TorchDispatchMode):
    """Notes every collective: (name, bytes of its input)."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[tuple[str, int]] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name().split("::")[-1]
        if name in ("bincount", "nonzero", "_local_scalar_dense", "repeat_interleave.Tensor") and not kwargs:
            self.waits.append(name)
        if op.namespace in ("c10d", "_c10d_functional") and not name.startswith(("wait", "_wrap")):
            tensor = args[1 if name == "alltoall_base_" else 0]  # whose first argument is the output
            self.messages.append((name, tensor.nbytes))
        return op(*args, **(kwargs or {}))


# ---------------------------------------------------------------------------------------------------- context


def positions(attention: str) -> list[int]:
    """What this rank holds of a sequence of 24 tokens."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    with imported("context_parallel") as lesson, lesson.part_of_sequence(24, mesh, attention) as mine:
        return mine.tolist()


def context_work(layers: int) -> tuple[list[tuple[str, int]], int]:
    """One forward and backward of 3 sequences of 24: messages, and pairs of query and key that were computed."""
    config = ModelConfig(width=48, heads=6, kv_heads=2, ffn_width=48, layers=layers)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    model, pairs = Transformer(config), 0
    with imported("context_parallel") as lesson:
        attention = lesson.causal_attention

        def counted(query, key, *rest):
            nonlocal pairs
            pairs += query.shape[2] * key.shape[2]
            return attention(query, key, *rest)

        lesson.causal_attention = counted
        lesson.parallelize_context(model, mesh, "all_gather")
        tokens = torch.arange(72).view(3, 24)
        with lesson.part_of_sequence(24, mesh, "all_gather") as mine, Sent() as sent:
            model(tokens[:, mine], tokens[:, mine], mine).backward()
    return sent.messages, pairs


@starts_its_own_group
def train_in_a_ring(script: str, arguments: list[str]) -> int:
    """Train with `attention: ring` on the CPU: how often keys and values, or their gradients, went around.

    Torch's ring attention is a template for any kernel that also returns the logarithm of its sums, but it knows those
    of GPUs only. Here it gets the CPU's, and keeps fp64. All else, messages and merging included, is torch's own. Keys
    go around as on GPUs in bf16: not repeated for each group of heads.
    """
    takes_groups = common.transformer.takes_groups
    aten, sends = torch.ops.aten, 0
    forward_kernel = aten._scaled_dot_product_flash_attention_for_cpu.default
    backward_kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward.default

    def wrapped(mesh, tensors):
        return tuple(DTensor.from_local(tensor, mesh, [Shard(2)], run_check=False) for tensor in tensors)

    def forward(op, args, kwargs):
        query, key, value = (tensor.to_local() for tensor in args[:3])
        dropout, causal = args[3:5]
        mesh, options = args[0].device_mesh, {"dropout_p": dropout, "is_causal": causal, "scale": kwargs.get("scale")}
        group = mesh.get_group()
        return wrapped(
            mesh, torch_ring._templated_ring_attention(group, 2, forward_kernel, query, key, value, **options)
        )

    def backward(op, args, kwargs):
        mesh, (dropout, causal) = args[0].device_mesh, args[6:8]
        names = ("grad_out", "query", "key", "value", "out", "logsumexp")
        tensors = dict(zip(names, (tensor.to_local() for tensor in args[:6]), strict=True))
        options = {"dropout_p": dropout, "is_causal": causal, "scale": kwargs.get("scale"), "grad_out_name": "grad_out"}
        group = mesh.get_group()
        return wrapped(
            mesh, torch_ring._templated_ring_attention_backward(group, 2, backward_kernel, **tensors, **options)
        )

    def exchange(self, buffer):
        nonlocal sends
        sends += 1
        return exchange_buffers(self, buffer)

    exchange_buffers = torch_ring._AllToAllRotater.exchange_buffers
    torch_ring.custom_ops.update({forward_kernel: forward, backward_kernel: backward})
    torch_ring._cp_options.convert_to_f32 = False
    common.transformer.takes_groups = lambda *_: True
    torch_ring._AllToAllRotater.exchange_buffers = exchange
    try:
        with imported("context_settings") as settings:
            settings.choose_attention = lambda *_: "ring"
            train(script, arguments)
    finally:
        del torch_ring.custom_ops[forward_kernel], torch_ring.custom_ops[backward_kernel]
        torch_ring._cp_options.convert_to_f32 = True
        common.transformer.takes_groups = takes_groups
        torch_ring._AllToAllRotater.exchange_buffers = exchange_buffers
    return sends


# ----------------------------------------------------------------------------------------------------- expert


@starts_its_own_group
def train_lopsided(script: str, arguments: list[str]) -> set[int]:
    """Train a model whose routers choose the first half of the experts for every token: how many came to this rank.

    A router has no bias. So the embedding has a 1 in the first place of each token, which the residual stream keeps,
    and the routers look for it.
    """

    def lopsided(name, shape, config, seed):
        weight = initial_weight(name, shape, config, seed)
        if name == "embedding.weight":
            weight[:, 0] = 1.0
        if name.endswith("router.weight"):
            weight[:, 0] = torch.where(torch.arange(config.experts) < config.experts // 2, 1.0, -1.0)
        return weight

    arrivals = set()
    common.transformer.initial_weight = common.meta_device.initial_weight = lopsided
    try:
        with imported("expert_layers") as layers:
            compute = layers.ExpertParallel._compute

            def counted(self, arrived, *counts):
                if torch.is_grad_enabled():
                    arrivals.add(arrived.shape[0])
                return compute(self, arrived, *counts)

            layers.ExpertParallel._compute = counted
            train(script, arguments)
    finally:
        common.transformer.initial_weight = common.meta_device.initial_weight = initial_weight
    return arrivals


@starts_its_own_group
def train_and_count(script: str, arguments: list[str]) -> list[list[int]]:
    """Train: how many of this rank's tokens went to each expert in the last forward of a training step, by layer."""
    loads = []
    with imported("expert_layers") as layers:
        describe = layers.describe_load

        def noted(of):
            loads[:] = [layer.load.tolist() for layer in of]
            return describe(of)

        layers.describe_load = noted
        train(script, arguments)
    return loads


def expert_work(layers: int) -> tuple[list[tuple[str, int]], list[list[int]]]:
    """One forward and backward of 3 sequences of 24 on every rank: messages, and this rank's tokens by expert."""
    config = ModelConfig(preset="tiny_moe", width=48, heads=6, kv_heads=2, ffn_width=48, layers=layers, experts=12)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    with torch.device("meta"):
        model = Transformer(config)
    with imported("expert_layers") as lesson:
        for block in model.blocks.values():
            with torch.device("meta"):
                block.ffn = lesson.ExpertParallel(config, mesh, balanced=False)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = initial_weight(name, parameter.shape, config, 0)
            if isinstance(parameter, DTensor):
                whole = distribute_tensor(whole, mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(whole)
    tokens = torch.arange(72).view(3, 24) + 72 * dist.get_rank()
    reads, tolist = [], torch.Tensor.tolist
    torch.Tensor.tolist = lambda tensor: reads.append(tensor.shape) or tolist(tensor)
    try:
        with Sent() as sent:
            model(tokens, tokens).backward()
    finally:
        torch.Tensor.tolist = tolist
    # What makes the host wait for a GPU: values that are read, and operations that look for their result's size.
    assert len(reads) == layers and not sent.waits, (reads, sent.waits)
    return sent.messages, [block.ffn.load.tolist() for block in model.blocks.values()]
