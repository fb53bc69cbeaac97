"""The ring all-reduce by hand, from sends and receives; and its cost model, fitted to what is measured.

    torchrun --nproc-per-node=3 collectives/ring_all_reduce.py                          # a laptop: five seconds
    torchrun --nproc-per-node=4 collectives/ring_all_reduce.py --sizes 1K,64K,1M,16M --plot ring.png

Each rank cuts its tensor into n chunks. In n − 1 steps, a chunk travels around the ring and each rank adds its own part
to what comes by: then every rank holds one chunk of the sum (a reduce-scatter). In n − 1 more steps the finished chunks
travel around (an all-gather). Each rank sends 2 (n − 1) messages of S / n bytes, which no other way beats in bytes
(Patarasuk and Yuan, 2009, https://doi.org/10.1016/j.jpdc.2008.09.002). With α seconds for a message however small, and
β bytes a second over a link, that takes

    T(S) = 2 (n − 1) (α + S / (n β))

For small S the first part rules: it grows with n, and trees are better. For large S it is 2 S / β for any n.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from bandwidth_measure import DTYPES, time_operation
from bandwidth_output import check_outputs
from bandwidth_settings import BandwidthConfig
from torch.distributed.elastic.multiprocessing.errors import record

from common.config import parse
from common.config_fields import PathText
from common.ranks import Ranks, fail, join


def ring_all_reduce(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Sum `tensor` over all ranks of the group, in place. All of them must call it.

    The result is the same on all ranks, bit for bit: each chunk is summed once, in one order, and copied from there.

    Args:
        tensor: any shape and number of elements, any type that can be added, contiguous or not.
        group: who takes part; by default all ranks.

    Returns:
        `tensor`.
    """
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    flat = tensor.detach().contiguous().view(-1)  # a copy only where the elements do not lie in a row
    chunks = flat.tensor_split(n)  # sizes differ by one at most, and may be 0

    for step in range(n - 1):  # reduce-scatter: this rank passes on what it has just added to
        gone, come = chunks[(rank - step) % n], chunks[(rank - step - 1) % n]
        received = torch.empty_like(come)
        _pass_on(gone, received, group)
        come += received
    for step in range(n - 1):  # all-gather: chunk rank + 1 is now complete here
        gone, come = chunks[(rank + 1 - step) % n], chunks[(rank - step) % n]
        _pass_on(gone, come, group)

    if flat.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(flat.view(tensor.shape))
    return tensor


