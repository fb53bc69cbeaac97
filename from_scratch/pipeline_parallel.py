"""Pipeline parallelism: every rank holds some of the layers, and micro-batches flow through them.

A schedule is the order in which a rank does its forwards and backwards. The three here differ by one number, how many
forwards a rank does before its first backward (the warm-up); see `order`:

    afab          all forwards, then all backwards (GPipe, https://arxiv.org/abs/1811.06965): m micro-batches in flight
    1f1b          one forward, one backward, in turn: at most p - stage in flight, and the same idle time
    interleaved   each rank has several smaller stages (https://arxiv.org/abs/2104.04473): less idle time, more messages

The idle share (bubble) is (p - 1) / (v·m + p - 1) for p ranks, m micro-batches and v stages a rank: `ideal_bubble`.

    edges = connect([list(range(dist.get_world_size()))])
    pipeline = Pipeline(config, seed, sequence, dist.group.WORLD, edges, "1f1b")
    loss_sum = pipeline.step(micro_batches, 1 / tokens_per_step)          # gradients are there; zero_grad between steps
    norm = pipeline.clip_grad_norm(1.0)
    pipeline.write_events(folder)                                         # for gantt.py
"""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import grad_norm
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from common.transformer import ModelConfig, Transformer

SCHEDULES = ("afab", "1f1b", "interleaved")


class Action(NamedTuple):
    """One thing a rank does: `kind` is "forward" or "backward"; chunk: which of the rank's stages."""

    kind: str
    chunk: int
    micro_batch: int


