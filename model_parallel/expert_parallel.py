"""Expert parallelism: every rank holds some experts of each layer; tokens travel to their experts, results come back.

    torchrun --nproc-per-node=2 model_parallel/expert_parallel.py         # a laptop: about a minute, loss < 2.5
    torchrun --nproc-per-node=4 model_parallel/expert_parallel.py --mesh.dp 2         # experts, and shards of experts
    SCRIPT=model_parallel/expert_parallel.py sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=64 \
        model_parallel/multi_node.sbatch --config model_parallel/configs/expert.yaml --train.steps 200

The whole difference to `fsdp/train.py`: the feed-forward layers send tokens where their experts are
(`expert_layers.py`), and experts are sharded among fewer ranks than all else, because each rank has others.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from expert_layers import ExpertParallel, describe_load
from expert_settings import ExpertConfig, expert_mesh
from mesh_settings import describe
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from common.config import parse
from common.data import text_datasets
from common.data_sharding import BatchPlan, Loader, evaluation_batches
from common.flops import explain, flops_per_token
from common.loss import count_valid
from common.meta_device import fill_shards
from common.optimizer import build_optimizer, learning_rate, set_learning_rate
from common.ranks import Ranks, join
from common.run import Run
from common.transformer import Transformer


@record  # torchrun then reports the rank that failed first, and why
def main(config: ExpertConfig) -> None:
    ranks = join(config.device, config.timeout_s, config.network_profile)
    mesh = expert_mesh(config, ranks)
    dp, ep = mesh.shape

    # ---- data: the batch of step N is a pure function of the seed and N
    train_set, validation_set = text_datasets(config.data, config.model.vocabulary)
    plan = BatchPlan(config.batch, len(train_set), config.seed, ranks.rank, ranks.world_size)
    loader = Loader(train_set, plan, ranks.device, config.data.workers)
    tokens_per_step = config.batch.global_size * config.data.sequence_length

    # ---- model: on the meta device its parameters have shapes and no memory
    with torch.device("meta"):
        model = Transformer(config.model)
    if config.train.precision == "fp64":
        model.double()
    # ---- the lesson: layers that hold some of the experts, and FSDP for what they leave
    layers = parallelize_experts(model, config, mesh["ep"])
    if config.train.activation_checkpointing:
        model.checkpoint_activations()
    if config.train.compile:
        model.compile_blocks()
    shard(model, config, mesh)
    model.to_empty(device=ranks.device)
    fill_shards(model, config.seed)

    # ---- optimizer; the scaler keeps small fp16 gradients from vanishing, and does nothing otherwise
    optimizer = build_optimizer(model.parameters(), config.optimizer, ranks.device)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.train.precision == "fp16")

    run = Run(config, ranks, "expert", units_per_step=tokens_per_step, fingerprint=train_set.fingerprint(),
              flops_per_unit=flops_per_token(config.model, config.data.sequence_length),
              mesh={"dp_shard": dp * ep, "ep": ep})  # fmt: skip
    ranks.print(describe(model))
    ranks.print(explain(config.model, config.data.sequence_length, ranks.device, config.train.precision))
    run.restore(model, optimizer, scaler)

    def validate() -> float:
        return evaluate(model, validation_set, plan.micro_size, ranks)

    # ---- training
    for step in run.steps(validate):  # goes on where the last checkpoint ended
        lr = learning_rate(step, config.train.steps, config.optimizer)
        set_learning_rate(optimizer, lr)
        loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
        for (tokens, targets), is_last in loader.micro_batches(step):
            # Until the last micro-batch gradients add up locally, whole: that saves messages and costs memory.
            model.set_requires_gradient_sync(is_last)
            micro_loss_sum = model(tokens, targets)  # a sum over tokens, not a mean
            to_learn = micro_loss_sum
            if config.balance:  # a sum over tokens, too
                to_learn = micro_loss_sum + config.balance * sum(layer.balance_loss for layer in layers)
            # Dividing by the tokens of the *global* batch makes the gradient the same for any accumulation; FSDP
            # was told to sum over the ranks, so nothing else is divided.
            scaler.scale(to_learn / tokens_per_step).backward()
            loss_sum += micro_loss_sum.detach()
        scaler.unscale_(optimizer)
        grad_norm = clip_grad_norm(model.parameters(), config.optimizer.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        run.log(step, loss_sum, grad_norm, lr)  # read one step late: the loop never waits for the device
        if step % config.train.log_every == 0 or run.wants_evaluation(step):
            ranks.print(describe_load(layers))
        run.end_step(step, model, optimizer, scaler)  # saves; after that, `steps` evaluates
    run.finish()
    ranks.leave()  # a barrier, then the end of the process group


def parallelize_experts(model: Transformer, config: ExpertConfig, mesh: DeviceMesh) -> list[ExpertParallel]:
    """Cut the experts of each layer among the ranks of `mesh`, in place; returns the layers that hold them."""
    layers = []
    for block in model.blocks.values():
        with torch.device("meta"):
            block.ffn = ExpertParallel(config.model, mesh, balanced=config.balance > 0).to(block.ffn.gate.dtype)
        layers.append(block.ffn)
    return layers


def shard(model: Transformer, config: ExpertConfig, mesh: DeviceMesh) -> None:
    """Shard what the cut has left of everything (FSDP), in place.

    Every rank has tokens of its own, so all but experts is sharded among all ranks. An expert stands on dp ranks only,
    each in another group of ep: these share its rows. Its gradient has in it all tokens of its group that came to it,
    and FSDP adds those of the other groups. FSDP would average, over dp ranks here and over all ranks elsewhere: two
    scales. So it shall sum everywhere, and the loss alone is divided, by the tokens of the global batch.
    """
    # Low precision to gather and compute with, fp32 for shards and for sums over the ranks, as in fsdp/train.py.
    low_precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.train.precision)
    policy = MixedPrecisionPolicy(
        param_dtype=low_precision, reduce_dtype=low_precision and torch.float32, cast_forward_inputs=False
    )
    all_ranks = mesh._flatten("dp_ep")  # no public name yet: torchtitan calls it, too
    for block in model.blocks.values():
        fully_shard(block.ffn.router, mesh=all_ranks, mp_policy=policy)
        # Along the rows of each expert: along the experts there may be fewer than shards.
        fully_shard(block.ffn, mesh=mesh["dp"], mp_policy=policy, shard_placement_fn=lambda _: Shard(1))
        fully_shard(block, mesh=all_ranks, mp_policy=policy)
    fully_shard(model, mesh=all_ranks, mp_policy=policy)
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # a plain sum: Gloo has none that scales


def clip_grad_norm(parameters: Iterable[torch.nn.Parameter], largest: float) -> torch.Tensor:
    """The norm of all gradients, which are scaled, in place, to a norm of at most `largest`.

    torch's `clip_grad_norm_` refuses DTensors of different meshes side by side. Placements tell how each is cut, so the
    norm of either kind counts every number once.
    """
    kinds: dict[DeviceMesh, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault(parameter.device_mesh, []).append(parameter)
    norms = [get_total_norm([p.grad for p in kind]).full_tensor() for kind in kinds.values()]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for kind in kinds.values():
        clip_grads_with_norm_(kind, largest, norm)
    return norm


@torch.no_grad()
def evaluate(model: Transformer, dataset, batch_size: int, ranks: Ranks) -> float:
    """Mean loss per token over the validation set: the sum of all losses divided by the count of all tokens."""
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # loss, tokens
    place = ranks.rank, ranks.world_size
    # A forward gathers parameters: ranks with fewer samples join in with batches that do not count.
    for tokens, targets in evaluation_batches(dataset, batch_size, ranks.device, *place, equal_batches=True):
        sums += torch.stack([model(tokens, targets).double(), count_valid(targets)])
    dist.all_reduce(sums)  # ranks may have had different numbers of samples: sums, never a mean of means
    loss, count = sums.tolist()
    return loss / count


if __name__ == "__main__":
    main(parse(ExpertConfig))
