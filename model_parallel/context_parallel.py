"""Context parallelism: every rank holds a part of each sequence; queries stay, and keys and values come to them.

    torchrun --nproc-per-node=2 model_parallel/context_parallel.py        # a laptop: about a minute, loss < 2.5
    torchrun --nproc-per-node=4 model_parallel/context_parallel.py --mesh.dp 2           # parts of different samples
    SCRIPT=model_parallel/context_parallel.py sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=64 \
        model_parallel/multi_node.sbatch --config model_parallel/configs/context.yaml --train.steps 200

The whole difference to `fsdp/train.py`: ranks of one context group see the same samples, and of each sequence their
part, with its positions; attention fetches the keys and values of the other parts. All else works token by token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from context_settings import ContextConfig, choose_attention, context_mesh
from mesh_settings import describe
from torch import Tensor
from torch.distributed._functional_collectives import all_gather_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import set_rotate_method
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import clip_grad_norm_

from common.config import parse
from common.data import text_datasets
from common.data_sharding import BatchPlan, Loader, evaluation_batches
from common.flops import explain, flops_per_token
from common.loss import count_valid
from common.meta_device import fill_shards
from common.optimizer import build_optimizer, learning_rate, set_learning_rate
from common.ranks import join
from common.run import Run
from common.transformer import Transformer, causal_attention


@record  # torchrun then reports the rank that failed first, and why
def main(config: ContextConfig) -> None:
    ranks = join(config.device, config.timeout_s, config.network_profile)
    mesh, attention = context_mesh(config, ranks), choose_attention(config, ranks)
    dp, cp = mesh.shape

    # ---- data: the batch of step N is a pure function of the seed and N
    train_set, validation_set = text_datasets(config.data, config.model.vocabulary)
    plan = BatchPlan(config.batch, len(train_set), config.seed, mesh["dp"].get_local_rank(), dp)
    loader = Loader(train_set, plan, ranks.device, config.data.workers)
    tokens_per_step = config.batch.global_size * config.data.sequence_length

    # ---- model: on the meta device its parameters have shapes and no memory
    with torch.device("meta"):
        model = Transformer(config.model)
    if config.train.precision == "fp64":
        model.double()
    # ---- the lesson: attention over parts of sequences. For weights every rank is a data-parallel one, whatever its
    # tokens: FSDP shards over all ranks, dp × cp as one axis.
    parallelize_context(model, mesh["cp"], attention)
    if config.train.activation_checkpointing:
        model.checkpoint_activations()
    if config.train.compile:
        model.compile_blocks()
    # Low precision to gather and compute with, fp32 for shards and for sums over the ranks, as in fsdp/train.py.
    low_precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.train.precision)
    policy = MixedPrecisionPolicy(
        param_dtype=low_precision, reduce_dtype=low_precision and torch.float32, cast_forward_inputs=False
    )
    all_ranks = mesh._flatten("dp_cp")  # no public name yet: torchtitan calls it, too
    for unit in (*model.blocks.values(), model):
        fully_shard(unit, mesh=all_ranks, mp_policy=policy)
    model.to_empty(device=ranks.device)
    fill_shards(model, config.seed)

    # ---- optimizer; the scaler keeps small fp16 gradients from vanishing, and does nothing otherwise
    optimizer = build_optimizer(model.parameters(), config.optimizer, ranks.device)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.train.precision == "fp16")

    run = Run(config, ranks, "context", units_per_step=tokens_per_step, fingerprint=train_set.fingerprint(),
              flops_per_unit=flops_per_token(config.model, config.data.sequence_length),
              mesh={"dp_shard": dp, "cp": cp})  # fmt: skip
    ranks.print(
        f"{attention} attention: {config.data.sequence_length // cp} of {config.data.sequence_length} tokens a rank"
    )
    ranks.print(describe(model))
    ranks.print(explain(config.model, config.data.sequence_length, ranks.device, config.train.precision))
    run.restore(model, optimizer, scaler)

    def validate() -> float:
        return evaluate(model, validation_set, plan.micro_size, mesh, attention)

    # ---- training
    for step in run.steps(validate):  # goes on where the last checkpoint ended
        lr = learning_rate(step, config.train.steps, config.optimizer)
        set_learning_rate(optimizer, lr)
        loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
        for (tokens, targets), is_last in loader.micro_batches(step):
            # Until the last micro-batch gradients add up locally, whole: that saves messages and costs memory.
            model.set_requires_gradient_sync(is_last)
            with part_of_sequence(tokens.shape[1], mesh["cp"], attention) as mine:  # backward too
                # A sum over the tokens of this rank; their positions decide what they see.
                micro_loss_sum = model(tokens[:, mine], targets[:, mine], mine)
                # Dividing by the tokens of the *global* batch makes the gradient the same for any accumulation; FSDP
                # averages over the ranks where the global batch wants the sum, hence the world size.
                scaler.scale(micro_loss_sum * ranks.world_size / tokens_per_step).backward()
            loss_sum += micro_loss_sum.detach()
        scaler.unscale_(optimizer)
        grad_norm = clip_grad_norm_(model.parameters(), config.optimizer.clip).full_tensor()  # of all shards
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        run.log(step, loss_sum, grad_norm, lr)  # read one step late: the loop never waits for the device
        run.end_step(step, model, optimizer, scaler)  # saves; after that, `steps` evaluates
    run.finish()
    ranks.leave()  # a barrier, then the end of the process group


def parallelize_context(model: Transformer, mesh: DeviceMesh, attention: str) -> None:
    """Let the model, in place, take parts of sequences; `from_scratch/context_parallel.py` has a ring by hand.

    ring: nothing to do here. Inside `part_of_sequence` torch's ring attention (arXiv 2310.01889) takes the place of
    the function that the model calls. Its default gathers all keys and values at once; here they shall travel.
    """
    if attention == "ring":
        set_rotate_method("alltoall")
        return
    for block in model.blocks.values():
        block.attention.attend = gathering_attention(mesh)


@contextmanager
def part_of_sequence(length: int, mesh: DeviceMesh, attention: str) -> Iterator[Tensor]:
    """The positions that this rank holds of sequences of `length`: (length / cp,) int64. For `ring`, all that has to do
    with the model happens inside, and so does whatever uses the positions: afterwards they are the whole sequence's.

    A causal query sees what lies before it, so plain parts would be unfair: the last rank's queries see all keys, the
    first one's 1/n of them. Rank r of n takes the pieces r and 2n - 1 - r of 2n: together all ranks see equally much.
    """
    positions = torch.arange(length, device=mesh.device_type)
    if attention == "ring":
        # Torch cuts in just that way. cuDNN's kernel, which newer GPUs would prefer, is the less tried one in the ring.
        kernels = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])
        with kernels, context_parallel(mesh, buffers=[positions], buffer_seq_dims=[0]):
            yield positions
    else:
        yield torch.cat([positions.chunk(2 * mesh.size())[number] for number in pieces(mesh)])


def pieces(mesh: DeviceMesh) -> tuple[int, int]:
    """Which two of the 2n pieces of every sequence are this rank's."""
    return mesh.get_local_rank(), 2 * mesh.size() - 1 - mesh.get_local_rank()


