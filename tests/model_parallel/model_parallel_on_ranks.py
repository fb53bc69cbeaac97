"""What the ranks of a `group` run for the tests of model_parallel/."""

import importlib
import importlib.util
import runpy
import sys
from pathlib import Path

import scripts_on_ranks
import torch
import torch.distributed as dist
from own_folder import own_folder
from rank_worker import starts_its_own_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor, parallel
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ParallelStyle, loss_parallel

from common.ranks import Ranks
from common.transformer import ModelConfig, Transformer, initial_weight

ROOT = Path(__file__).resolve().parent.parent.parent


def collectives(sequence_parallel: bool, tied: bool, layers: int) -> dict[str, int]:
    """The collectives of one forward and backward under the lesson's plan, by name."""
    script = ROOT / "model_parallel" / "tensor_parallel.py"
    with own_folder(script):
        spec = importlib.util.spec_from_file_location("lesson_of_tensors", script)
        lesson = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(lesson)
    config = ModelConfig(width=48, heads=12, kv_heads=12, ffn_width=48, vocabulary=264, layers=layers, tied=tied)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    with torch.device("meta"):
        model = Transformer(config)
    lesson.tensor_parallelize(model, mesh["tp"], sequence_parallel)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = initial_weight(name, parameter.shape, config, 0)
            parameter.copy_(distribute_tensor(whole, mesh, parameter.placements, src_data_rank=None))
    tokens = torch.arange(48).view(2, 24)
    with CommDebugMode() as sent, loss_parallel():
        model(tokens, tokens).backward()
    return {str(op).removeprefix("c10d_functional."): count for op, count in sent.get_comm_counts().items()}


def meshes() -> dict[str, list]:
    """Return which rank stands where, on each lesson's mesh of 4 ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    ranks = Ranks(rank, size, rank, size, "torchrun", torch.device("cpu"))
    with own_folder(ROOT / "model_parallel" / "mesh_settings.py"):
        of_tensors = importlib.import_module("mesh_settings")
        of_context = importlib.import_module("context_settings")
        of_experts = importlib.import_module("expert_settings")
        tensor, context, expert = of_tensors.TensorConfig(), of_context.ContextConfig(), of_experts.ExpertConfig()
        for config in tensor, context, expert:
            config.mesh.dp = 2
        made = {
            "tensor": of_tensors.tensor_mesh(tensor, ranks),
            "context": of_context.context_mesh(context, ranks),
            "expert": of_experts.expert_mesh(expert, ranks),
            "hybrid": of_tensors.hybrid_mesh(of_tensors.HybridConfig(), ranks),
        }
    return {name: mesh.mesh.tolist() for name, mesh in made.items()}


@starts_its_own_group
def ends_with_replicated_norms(arguments: list[str]) -> tuple[int, str]:
    """How tensor_parallel.py ends where norms take their part of the sequence for the whole: the lesson's mistake."""

    class Replicated(ParallelStyle):
        def _apply(self, module, mesh):
            def enter(_, inputs, mesh):
                return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)

            return distribute_module(module, mesh, None, enter, lambda _, output, mesh: output.to_local())

    right = parallel.SequenceParallel
    parallel.SequenceParallel = Replicated
    try:
        return scripts_on_ranks.ends("model_parallel/tensor_parallel.py", arguments)
    finally:
        parallel.SequenceParallel = right


@starts_its_own_group
def recorded(arguments: list[str]) -> list[tuple[str, int, int]]:
    """Train with the pipeline script; what this rank did: (F, B, I or W; stage; micro-batch), in order."""
    actions = []
    originals = {name: getattr(PipelineStage, name) for name in ("forward_one_chunk", "backward_one_chunk")}
    originals["backward_weight_one_chunk"] = PipelineStage.backward_weight_one_chunk

    def note(stage, kind, number):
        if stage.has_backward:  # in an evaluation backwards are called, too, and return at once
            actions.append((kind, stage.stage_index, number))

    def forward(self, number, *rest, **options):
        note(self, "F", number)
        return originals["forward_one_chunk"](self, number, *rest, **options)

    def backward(self, number, *rest, full_backward=True, **options):
        note(self, "B" if full_backward else "I", number)
        return originals["backward_one_chunk"](self, number, *rest, full_backward=full_backward, **options)

    def weight(self, number, *rest, **options):
        note(self, "W", number)
        return originals["backward_weight_one_chunk"](self, number, *rest, **options)

    for name, replacement in zip(originals, (forward, backward, weight), strict=True):
        setattr(PipelineStage, name, replacement)
    script = ROOT / "model_parallel" / "pipeline_parallel.py"
    sys.argv = [str(script), *arguments]
    try:
        with own_folder(script):
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        for name, original in originals.items():
            setattr(PipelineStage, name, original)
    return actions
