"""A pipeline's checkpoint under the names of the plain model, so that any other strategy can go on from it."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

TIED = {"head.weight": "embedding.weight"}  # the last stage's copy of a tied weight, and its name in the whole model


def tied_weight(model: torch.nn.Module) -> torch.nn.Parameter | None:
    """The tied weight on the first and the last stage; None on those between."""
    named = dict(model.named_parameters())
    return named.get("embedding.weight", named.get("head.weight"))


class WholePipeline:
    """Model and optimizer of all stages, as `common.checkpoint` wants them (its `WholeState`).

    Each stage's part has the right names already; all ranks gather all parts, on the CPU. That needs the memory of the
    whole model on each host. A tied weight is saved once, as the embedding; the last stage takes its copy from there.

    Args:
        module: this rank's part of the model, under the names of the whole.
        optimizer: over its parameters.
        tied: the last stage's head is the embedding.
    """

    def __init__(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, tied: bool) -> None:
        self.module, self.optimizer = module, optimizer
        self.names = {name: TIED.get(name, name) if tied else name for name, _ in module.named_parameters()}

    def whole_state(self) -> dict[str, Any]:
        """All ranks must call it, and all get everything."""
        weights, moments = get_state_dict(self.module, self.optimizer)
        mine = {
            "model": {self.names[name]: tensor.cpu() for name, tensor in weights.items()},
            "state": {
                self.names[name]: {key: entry.cpu() for key, entry in entries.items()}
                for name, entries in moments["state"].items()
            },
            "groups": [
                group | {"params": [self.names[name] for name in group["params"]]} for group in moments["param_groups"]
            ],
        }
        stages: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(stages, mine)
        model = {name: tensor for stage in stages for name, tensor in stage["model"].items()}
        state = {name: entries for stage in stages for name, entries in stage["state"].items()}
        groups = [
            group | {"params": sorted({name for stage in stages for name in stage["groups"][number]["params"]})}
            for number, group in enumerate(mine["groups"])
        ]
        return {"model": model, "optimizer": {"state": state, "param_groups": groups}}

    def load_whole_state(self, state: dict[str, Any]) -> None:
        """Take this rank's part of such a state, which may come from any strategy and number of ranks."""
        whole, moments = state["model"], state["optimizer"]["state"]
        groups = [
            group | {"params": [name for name in self.names if self.names[name] in group["params"]]}
            for group in state["optimizer"]["param_groups"]
        ]
        set_state_dict(
            self.module,
            self.optimizer,
            model_state_dict={name: whole[plain] for name, plain in self.names.items()},
            optim_state_dict={
                "state": {name: moments[plain] for name, plain in self.names.items()},
                "param_groups": groups,
            },
        )
