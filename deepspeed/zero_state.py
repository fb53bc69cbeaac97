"""ZeRO's shards under the names of the plain model, so that the checkpoint fits any stage, world size and strategy.

DeepSpeed's own checkpoints (`engine.save_checkpoint`) are pickles of flat partitions: `own_checkpoint.py` shows
them. Here each parameter is gathered, one at a time, for the rank that writes it; together the ranks write all.
"""

from typing import Any

import torch
import torch.distributed as dist
from environment import deepspeed
from settings import partitions

from common.checkpoint import WholeState
from common.ranks import fail

utils = deepspeed.utils
ADAM = ("exp_avg", "exp_avg_sq")
AVERAGES = {"AdamW": ADAM, "SGD": ("momentum_buffer",)}


def checkpointable(engine: Any, optimizer: torch.optim.Optimizer) -> torch.nn.Module | WholeState:
    """What `Run.restore` and `Run.end_step` take as the model: in stage 0 without ZeRO the model as it is."""
    return ZeroState(engine, optimizer) if hasattr(engine.optimizer, "optimizer") else engine.module


class ZeroState:
    """Model and optimizer of a DeepSpeed engine, as `common.checkpoint` wants them (its `WholeState`).

    Args:
        engine: from `deepspeed.initialize`, with any ZeRO stage.
        optimizer: the torch optimizer that went into it.
    """

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer) -> None:
        self.module, self.zero, self.optimizer = engine.module, engine.optimizer, optimizer
        self.by_stage_3 = engine.zero_optimization_stage() == 3
        self.averages = AVERAGES[type(optimizer).__name__]
        self.named = dict(self.module.named_parameters())
        self.on_disk = getattr(self.zero, "swap_optimizer", False)  # offload to NVMe: the averages are in files
        if not self.on_disk:
            self._make_averages()

    def _make_averages(self) -> None:
        """Make the averages now. torch makes them in its first step, and a checkpoint is loaded before that."""
        for flat in partitions(self.zero):
            if not self.optimizer.state[flat]:
                entries = {name: torch.zeros_like(flat) for name in self.averages}
                if self.averages == ADAM:  # DeepSpeed's counts in whole numbers
                    count = torch.float32 if isinstance(self.optimizer, torch.optim.AdamW) else torch.int64
                    entries["step"] = torch.zeros((), dtype=count, device=flat.device)  # a fused kernel reads it there
                self.optimizer.state[flat] = entries
        # Stages 1 and 2 look up where a parameter's averages are after the first group's step, when those of the
        # second group (vectors, without weight decay) do not exist yet, and then never again (DeepSpeed 0.19).
        if hasattr(self.zero, "_lazy_init_hp_params_optimizer_state"):
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _steps(self) -> torch.Tensor | None:
        return next(iter(self.optimizer.state.values())).get("step")

    def _groups(self) -> list[list[str]]:
        """Names of the parameters in each group of the optimizer, as `build_optimizer` forms them."""
        shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in self.named.items()}
        return [[n for n, s in shapes.items() if len(s) >= 2], [n for n, s in shapes.items() if len(s) < 2]]

    @torch.no_grad()
    def whole_state(self) -> dict[str, Any]:
        """This rank's share of the parameters, whole, with their averages. All ranks must call it."""
        weights: dict[str, torch.Tensor] = {}
        moments: dict[str, dict[str, torch.Tensor]] = {}
        for number, (name, parameter) in enumerate(self.named.items()):
            weight = utils.safe_get_full_fp32_param(parameter)
            averages = {key: utils.safe_get_full_optimizer_state(parameter, key) for key in self.averages}
            if number % dist.get_world_size() == dist.get_rank():  # the others let go of it again
                weights[name] = weight.cpu()
                moments[name] = {key: value.cpu() for key, value in averages.items()}
                if (steps := self._steps()) is not None:
                    moments[name]["step"] = steps.to("cpu", torch.float32, copy=True)
        groups = [
            {key: value for key, value in group.items() if key != "params"} | {"params": names}
            for group, names in zip(self.optimizer.param_groups, self._groups(), strict=True)
        ]
        return {"model": weights, "optimizer": {"state": moments, "param_groups": groups}}

    @torch.no_grad()
    def load_whole_state(self, state: dict[str, Any]) -> None:
        """Take this rank's partitions of such a state, which may come from any strategy and number of ranks."""
        if self.on_disk:
            fail("this run goes on from a checkpoint, which cannot be loaded into offload to NVMe, whose state is in "
                 "files of its own; go on with zero3_cpu_offload.json")  # fmt: skip
        device = deepspeed.accelerator.get_accelerator().current_device_name()
        for number, (name, parameter) in enumerate(self.named.items()):
            owner = number % dist.get_world_size()
            mine = state["optimizer"]["state"].get(name, {}) | {"weight": state["model"].get(name)}
            whole = {}
            for key in ("weight", *self.averages):
                shape = getattr(parameter, "ds_shape", parameter.shape)
                value = mine[key].to(device) if owner == dist.get_rank() else torch.empty(shape, device=device)
                dist.broadcast(value, src=owner)
                whole[key] = value
            if self.by_stage_3:
                self._set_partition(parameter, whole)
            else:
                utils.safe_set_full_fp32_param(parameter, whole["weight"])
                for key in self.averages:
                    utils.safe_set_full_optimizer_state(parameter, whole[key], key)
                parameter.copy_(whole["weight"])
        steps = [entries["step"] for entries in state["optimizer"]["state"].values() if "step" in entries]
        for entries in self.optimizer.state.values():
            if steps and "step" in entries:
                entries["step"].copy_(steps[0])

    def _set_partition(self, parameter: torch.nn.Parameter, whole: dict[str, torch.Tensor]) -> None:
        """In stage 3 a parameter is cut into equal parts, one a rank; the last one may end in padding."""
        size = parameter.ds_tensor.ds_numel
        for key, value in whole.items():
            padded = torch.zeros(size * dist.get_world_size(), device=value.device)
            padded[: value.numel()] = value.flatten()
            part = padded.narrow(0, size * dist.get_rank(), size)
            if key == "weight":
                utils.safe_set_local_fp32_param(parameter, part)
            else:
                utils.safe_set_local_optimizer_state(parameter, part, key)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):  # what the model computes with
            parameter.copy_(whole["weight"])
