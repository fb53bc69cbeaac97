"""A mixture of experts whose experts are cut among the ranks: tokens travel to their experts, and results come back."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from common.transformer import MixtureOfExperts, ModelConfig


class ExpertParallel(MixtureOfExperts):
    """The same layer with the same names, of which each rank of `mesh` holds experts / ranks whole experts.

    Gate, up and down are DTensors, cut along their first dimension; the router is whole on every rank, and decides for
    its own tokens. Dropless, as GShard's all-to-all (arXiv 2006.16668) without its capacity limit: ranks tell each
    other how many tokens come, then send just those.

    Args:
        config: of the model; `experts` must be a multiple of the ranks.
        mesh: the ranks among which the experts are cut, one axis.
        balanced: also compute `balance_loss`, which costs an all-reduce of one number for each expert.
    """

    def __init__(self, config: ModelConfig, mesh: DeviceMesh, balanced: bool) -> None:
        super().__init__(config)
        self.mesh, self.balanced = mesh, balanced
        for name in ("gate", "up", "down"):
            setattr(self, name, torch.nn.Parameter(distribute_tensor(getattr(self, name), mesh, [Shard(0)])))
        self.load = torch.zeros(config.experts, dtype=torch.int64)
        """How many of this rank's tokens went to each expert in the last forward: (experts,)."""
        self.balance_loss: Tensor | None = None
        """This rank's part of the layer's load-balancing loss in the last forward: a scalar, a sum over tokens."""

    @torch.compiler.disable  # how many tokens come and go is data, at which a graph breaks anyway
    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (batch, sequence, width), of this rank; so is the result."""
        tokens = hidden.flatten(0, -2)
        scores = self.router(tokens)
        probabilities = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        shares, chosen = probabilities.topk(self.experts_per_token, dim=-1)
        shares = shares / shares.sum(-1, keepdim=True)

        # An assignment is a token and one of its experts. Sorted by expert they are sorted by rank, too.
        order = chosen.flatten().argsort(stable=True)
        rows = order // self.experts_per_token  # which token
        counts = torch.zeros(probabilities.shape[-1], dtype=torch.int64, device=chosen.device)
        # `bincount` would look for the largest number on the host, which then waits for a GPU.
        self.load = counts.scatter_add_(0, chosen.flatten(), torch.ones_like(order))
        self.balance_loss = self._balance_loss(probabilities) if self.balanced else None

        # First the counts, then the tokens. Sizes are needed on the host: on a GPU it waits here, once, for the router.
        group, ranks = self.mesh.get_group(), self.mesh.size()
        coming = torch.empty_like(self.load)  # by rank of origin, then by expert of this rank
        dist.all_to_all_single(coming, self.load, group=group)
        going, coming = self.load.view(ranks, -1), coming.view(ranks, -1)
        sizes = torch.cat((going.sum(1), coming.sum(1), coming.sum(0))).tolist()
        send, receive, by_expert = sizes[:ranks], sizes[ranks : 2 * ranks], sizes[2 * ranks :]
        arrived = all_to_all_single_autograd(tokens[rows], receive, send, group)
        results = self._compute(arrived, coming, by_expert)
        # The way back is the way here, the other way round; backward goes both ways once more.
        returned = all_to_all_single_autograd(results, send, receive, group)

        result = returned * shares.flatten()[order].unsqueeze(-1)
        output = torch.zeros_like(hidden)
        output.view(tokens.shape).index_add_(0, rows, result.to(tokens.dtype))  # in place: FSDP wants no view back
        return output

    def _compute(self, arrived: Tensor, coming: Tensor, by_expert: list[int]) -> Tensor:
        """This rank's experts on the tokens that arrived; coming: (ranks, experts of this rank), how many of each;
        by_expert: its sums over the ranks.

        An expert without tokens computes with none: its gradient is then zero, and every rank does the same
        collectives in backward.
        """
        gate, up, down = (weight.to_local() for weight in (self.gate, self.up, self.down))
        ranks, experts = coming.shape
        numbers = torch.arange(experts, device=coming.device).repeat(ranks)
        owner = numbers.repeat_interleave(coming.flatten(), output_size=arrived.shape[0])  # which expert, of each row
        order = owner.argsort(stable=True)
        results = []
        for expert, taken in enumerate(arrived[order].split(by_expert)):
            inner = F.silu(F.linear(taken, gate[expert])) * F.linear(taken, up[expert])
            results.append(F.linear(inner, down[expert]))
        return torch.cat(results)[order.argsort()]  # in the order in which they came

    def _balance_loss(self, probabilities: Tensor) -> Tensor:
        """experts × sum of (share of assignments × probability), summed over this rank's tokens (arXiv 2101.03961).

        probabilities: (tokens, experts). The shares are those of the tokens of *all* ranks, as arXiv 2501.11873 finds
        best. They are counts, through which no gradient goes, so that what remains is a sum over tokens: the ranks'
        parts add up to tokens × `common.transformer.load_balancing_loss` of this micro-batch of all ranks.
        """
        load = self.load.clone()
        dist.all_reduce(load)
        shares = load.to(probabilities.dtype) / load.sum()
        return load.numel() * (shares * probabilities.sum(0)).sum()


def describe_load(layers: list[ExpertParallel]) -> str:
    """One line: how unevenly the tokens of the last forward went to experts, and to ranks. All ranks must call it."""
    load = torch.stack([layer.load for layer in layers])  # (layers, experts)
    dist.all_reduce(load)

    def busiest(parts: Tensor) -> str:
        return " ".join(f"{value:.2f}" for value in (parts.amax(-1) / parts.double().mean(-1)).tolist())

    by_rank = load.view(len(layers), layers[0].mesh.size(), -1).sum(-1)
    tokens = " ".join(map(str, load[0].tolist()))
    return f"busiest / mean by layer: experts {busiest(load)}, ranks {busiest(by_rank)}; tokens in layer 0: {tokens}"
