"""The checks of tools/gpu_check.py: commands of the lessons, each small, and the presets whose speed counts."""

import math
import shlex
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One command: its ranks, its time limit, and between which sizes of the GPU's memory it runs."""

    name: str
    command: str
    ranks: int = 1
    timeout_s: float = 120.0
    memory_gb: float = 0.0
    below_gb: float = math.inf
    only_on_gpus: bool = False

    @property
    def words(self) -> list[str]:
        """The command as it is started: plain python for one rank, torchrun for several."""
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}"]
        return [sys.executable, *(launch if self.ranks > 1 else []), *shlex.split(self.command)]


STEPS = "--train.steps 12 --batch.global_size 24"
TINY = f"{STEPS} --train.precision bf16"
GPT = (
    "ddp/single_device.py --config ddp/configs/gpt_124m.yaml --train.steps 24 --train.log_every 8 "
    "--data.validation_samples 60 --checkpoint.every 0 --batch.global_size 60 --batch.micro_size"
)
LLAMA = (
    "fsdp/train.py --config fsdp/configs/llama_1b.yaml --train.steps 8 --train.log_every 2 --batch.global_size 2 "
    "--data.validation_samples 2 --checkpoint.every 0"
)
LOSS = "benchmarks/head_loss.py --precision bf16"
BY_HAND = f"from_scratch/train.py {TINY} --strategy"
PIPELINE = "model_parallel/pipeline_parallel.py --batch.micro_size 3"
LIGHTNING = f"lightning/train.py {TINY} --devices 1 --strategy"
DEEPSPEED = f"deepspeed/train.py {TINY} --deepspeed_config deepspeed/configs"
STAGES = ("zero1", "zero2", "zero3", "zero2_cpu_offload_pinned_memory", "zero3_cpu_offload")

SPEED = (
    Check("speed_facts", "tools/gpu_facts.py", only_on_gpus=True),
    Check("speed_loss_124m", f"{LOSS} --tokens 16384 --width 768 --chunk 4096", memory_gb=20),
    Check("speed_loss_1b", f"{LOSS} --tokens 8192 --width 2048 --vocabulary 128256 --chunk 2048", memory_gb=40),
    Check("speed_124m_micro_60", f"{GPT} 60", memory_gb=120),
    Check("speed_124m_micro_15", f"{GPT} 15", memory_gb=38),
    Check("speed_124m_micro_5", f"{GPT} 5", memory_gb=14, below_gb=38),
    Check("speed_124m_eager", f"{GPT} 15 --train.compile false", memory_gb=38),
    Check("speed_1b", f"{LLAMA} --batch.micro_size 2", memory_gb=70),
    Check("speed_1b_recomputed", f"{LLAMA} --batch.micro_size 2 --train.activation_checkpointing true", memory_gb=38),
)
ONE = (
    Check("one_tests", "-m pytest -q -p no:cacheprovider tests/ddp/test_gpu.py", timeout_s=150, only_on_gpus=True),
    Check("one_ddp_fp16_compiled", f"ddp/train.py {STEPS} --train.precision fp16 --train.compile true"),
    Check("one_ddp_recomputed", f"ddp/train.py {TINY} --train.activation_checkpointing true --train.compile true"),
    Check("one_ddp_tf32", f"ddp/train.py {STEPS} --train.tf32 true", only_on_gpus=True),
    Check("one_vision", "ddp/train_vision.py --train.steps 12 --train.precision bf16 --train.compile true"),
    Check("one_vision_syncbn", "ddp/train_vision.py --train.steps 12 --model.sync_batchnorm true", only_on_gpus=True),
    Check("one_fsdp", f"fsdp/train.py {TINY} --config fsdp/configs/mixed_precision.yaml"),
    Check("one_fsdp_offload", f"fsdp/train.py {TINY} --fsdp.cpu_offload true"),
    Check("one_fsdp_fp16", f"fsdp/train.py {STEPS} --train.precision fp16"),
    Check("one_finetune", "fsdp/finetune.py --train.steps 6 --train.precision bf16 --lora.rank 8"),
    Check("one_tensor", f"model_parallel/tensor_parallel.py {TINY} --train.compile true"),
    Check("one_expert", f"model_parallel/expert_parallel.py {TINY} --balance 0.01"),
    *(Check(f"one_hand_{n}", f"{BY_HAND} {n}") for n in ("bucket", "zero1", "zero2", "fsdp", "tensor", "context")),
    *(Check(f"one_lightning_{name}", f"{LIGHTNING} {name}") for name in ("ddp", "fsdp")),
    Check("one_lightning_deepspeed", f"{LIGHTNING} deepspeed", only_on_gpus=True),
    Check("one_fabric", f"lightning/fabric_loop.py {TINY} --devices 1"),
    *(Check(f"one_deepspeed_{stage}", f"{DEEPSPEED}/{stage}.json") for stage in STAGES),
)
RANKS = (
    Check("ranks_collectives", "collectives/collective_ops.py", 3),
    Check("ranks_point_to_point", "collectives/point_to_point.py", 3),
    Check("ranks_bandwidth", "collectives/bandwidth.py --sizes 64K,64M --repeats 3", 2),
    Check("ranks_ddp", f"ddp/train.py {TINY} --train.compile true", 2),
    Check("ranks_fsdp", f"fsdp/train.py {TINY} --config fsdp/configs/mixed_precision.yaml", 2),
    Check("ranks_hsdp", f"fsdp/train.py {TINY} --fsdp.replicate 2", 4),
    Check("ranks_tensor", f"model_parallel/tensor_parallel.py {TINY}", 2),
    Check("ranks_pipeline", f"{PIPELINE} {TINY}", 2),
    Check("ranks_interleaved", f"{PIPELINE} {TINY} --schedule interleaved", 2),
    Check("ranks_zero_bubble", f"{PIPELINE} {STEPS} --schedule zero_bubble", 2),
    Check("ranks_ring", f"model_parallel/context_parallel.py {TINY}", 2),
    Check("ranks_expert", f"model_parallel/expert_parallel.py {TINY}", 2),
    Check("ranks_hybrid", f"model_parallel/hybrid_parallel.py {TINY} --batch.micro_size 3", 8),
    Check("ranks_hand_fsdp", f"{BY_HAND} fsdp", 2),
    Check("ranks_hand_context", f"{BY_HAND} context", 2),
    Check("ranks_hand_1f1b", f"{BY_HAND} pipeline --batch.micro_size 3", 2),
    # Messages of 48 × 128 × 2048 fp32 numbers, 50 MB: more than NCCL buffers, so that a wrong order waits forever.
    Check("ranks_hand_interleaved_50mb", "from_scratch/train.py --strategy pipeline --schedule interleaved "
          "--stages_per_rank 2 --train.steps 6 --batch.global_size 192 --batch.micro_size 48 --model.width 2048 "
          "--model.heads 16 --model.kv_heads 16 --timeout_s 60", 2, memory_gb=38, only_on_gpus=True),
    Check("ranks_deepspeed", f"{DEEPSPEED}/zero3.json", 2),
)  # fmt: skip
CHECKS = SPEED + ONE + RANKS
