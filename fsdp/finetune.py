"""Fine-tune a language model of `transformers` to answer questions: FSDP, all weights or LoRA.

    torchrun --nproc-per-node=2 fsdp/finetune.py                          # a laptop: a tiny model, a minute
    torchrun --nproc-per-node=2 fsdp/finetune.py --lora.rank 8            # adapters alone are trained
    torchrun --nproc-per-node=8 fsdp/finetune.py --config fsdp/configs/finetune_lora.yaml --train.steps 200 \\
        --model_path /path/to/model

What differs from `fsdp/train.py`: rank 0 reads the weights and gives each rank its shards; only the answers' tokens
count, so that each rank has another number of them; and the model is judged by answers that it generates.
"""

import torch
import torch.distributed as dist
from finetune_settings import (
    ShardedFinetuneConfig,
    TrainableState,
    blocks_of,
    build_model,
    describe_trained,
    export,
    frozen_weights_digest,
)
from settings import describe, mesh_shape, set_prefetch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.utils import clip_grad_norm_

from common.config import parse
from common.data_sharding import BatchPlan, Loader
from common.loss import count_valid
from common.optimizer import build_optimizer, learning_rate, set_learning_rate
from common.ranks import Ranks, join
from common.run import Run
from finetuning.answers import answer_all, evaluate, print_answers, token_loss
from finetuning.models import load_hf_config
from finetuning.scores import score
from finetuning.squad import question_sets
from finetuning.tokens import QuestionDataset, load_tokenizer


@record  # torchrun then reports the rank that failed first, and why
def main(config: ShardedFinetuneConfig) -> None:
    ranks = join(config.device, config.timeout_s, config.network_profile)

    # ---- data: prompt and answer are one sequence, and only the answer's tokens are targets
    length = config.data.sequence_length
    hf_config = load_hf_config(config.model_path, length)
    tokenizer = load_tokenizer(config.model_path, hf_config)
    questions, validation_questions = question_sets(config.data)
    train_set = QuestionDataset(questions, tokenizer, length, training=True)
    validation_set = QuestionDataset(validation_questions, tokenizer, length, training=False)
    plan = BatchPlan(config.batch, len(train_set), config.seed, ranks.rank, ranks.world_size)
    loader = Loader(train_set, plan, ranks.device)

    # ---- model: on the meta device its parameters have shapes and no memory
    with torch.device("meta"):
        model = build_model(config, hf_config, read=False)
    if config.train.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})

    # ---- the lesson: blocks are units as ever, adapters in those of their layers; frozen parameters are sharded and
    # gathered too, but have no gradient to reduce. Tied embedding and head are both left to the model's own unit.
    copies, shards = mesh_shape(config.fsdp, ranks)
    mesh = init_device_mesh(ranks.device.type, (copies, shards), mesh_dim_names=("dp_replicate", "dp_shard"))
    low_precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.train.precision)
    policy = MixedPrecisionPolicy(
        param_dtype=low_precision, reduce_dtype=low_precision and torch.float32, cast_forward_inputs=False
    )
    offload = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda") if config.fsdp.cpu_offload else OffloadPolicy()
    blocks = blocks_of(model)
    for unit in (*blocks, model):
        fully_shard(
            unit,
            mesh=mesh if copies > 1 else mesh["dp_shard"],
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=None if config.fsdp.reshard_after_forward else False,  # None: all but the root
        )
    set_prefetch(blocks, config.fsdp.prefetch)
    model.to_empty(device="cpu" if config.fsdp.cpu_offload else ranks.device)
    digest = read_and_shard(model, config, hf_config, ranks)

    # ---- optimizer; the scaler keeps small fp16 gradients from vanishing, and does nothing otherwise
    optimizer = build_optimizer(model.parameters(), config.optimizer, ranks.device)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.train.precision == "fp16")

    run = Run(config, ranks, "fsdp", units_per_step=config.batch.global_size, unit="samples",
              mesh={"dp_replicate": copies, "dp_shard": shards},
              fingerprint=train_set.fingerprint())  # fmt: skip
    ranks.print(f"training:   {train_set.describe()}\nvalidation: {validation_set.describe()}")
    ranks.print(f"{describe(model, policy)}\n{describe_trained(model)}")
    trained = TrainableState(model, digest)  # frozen weights are not saved, but read again
    run.restore(trained, optimizer, scaler)
    trained.check_frozen_weights()

    answers: list[str] = []  # of the last evaluation

    def validate() -> dict[str, float]:
        loss = evaluate(model, validation_set, plan.micro_size, ranks)
        # A rank whose answers have ended goes on calling the model, which gathers, until all ranks are done.
        synced = ranks.world_size > 1
        answers[:] = answer_all(model, validation_questions, tokenizer, config.data, plan.micro_size, ranks, synced)
        exact, f1 = score(answers, validation_questions)
        return {"val_loss": loss, "exact_match": exact, "f1": f1}

    # ---- training
    for step in run.steps(validate):  # goes on where the last checkpoint ended
        lr = learning_rate(step, config.train.steps, config.optimizer)
        set_learning_rate(optimizer, lr)
        loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
        micro_batches = list(loader.micro_batches(step))
        # Answers differ in length: the tokens of the *global* batch are known only when all ranks have added theirs.
        # The mean of the ranks' means would give tokens of a rank with short answers more weight than others'.
        valid = count_tokens(micro_batches)
        for (tokens, targets), is_last in micro_batches:
            # Until the last micro-batch gradients add up locally, whole: that saves messages and costs memory.
            model.set_requires_gradient_sync(is_last)
            micro_loss_sum = token_loss(model, tokens, targets)  # a sum over tokens, not a mean
            # FSDP averages over the ranks where the global batch wants the sum, hence the world size.
            scaler.scale(micro_loss_sum * ranks.world_size / valid).backward()
            loss_sum += micro_loss_sum.detach()
        scaler.unscale_(optimizer)
        grad_norm = clip_grad_norm_(model.parameters(), config.optimizer.clip).full_tensor()  # of all shards
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        run.log(step, loss_sum / valid * config.batch.global_size, grad_norm, lr)  # `run` divides by the samples
        run.end_step(step, trained, optimizer, scaler)  # saves; after that, `steps` evaluates
    if run.is_complete and answers:
        print_answers(ranks, answers, validation_questions, questions)
    if config.export and run.is_complete:  # also when it ended before it could be written
        write(model, tokenizer, config, hf_config, run, ranks)
    run.finish()
    ranks.leave()  # a barrier, then the end of the process group