def _pass_on(gone: torch.Tensor, come: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Send to the next rank while receiving from the one before; empty chunks are not sent."""
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    # The receive first: with Gloo, large messages then take half the time, because the two directions no longer take
    # turns. Presumably the word that the peer may send goes out behind our own data otherwise (benchmarks/README.md).
    both = [
        dist.P2POp(call, chunk, group=group, group_peer=peer % n)
        for call, chunk, peer in ((dist.irecv, come, rank - 1), (dist.isend, gone, rank + 1))
        if chunk.numel()
    ]
    for request in dist.batch_isend_irecv(both) if both else ():
        request.wait()


def equal_enough(found: torch.Tensor, exact: torch.Tensor, addends: torch.Tensor, n: int) -> bool:
    """Whether a sum of n numbers an element, in whatever order, is as near to the exact sum as rounding allows.

    Args:
        found: the sum in its type; exact: in fp64; addends: the sum of the absolute values, in fp64. All (elements,).
    """
    # n - 1 additions, each off by eps / 2 of a partial sum at most, which is no larger than the sum of the absolute
    # values (Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, section 4.2). This is twice that.
    return bool(((found.double() - exact).abs() <= (n - 1) * torch.finfo(found.dtype).eps * addends).all())


def check(ranks: Ranks, dtype: torch.dtype) -> None:
    """Compare with dist.all_reduce: bitwise on whole numbers, and within rounding on others.

    Raises:
        SystemExit: (exit code 2) they differ.
    """
    n = ranks.world_size
    for elements in (1, n, 10 * n + 1):  # fewer elements than ranks, as many, and a number that n does not divide
        whole = (torch.arange(elements, device=ranks.device) % 3 + ranks.rank).to(dtype)
        theirs = whole.clone()
        dist.all_reduce(theirs)
        broken = torch.randn(elements, generator=torch.Generator().manual_seed(ranks.rank)).to(ranks.device, dtype)
        exact, addends = broken.double(), broken.double().abs()
        dist.all_reduce(exact)
        dist.all_reduce(addends)
        # Not `equal(ring…) and …(ring…)`: a rank that is wrong in the first would stay away from the second.
        ring_all_reduce(whole)
        ring_all_reduce(broken)
        # Every order of addition gives the same on whole numbers.
        good = torch.equal(whole, theirs) and equal_enough(broken, exact, addends, n)
        if wrong := [rank for rank, right in enumerate(ranks.all_gather(good)) if not right]:
            fail(
                f"the ring's sum of {elements} elements in {dtype} is wrong on rank(s) {', '.join(map(str, wrong))}; "
                f"expected what dist.all_reduce gives; look at which chunk travels in which step"
            )


def fit(sizes: list[int], seconds: list[float], n: int) -> tuple[float, float]:
    """α in seconds and β in bytes per second of T(S) = 2 (n − 1) (α + S / (n β)), by least squares.

    The *relative* errors are squared: plain ones would look at the largest size alone. At least two different sizes.
    """
    times = torch.tensor(seconds, dtype=torch.float64)
    bytes_sent = torch.tensor(sizes, dtype=torch.float64)
    terms = 2 * (n - 1) * torch.stack([torch.ones_like(times), bytes_sent / n], dim=1)
    alpha, inverse_beta = torch.linalg.lstsq(terms / times[:, None], torch.ones_like(times)[:, None]).solution.flatten()
    return alpha.item(), 1 / inverse_beta.item()


def predict(size: int, n: int, alpha: float, beta: float) -> float:
    """Seconds that the model gives for `size` bytes on n ranks."""
    return 2 * (n - 1) * (alpha + size / (n * beta))


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Time over size: measured (least, and median as a bar), the model, and dist.all_reduce."""
    from matplotlib.figure import Figure  # without pyplot: no window system is touched

    figure = Figure(figsize=(7, 4.6), dpi=130, layout="constrained")
    panel = figure.subplots()
    sizes = [row["bytes"] for row in rows]
    least = [min(row["seconds"]) * 1e6 for row in rows]
    spread = [statistics.median(row["seconds"]) * 1e6 - low for row, low in zip(rows, least, strict=True)]
    none = [0.0] * len(rows)
    panel.errorbar(sizes, least, yerr=[none, spread], fmt="o", capsize=3, label="ring by hand, least (bar: median)")
    panel.plot(sizes, [row["model"] * 1e6 for row in rows], "-", color="C0", label="2 (n − 1) (α + S / (n β))")
    panel.plot(sizes, [row["theirs"] * 1e6 for row in rows], "s", color="C1", markersize=4, label="dist.all_reduce")
    panel.set(xscale="log", yscale="log", xlabel="bytes", ylabel="µs", title=title)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.savefig(path, format="png")


@dataclass
class RingConfig:
    """What to measure."""

    sizes: str = "1K,16K,64K,256K,1M,4M"
    """Two or more message sizes in bytes, with commas; K, M and G are powers of 1024."""
    dtype: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """The type of the numbers."""
    repeats: int = 10
    """How often each size is timed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: every GPU if there is one, else the CPU."""
    plot: PathText | None = None
    """Draw measurement and model into this PNG."""

    def __post_init__(self) -> None:
        if len(self.bytes) < 2:
            raise ValueError(f"sizes = {self.sizes!r} cannot work; allowed: two or more different ones, such as 4K,1M")
        if self.repeats < 1:
            raise ValueError(f"repeats = {self.repeats} cannot work; allowed: at least 1")

    @property
    def bytes(self) -> list[int]:
        """The sizes, small ones first; none where the text makes no sense."""
        return sorted(set(BandwidthConfig(sizes=self.sizes).bytes_by_device("cpu")))


@record
def main(config: RingConfig) -> None:
    ranks = join(config.device, timeout_s=60)
    n, dtype = ranks.world_size, DTYPES[config.dtype]
    if n < 2:
        fail("one process has nobody to send to; start several with torchrun --nproc-per-node=3")
    check_outputs(ranks, plot=config.plot)
    check(ranks, dtype)

    rows: list[dict[str, Any]] = []
    for size in config.bytes:
        buffer = torch.zeros(max(1, size // dtype.itemsize), dtype=dtype, device=ranks.device)
        seconds = time_operation(lambda b=buffer: ring_all_reduce(b), ranks, 3, config.repeats)
        theirs = time_operation(lambda b=buffer: dist.all_reduce(b), ranks, 3, config.repeats)
        rows.append({"bytes": buffer.nbytes, "seconds": seconds, "theirs": min(theirs)})
    # The least time of each size: whatever else the machine does can only add to it, and is not in the model.
    sizes, least = [row["bytes"] for row in rows], [min(row["seconds"]) for row in rows]
    alpha, beta = fit(sizes, least, n)
    for row in rows:
        row["model"] = predict(row["bytes"], n, alpha, beta)

    if ranks.is_main:
        print(f"{n} ranks, {'NCCL' if ranks.device.type == 'cuda' else 'Gloo'}, {config.dtype}: the ring's sums equal")
        print(f"those of dist.all_reduce. Each rank sends {2 * (n - 1)} messages of S / {n} bytes.\n")
        print(f"{'bytes':>12}{'least, µs':>12}{'(median – greatest)':>24}{'model':>10}{'off by':>9}{'all_reduce':>12}")
        for row, seconds in zip(rows, least, strict=True):
            spread = f"({statistics.median(row['seconds']) * 1e6:,.0f} – {max(row['seconds']) * 1e6:,.0f})"
            off = f"{row['model'] / seconds - 1:+.0%}"
            print(
                f"{row['bytes']:>12,}{seconds * 1e6:>12,.0f}{spread:>24}{row['model'] * 1e6:>10,.0f}{off:>9}"
                f"{row['theirs'] * 1e6:>12,.0f}"
            )
        print(f"\nfitted: α = {alpha * 1e6:,.1f} µs a message, β = {beta / 1e9:,.3f} GB/s a link", end="")
        # where the two parts of the model are equal
        print(f"; below S = n α β = {n * alpha * beta:,.0f} bytes, α rules" if alpha > 0 < beta else "; not a ring's")
        if config.plot:
            title = f"Ring all-reduce, {n} ranks: α = {alpha * 1e6:.0f} µs, β = {beta / 1e9:.2f} GB/s"
            plot(rows, title, Path(config.plot))
    ranks.leave()


if __name__ == "__main__":
    main(parse(RingConfig))
