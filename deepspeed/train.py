"""DeepSpeed: its engine wraps model and optimizer; ZeRO cuts up what every rank of DDP keeps whole, by a JSON file.

    torchrun --nproc-per-node=2 deepspeed/train.py                        # a laptop: about a minute, loss < 2.5
    deepspeed --num_gpus=4 deepspeed/train.py --deepspeed_config deepspeed/configs/zero2.json        # four GPUs
    sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 deepspeed/multi_node.sbatch \\
        --deepspeed_config deepspeed/configs/zero3.json

The whole difference to `ddp/train.py`: the model is born in parts where stage 3 wants it, precision and clipping are
DeepSpeed's, and the engine counts the micro-batches: it reduces, clips, steps and zeroes when the last one is done.
"""

import torch
import torch.distributed as dist
from environment import deepspeed
from settings import DeepSpeedConfig, cpu_adam_if_offloaded, describe, engine_config, record_grad_norm, start_deepspeed
from torch.distributed.elastic.multiprocessing.errors import record
from zero_state import checkpointable

from common.config import parse
from common.data import text_datasets
from common.data_sharding import BatchPlan, Loader, evaluation_batches
from common.flops import explain, flops_per_token
from common.loss import count_valid
from common.optimizer import build_optimizer, learning_rate, set_learning_rate
from common.ranks import Ranks, join
from common.run import Run
from common.transformer import Transformer, initial_weight


@record  # torchrun then reports the rank that failed first, and why
def main(config: DeepSpeedConfig) -> None:
    ranks = join(config.device, config.timeout_s, config.network_profile)
    start_deepspeed(ranks)  # takes the process group that is there

    # ---- data: the batch of step N is a pure function of the seed and N
    train_set, validation_set = text_datasets(config.data, config.model.vocabulary)
    plan = BatchPlan(config.batch, len(train_set), config.seed, ranks.rank, ranks.world_size)
    loader = Loader(train_set, plan, ranks.device, config.data.workers)
    tokens_per_step = config.batch.global_size * config.data.sequence_length

    # ---- model: in stage 3 each parameter is cut up as soon as it is made, and no rank ever holds the whole model
    settings = engine_config(config, plan, ranks)
    stage = settings["zero_optimization"]["stage"]
    with deepspeed.zero.Init(config_dict_or_path=settings, enabled=stage == 3):
        model = Transformer(config.model)
    if config.train.activation_checkpointing:
        model.checkpoint_activations()
    if config.train.compile:
        model.compile_blocks()
    initialize(model, config)

    # ---- the lesson: the engine takes model and optimizer. What it does with them stands in the JSON file: nothing
    # is cut up in stage 0; the optimizer's state in 1, gradients too in 2, parameters too in 3.
    optimizer = cpu_adam_if_offloaded(build_optimizer(model.parameters(), config.optimizer, ranks.device), settings)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    record_grad_norm(engine)
    state = checkpointable(engine, optimizer)

    run = Run(config, ranks, f"zero{stage}", units_per_step=tokens_per_step, fingerprint=train_set.fingerprint(),
              flops_per_unit=flops_per_token(config.model, config.data.sequence_length),
              framework="deepspeed", mesh={"dp_shard" if stage else "dp_replicate": ranks.world_size})  # fmt: skip
    ranks.print(explain(config.model, config.data.sequence_length, ranks.device, config.train.precision))
    run.restore(state, optimizer)

    def validate() -> float:
        return evaluate(engine, validation_set, plan.micro_size, ranks)

    # ---- training
    for step in run.steps(validate):  # goes on where the last checkpoint ended
        lr = learning_rate(step, config.train.steps, config.optimizer)
        set_learning_rate(optimizer, lr)
        loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
        for (tokens, targets), _ in loader.micro_batches(step):
            micro_loss_sum = engine(tokens, targets)  # a sum over tokens, not a mean
            # Dividing by the tokens of the *global* batch makes the gradient the same for any accumulation, so that
            # the engine must not divide by the micro-batches again; it averages over the ranks where the global batch
            # wants the sum, hence the world size.
            engine.backward(micro_loss_sum * ranks.world_size / tokens_per_step, scale_wrt_gas=False)
            if step == run.first_step + 1 and engine.micro_steps % plan.accumulation == 0:
                ranks.print(describe(engine))  # in the second step all is there that training needs
            engine.step()  # after each micro-batch: on the last one it clips, updates and zeroes
            loss_sum += micro_loss_sum.detach()
        grad_norm = torch.as_tensor(engine.get_global_grad_norm())
        run.log(step, loss_sum, grad_norm, lr)  # read one step late; the engine itself waits once a step, for the norm
        run.end_step(step, state, optimizer)  # saves; after that, `steps` evaluates
    run.finish()
    ranks.leave()  # a barrier, then the end of the process group


@torch.no_grad()
def initialize(model: Transformer, config: DeepSpeedConfig) -> None:
    """Give every parameter the values that one process would start with; in stage 3 one at a time is whole."""
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if parameter.numel():  # in stage 3 the values of rank 0 go to all
                parameter.copy_(initial_weight(name, parameter.shape, config.model, config.seed))


@torch.no_grad()
def evaluate(engine: deepspeed.DeepSpeedEngine, dataset, batch_size: int, ranks: Ranks) -> float:
    """Mean loss per token over the validation set: the sum of all losses divided by the count of all tokens."""
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # loss, tokens
    place = ranks.rank, ranks.world_size
    # In stage 3 a forward gathers parameters: ranks with fewer samples join in with batches that do not count.
    for tokens, targets in evaluation_batches(dataset, batch_size, ranks.device, *place, equal_batches=True):
        sums += torch.stack([engine(tokens, targets).double(), count_valid(targets)])
    dist.all_reduce(sums)  # ranks may have had different numbers of samples: sums, never a mean of means
    loss, count = sums.tolist()
    return loss / count


if __name__ == "__main__":
    main(parse(DeepSpeedConfig))
