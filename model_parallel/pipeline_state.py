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


class StageState:
    """Model and optimizer of this rank's stages, as `common.checkpoint` wants them (its `WholeState`).

    Each rank writes its own stages, whose parameters have the names of the whole model already. What all ranks must
    agree on are the optimizer's groups: lists of names, gathered here. A tied weight is saved once, as the embedding;
    the last stage takes its copy from there.

    Args:
        module: this rank's part of the model, under the names of the whole.
        optimizer: over its parameters.
        tied: the last stage's head is the embedding.
    """

    def __init__(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, tied: bool) -> None:
        self.module, self.optimizer = module, optimizer
        self.names = {name: TIED.get(name, name) if tied else name for name, _ in module.named_parameters()}

    def whole_state(self) -> dict[str, Any]:
        """This rank's tensors and the groups of all ranks. All ranks must call it."""
        weights, moments = get_state_dict(self.module, self.optimizer)
        groups = [[self.names[name] for name in group["params"]] for group in moments["param_groups"]]
        by_rank: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(by_rank, groups)
        return {
            "model": {self.names[name]: tensor for name, tensor in weights.items()},
            "optimizer": {
                "state": {self.names[name]: entries for name, entries in moments["state"].items()},
                "param_groups": [
                    group | {"params": sorted({name for groups in by_rank for name in groups[number]})}
                    for number, group in enumerate(moments["param_groups"])
                ],
            },
        }

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
                "state": {name: moments[plain] for name, plain in self.names.items() if plain in moments},  # SGD: none
                "param_groups": groups,
            },
        )