def read_and_shard(model: nn.Module, config: ShardedFinetuneConfig, hf_config, ranks: Ranks) -> int:
    """Let rank 0 read (or draw) the weights and send them, one after the other; each rank keeps its shards.

    Until all are sent, rank 0's host memory holds the whole model, 4 bytes a parameter. The other ranks hold their
    shards and one whole parameter.

    Returns:
        The digest of the frozen weights, for the checkpoints.
    """
    whole, problem = None, None
    if ranks.is_main:
        try:
            whole = build_model(config, hf_config, read=True)
        except Exception as error:  # whatever a damaged file makes the library raise
            problem = f"model_path = {config.model_path}: the weights cannot be used ({error}); fetch the files again"
    ranks.fail_together(problem)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole.state_dict() if whole else {}, options=options)
    # No state dict holds the tables of rotary angles and the like, and `to_empty` has left them with any values.
    for name, buffer in model.named_buffers():
        value = whole.get_buffer(name).to(ranks.device) if whole else torch.empty_like(buffer, device=ranks.device)
        dist.broadcast(value, src=0)
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, value)
    return ranks.broadcast(frozen_weights_digest(whole, config) if whole else None)


def count_tokens(micro_batches: list) -> Tensor:
    """Targets that count in all micro-batches of all ranks: a scalar int64; the one small all-reduce before a step."""
    valid = torch.stack([count_valid(targets) for (_, targets), _ in micro_batches]).sum()
    dist.all_reduce(valid)
    return valid


def write(model: nn.Module, tokenizer, config: ShardedFinetuneConfig, hf_config, run: Run, ranks: Ranks) -> None:
    """Gather what was trained in rank 0's host memory, and write it in the format of transformers or peft."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=bool(config.lora.rank))
    weights = get_model_state_dict(model, options=options)  # collective: all ranks call it, rank 0 gets it all
    folder, problem = run.folder / "exported", None
    if ranks.is_main:
        try:
            export(weights, tokenizer, config, hf_config, folder)
        except OSError as error:
            problem = f"{folder}: {error.strerror}; the checkpoint is untouched"
    ranks.fail_together(problem)
    ranks.print(f"exported to {folder}")


if __name__ == "__main__":
    main(parse(ShardedFinetuneConfig))