def order(schedule: str, rank: int, ranks: int, micro_batches: int, chunks: int = 1) -> list[Action]:
    """What `rank` does in one step, in order.

    Raises:
        ValueError: an unknown schedule, several chunks for one that has one, or micro-batches not divisible by ranks.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}; expected one of {', '.join(SCHEDULES)}")
    if min(micro_batches, ranks) < 1:
        raise ValueError(f"{micro_batches} micro-batches on {ranks} ranks; expected at least 1 of each")
    if (chunks > 1) != (schedule == "interleaved"):
        raise ValueError(f"{schedule} with {chunks} stages a rank; expected 1 for afab and 1f1b, else at least 2")
    if schedule == "interleaved" and micro_batches % ranks:
        raise ValueError(f"{micro_batches} micro-batches on {ranks} ranks; interleaved needs a multiple of the ranks")

    def place(number: int) -> tuple[int, int]:
        # `ranks` micro-batches go through the first chunk, the same ones through the next, …, then the next ones.
        block, within = divmod(number, ranks * chunks)
        chunk, offset = divmod(within, ranks)
        return chunk, block * ranks + offset

    total = micro_batches * chunks
    forwards = [Action("forward", *place(number)) for number in range(total)]
    backwards = [Action("backward", chunks - 1 - a.chunk, a.micro_batch) for a in forwards]  # last chunk first
    to_the_end = ranks - rank - 1  # how many ranks a micro-batch still has before it
    warm_up = {"afab": total, "1f1b": to_the_end, "interleaved": 2 * to_the_end + (chunks - 1) * ranks}[schedule]
    warm_up = min(warm_up, total)
    steady = zip(forwards[warm_up:], backwards, strict=False)
    return forwards[:warm_up] + [a for pair in steady for a in pair] + backwards[total - warm_up :]


def ideal_bubble(ranks: int, micro_batches: int, chunks: int) -> float:
    """(p - 1) / (v·m + p - 1): equal stages and free communication (arXiv 2104.04473, section 2.2)."""
    return (ranks - 1) / (chunks * micro_batches + ranks - 1)


def split_by_cost(config: ModelConfig, stages: int, sequence: int = 0) -> list[range]:
    """Which layers each stage gets, so that the slowest is as fast as can be.

    Costs are multiplications per token. The head counts (at a vocabulary of 128 256 and width 4096 as much as 2.4
    layers of Llama 3.1 8B), the embedding hardly: it is a look-up. Layers cost the same, so that giving each to the
    stage with the least so far is best.

    Raises:
        ValueError: fewer layers than stages.
    """
    if config.layers < stages:
        raise ValueError(f"model.layers is {config.layers} for {stages} stages; expected a layer for each; use fewer")
    projections = 2 * config.width * config.head_size * (config.heads + config.kv_heads)
    ffn = 3 * config.width * config.ffn_width * (config.experts_per_token if config.experts else 1)
    layer = projections + ffn + sequence * config.heads * config.head_size  # half the keys, for scores and values
    costs, counts = [layer] * stages, [1] * stages
    costs[0] += config.width
    costs[-1] += config.width * config.vocabulary
    for _ in range(config.layers - stages):
        cheapest = costs.index(min(costs))
        costs[cheapest] += layer
        counts[cheapest] += 1
    return [range(sum(counts[:stage]), sum(counts[: stage + 1])) for stage in range(stages)]


def connect(lines: list[list[int]]) -> dict[tuple[int, int], ProcessGroup]:
    """Make a group of two for each edge of each pipeline: what goes out of a rank in one direction.

    NCCL keeps one queue for each group and rank: an operation begins when the one before it has ended, and a send of
    more than a few MiB ends only when its receiver is there. In one group for a whole direction, the ranks of an
    interleaved schedule, whose last rank sends to the first, wait for each other around the circle forever.

    Args:
        lines: global ranks of each pipeline, in the order of its stages. All ranks must call it with the same lines.

    Returns:
        By (direction, sender), those of this rank. Direction 0 are activations, which go to the next rank; 1 gradients,
        to the one before. The sender is a rank within the pipeline.
    """
    edges = {}
    for ranks in lines:
        for direction, step in enumerate((1, -1)):
            for sender in range(len(ranks) if len(ranks) > 1 else 0):
                pair = [ranks[sender], ranks[(sender + step) % len(ranks)]]
                group = dist.new_group(pair)
                if dist.get_rank() in pair:
                    edges[direction, sender] = group
    return edges


class Pipeline:
    """This rank's stages of the model and what runs them.

    Args:
        config, seed: of the whole model; every stage starts as its part of it would.
        sequence: tokens of a sequence; attention's share of a layer's cost depends on it.
        group, edges: the ranks of this pipeline, and what `connect` returns. On an edge, messages arrive in the order
            in which they are wanted; in one group, activations and gradients could take each other's place.
        schedule, chunks: see `order`; chunk c of rank r is stage c · ranks + r.
        layers: of each stage, if not by `split_by_cost`.

    Raises:
        ValueError: layers, micro-batches and ranks do not fit together.
    """

    def __init__(
        self,
        config: ModelConfig,
        seed: int,
        sequence: int,
        group: ProcessGroup,
        edges: dict[tuple[int, int], ProcessGroup],
        schedule: str = "1f1b",
        chunks: int = 1,
        layers: list[range] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.group, self.edges, self.rank, self.ranks = group, edges, group.rank(), group.size()
        order(schedule, self.rank, self.ranks, self.ranks, chunks)  # complains here if it must
        if chunks > 1 and self.ranks == 1:
            raise ValueError(f"{chunks} stages on 1 rank; interleaved needs at least 2 ranks; use 1f1b")
        self.schedule, self.chunks, self.last_stage = schedule, chunks, self.ranks * chunks - 1
        layers = layers or split_by_cost(config, self.ranks * chunks, sequence)
        self.stages = torch.nn.ModuleDict({
            str(stage): Transformer(config, seed, stage == 0, stage == self.last_stage, layers[stage])
            for stage in range(self.rank, self.ranks * chunks, self.ranks)
        }).to(device=device, dtype=dtype)  # fmt: skip
        # A tied weight lives twice, on the first and the last stage, and starts equal there.
        self.tied = config.tied and self.ranks > 1
        self.width, self.device, self.dtype = config.width, torch.device(device), dtype
        self.recording = True  # on a GPU it waits for every event to end: switch it off to train
        self.events: list[dict] = []
        self.steps_done = 0

    def step(self, micro_batches: list[tuple[Tensor, Tensor]], scale: float) -> Tensor:
        """One step's forwards and backwards; returns the sum of token losses on the last rank, 0 elsewhere.

        micro_batches: (tokens, targets) each, the same on all ranks. The first stage reads tokens, the last targets,
        and all the shape of their messages: nothing but numbers has to be sent. scale: the gradient is that of scale ×
        the sum; 1 / tokens of the step makes it the mean's, however many micro-batches there are.
        """
        self._begin()
        for kind, chunk, number in order(self.schedule, self.rank, self.ranks, len(micro_batches), self.chunks):
            stage = chunk * self.ranks + self.rank
            if kind == "forward":
                self._forward(stage, number, *micro_batches[number])
            else:
                self._backward(stage, number, scale)
        self._end()
        if self.tied and self.rank in (0, self.ranks - 1):
            self._sum_tied_gradients()
        self.steps_done += 1
        return self._loss_sum

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The sum of token losses on the last rank, 0 elsewhere; no gradients. All ranks give the same batch."""
        self._begin()
        recording, self.recording = self.recording, False
        for stage in range(self.rank, self.last_stage + 1, self.ranks):
            self._forward(stage, 0, tokens, targets)
        self._end()
        self.recording = recording
        return self._loss_sum

    def _begin(self) -> None:
        self._live: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # what waits for its backward
        self._sending: list[tuple[dist.Work, Tensor]] = []
        self._loss_sum = torch.zeros((), dtype=torch.promote_types(self.dtype, torch.float32), device=self.device)

    def _end(self) -> None:
        for request, _ in self._sending:  # a tensor must stay until it has left
            request.wait()
        self._live.clear()

    def _forward(self, stage: int, number: int, tokens: Tensor, targets: Tensor) -> None:
        x = tokens if stage == 0 else self._receive(0, stage, number, tokens.shape).requires_grad_()
        with self._event("forward", stage, number):
            output = self.stages[str(stage)](x, targets if stage == self.last_stage else None)
        if stage == self.last_stage:
            self._loss_sum += output.detach()
        else:
            self._send(output.detach(), 0, stage, number)
        self._live[stage, number] = x, output

    def _backward(self, stage: int, number: int, scale: float) -> None:
        x, output = self._live.pop((stage, number))
        gradient = None if stage == self.last_stage else self._receive(1, stage, number, output.shape)
        with self._event("backward", stage, number):
            torch.autograd.backward(output * scale if stage == self.last_stage else output, gradient)
        if stage > 0:
            self._send(x.grad, 1, stage, number)

    # Activations (direction 0) go to the next rank, gradients (direction 1) to the one before. The last rank's next is
    # the first, whose following chunk it is.
    def _send(self, tensor: Tensor, direction: int, stage: int, number: int) -> None:
        receiver = (self.rank + (1, -1)[direction]) % self.ranks
        with self._event("send", stage, number):  # the time it takes to hand it over; it leaves in the background
            tensor, peer = tensor.contiguous(), dist.get_global_rank(self.group, receiver)
            self._sending.append((dist.isend(tensor, peer, group=self.edges[direction, self.rank]), tensor))

    def _receive(self, direction: int, stage: int, number: int, shape: torch.Size) -> Tensor:
        sender = (self.rank - (1, -1)[direction]) % self.ranks
        with self._event("recv", stage, number):  # waiting included
            tensor = torch.empty(*shape[:2], self.width, dtype=self.dtype, device=self.device)
            dist.recv(tensor, dist.get_global_rank(self.group, sender), group=self.edges[direction, sender])
        return tensor

    def _sum_tied_gradients(self) -> None:
        """An all-reduce between first and last rank: both add what the other's use of the tied weight gave."""
        name = "0.embedding.weight" if self.rank == 0 else f"{self.last_stage}.head.weight"
        mine = self.stages.get_parameter(name).grad
        other, peer, group = torch.empty_like(mine), self.ranks - 1 - self.rank, self.group
        requests = dist.batch_isend_irecv([
            dist.P2POp(dist.isend, mine, group=group, group_peer=peer),
            dist.P2POp(dist.irecv, other, group=group, group_peer=peer),
        ])  # fmt: skip
        for request in requests:
            request.wait()
        mine += other

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scale gradients to a norm of at most max_norm over all stages; a tied weight counts once. Norm before."""
        named = {name: p.grad for name, p in self.stages.named_parameters() if p.grad is not None}
        twice = ("0.embedding.weight", f"{self.last_stage}.head.weight") if self.tied else ()
        held_by = ((gradient, 2 if name in twice else 1) for name, gradient in named.items())
        return grad_norm.clip_grad_norm(held_by, max_norm, self.group)

    @contextlib.contextmanager
    def _event(self, event: str, stage: int, micro_batch: int) -> Iterator[None]:
        if not self.recording:
            yield
            return
        start = self._now()
        yield
        place = {"step": self.steps_done, "rank": self.rank, "stage": stage, "micro_batch": micro_batch}
        self.events.append(place | {"event": event, "start": start, "end": self._now()})

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # else the time to launch kernels would be shown, not theirs
        return time.time()  # seconds; unlike a monotonic clock's, comparable between hosts

    def write_events(self, folder: str | Path) -> Path:
        """Write this rank's events, one JSON object a line, to folder/rank_R.jsonl."""
        file = Path(folder) / f"rank_{self.rank}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(event) + "\n" for event in self.events))
        return file