def gathering_attention(mesh: DeviceMesh) -> Callable[..., Tensor]:
    """A causal attention for `Attention.attend`: (batch, heads, sequence / n, head_size) in and out, on every rank.

    Keys and values of the whole sequence are all-gathered, as Llama 3 was trained (arXiv 2407.21783, section 3.3.2);
    backward, torch reduce-scatters their gradients. With few key-value heads that is little beside the queries, which
    stay. It takes the memory of one layer's keys and values, whole and repeated for each group of heads, where a ring
    takes that of two parts; and a mask of up to s²/2n bytes. So it is for short sequences, and for proofs.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            raise ValueError("this attention is causal and takes no mask; expected mask=None; train without a KV cache")
        gathered = all_gather_single_autograd(torch.stack((key, value)), 0, mesh.get_group())
        early, late = gathered.unflatten(0, (mesh.size(), 2)).chunk(2, dim=-2)  # of all ranks: (n, 2, batch, …)
        keys, values = torch.cat((*early, *late.flip(0)), dim=-2)  # in the order of the sequence
        outputs = []
        for queries, number in zip(query.chunk(2, dim=2), pieces(mesh), strict=True):
            # What lies after the piece is left out, not masked: that is where the balance comes from.
            size, seen = queries.shape[2], (number + 1) * queries.shape[2]
            causal = torch.ones(size, seen, dtype=torch.bool, device=query.device).tril(seen - size)
            outputs.append(causal_attention(queries, keys[:, :, :seen], values[:, :, :seen], causal))
        return torch.cat(outputs, dim=2)

    return attend


@torch.no_grad()
def evaluate(model: Transformer, dataset, batch_size: int, mesh: DeviceMesh, attention: str) -> float:
    """Mean loss per token over the validation set: the sum of all losses divided by the count of all tokens."""
    device = torch.device(mesh.device_type)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, tokens
    place = mesh["dp"].get_local_rank(), mesh["dp"].size()
    # A forward communicates: ranks with fewer samples join in with batches that do not count.
    for tokens, targets in evaluation_batches(dataset, batch_size, device, *place, equal_batches=True):
        with part_of_sequence(tokens.shape[1], mesh["cp"], attention) as mine:
            tokens, targets = tokens[:, mine], targets[:, mine]
            sums += torch.stack([model(tokens, targets, mine).double(), count_valid(targets)])
    dist.all_reduce(sums)  # ranks may have had different numbers of samples: sums, never a mean of means
    loss, count = sums.tolist()
    return loss / count


if __name__ == "__main__":
    main(parse(ContextConfig))
