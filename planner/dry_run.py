"""Dry run: memory and collectives of a lesson's own script, on ranks and tensors that are not there.

    python planner/dry_run.py fsdp/train.py --world_size 4                                # seconds on a laptop
    python planner/dry_run.py model_parallel/tensor_parallel.py --world_size 4 -- --mesh.dp 2 --sequence_parallel false
    python planner/dry_run.py fsdp/train.py --world_size 64 -- --model.preset llama3_70b --data.sequence_length 4096 \\
        --batch.global_size 64 --train.precision bf16 --train.activation_checkpointing true   # half a minute: 32.31 GiB

The script is loaded as it stands, and its `main` takes two steps: the first makes the optimizer's state, the second is
measured. Fake tensors have shapes and no memory, the fake process group sends nothing; replaced is only what needs
either: joining, the text, values that would be printed or saved. What runs is the script's own model, mesh, wrapping,
loop and optimizer, so that whatever a strategy holds or sends is counted, not modelled. Where a README of the lessons
has a formula, its value stands beside the count.
"""

import argparse
import json
import math
import sys
import time
from typing import Any, NoReturn

import torch

from common.config_fields import to_path
from common.ranks import fail
from common.transformer import Transformer
from planner.fake_ranks import DryRun
from planner.meter import ACTIVATIONS, GRADIENTS, PARAMETERS, STATE

# Bytes that a rank sends in a ring of n, as a share of the whole end (collectives/README.md).
SENT = {"all-gather": lambda n: (n - 1) / n, "reduce-scatter": lambda n: (n - 1) / n,
        "all-reduce": lambda n: 2 * (n - 1) / n, "send": lambda n: 1, "receive": lambda n: 0}  # fmt: skip
Formula = tuple[float, str, str]  # value, the formula, where it stands


def report(measured: DryRun, arguments: list[str], seconds: float) -> dict[str, Any]:
    """Everything that was measured, as plain numbers and strings."""
    meter, config, notes = measured.meter, measured.config, list(measured.notes)
    micro_batches = measured.limited(measured.accumulation)
    formulas = predict(config, measured.strategy, measured.mesh, measured.rank, measured.micro_size, micro_batches)
    if micro_batches < measured.accumulation:
        notes.append(f"{micro_batches} of {measured.accumulation} micro-batches; the others repeat their collectives")
    collectives = []
    for (kind, axis, size), count in sorted(meter.collectives.items()):
        nbytes = meter.collective_bytes[kind, axis, size]
        sent = round(SENT[kind](size) * nbytes) if kind in SENT else None
        collectives.append(dict(kind=kind, axis=axis, ranks=size, count=count, bytes=nbytes, sent_bytes=sent))
    return {
        "script": str(measured.script),
        "arguments": arguments,
        "world_size": measured.world_size,
        "rank": measured.rank,
        "strategy": measured.strategy,
        "mesh": measured.mesh,
        "said": measured.said[0] if measured.said else "",
        "micro_batches": micro_batches,
        "micro_size": measured.micro_size,
        "sequence_length": config.data.sequence_length,
        "bytes": {**meter.bytes, ACTIVATIONS: meter.activations, "peak": meter.peak},
        "peak": {"when": meter.peak_place, "held": dict(meter.held_at_peak.most_common())},
        "collectives": collectives,
        "formulas": {name: dict(value=v, formula=f, source=s) for name, (v, f, s) in formulas.items()},
        "notes": notes,
        "versions": {"torch": torch.__version__},
        "seconds": round(seconds, 1),
    }


def predict(
    config: Any, strategy: str, mesh: dict[str, int], rank: int, micro_size: int, micro_batches: int
) -> dict[str, Formula]:
    """What the lessons' READMEs say of this strategy; keys: a quantity, or "collective axis count" and "… bytes"."""
    size = 8 if config.train.precision == "fp64" else 4
    low = {"bf16": 2, "fp64": 8}.get(config.train.precision, 4)  # in which FSDP gathers, and tensor ranks compute
    layers, world_size = config.model.layers, math.prod(size for axis, size in mesh.items() if axis != "ep")
    with torch.device("meta"):
        model = Transformer(config.model)
    everything, blocks = list(model.parameters()), list(model.blocks.parameters())
    hidden = micro_size * config.data.sequence_length * config.model.width  # numbers between two layers
    formulas: dict[str, Formula] = {}

    def state(parameters: float, formula: str, source: str) -> None:
        formulas[PARAMETERS] = size * parameters, f"{size} {formula}", source
        formulas[GRADIENTS] = size * parameters, f"{size} {formula}", source
        if config.optimizer.name == "adamw":
            formulas[STATE] = 2 * size * parameters, f"{2 * size} {formula}", source

    def collective(kind: str, axis: str, count: float, nbytes: float, formula: str, source: str) -> None:
        size = mesh["dp_shard"] if axis == "dp" else mesh.get(axis, world_size)
        axis = "world" if size == world_size else axis  # torch has one group for both
        words = formula.split("; ")
        for what, value, said in ("count", count, words[0]), ("bytes", nbytes, words[1]):
            if before := formulas.get(name := f"{kind} {axis} {what}"):  # another one on the same ranks
                value, said, source = before[0] + value, f"{before[1]} + {said}", before[2]
            formulas[name] = value, said, source

    def sharding(whole: float, of_blocks: float, n: int, axis: str, reshard: bool, source: str) -> None:
        """FSDP among n ranks of `whole` parameters, of_blocks of them in blocks."""
        m, passes = micro_batches, 2 if reshard else 1
        words = f"m (1 + {passes} L); {low} m (P + {passes - 1} (P - R))"
        gathered = m * (whole + (passes - 1) * of_blocks)
        collective("all-gather", axis, m * (1 + passes * layers), low * gathered, words, source)
        wide = max(low, 4)  # gradients are summed in fp32 where units compute in bf16
        collective("reduce-scatter", axis, 1 + layers, wide * whole, f"1 + L; {wide} P", source)
        if mesh["dp_replicate"] > 1:
            words = f"1 + L; {wide} P / n"
            collective("all-reduce", "dp_replicate", 1 + layers, wide * whole / n, words, source)

    def count(parameters: list[torch.Tensor]) -> int:
        return sum(p.numel() for p in parameters)

    if strategy == "fsdp":
        n = mesh["dp_shard"]
        state(count(everything) / n, "P / n", "fsdp/README.md")
        reshard = config.fsdp.reshard_after_forward
        sharding(count(everything), count(blocks), n, "dp_shard", reshard, "fsdp/README.md")
    elif strategy == "tensor":
        dp, tp = mesh["dp_shard"], mesh["tp"]
        source = "model_parallel/README.md"

        def slices(parameters: list[torch.Tensor]) -> float:
            return sum(p.numel() / (tp if p.ndim > 1 else 1) for p in parameters)

        state(slices(everything) / dp, "P' / dp, P' = matrices / tp + norms", source)
        if dp > 1:
            sharding(slices(everything), slices(blocks), dp, "dp", True, "fsdp/README.md, of slices P'")
        if not config.train.activation_checkpointing and config.sequence_parallel:
            each = micro_batches * (2 + 4 * layers)
            for kind in ("all-gather", "reduce-scatter"):
                words = "m (2 + 4 L); each b s w"
                collective(kind, "tp", each, each * low * hidden, words, source)
    elif strategy == "context":
        state(count(everything) / world_size, "P / (dp cp)", "fsdp/README.md")
        sharding(count(everything), count(blocks), world_size, "world", True, "fsdp/README.md")
        if not config.train.activation_checkpointing:
            of_a_token = 2 * config.model.kv_heads * config.model.head_size  # keys and values
            nbytes = micro_batches * layers * low * micro_size * config.data.sequence_length * of_a_token
            for kind in ("all-gather", "reduce-scatter"):
                words = f"m L; {low} m L 2 b kv h s"
                collective(kind, "cp", micro_batches * layers, nbytes, words, "model_parallel/README.md")
    elif strategy == "pipeline":
        stages = world_size * config.stages_per_rank
        mine = range(rank, stages, world_size)
        ends = [-(-layers * stage // stages) for stage in range(stages + 1)]  # equal parts; where not, the last is less
        of_ends = config.model.vocabulary * config.model.width  # embedding, and head, which has a norm before it
        numbers = sum(ends[n + 1] - ends[n] for n in mine) * count(blocks) // layers
        numbers += of_ends * (0 in mine) + (of_ends + config.model.width) * (stages - 1 in mine)
        state(numbers, "P of its stages", "model_parallel/README.md")
        each = micro_batches * sum(1 if n in (0, stages - 1) else 2 for n in mine)
        nbytes = each * size * hidden
        for kind in ("send", "receive"):
            words = "m for each neighbour of a stage; 4 b s w each"
            collective(kind, "world", each, nbytes, words, "from_scratch/README.md")
    return formulas


def human(nbytes: float) -> str:
    return f"{nbytes / 2**30:,.2f} GiB" if nbytes >= 2**30 / 10 else f"{nbytes / 2**20:,.2f} MiB"


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    batches = "1 micro-batch" if report["micro_batches"] == 1 else f"{report['micro_batches']} micro-batches"
    micro = f"{batches} of {report['micro_size']} × {report['sequence_length']} tokens"
    lines = [
        f"{report['script']} on {report['world_size']} fake ranks, seen from rank {report['rank']}; a step of {micro}",
        report["said"],
        f"\n{'bytes on this rank':24}{'counted':>20}{'':14}{'formula':>20}",
    ]
    formulas = report["formulas"]
    for name, nbytes in report["bytes"].items():
        line = f"{name:24}{nbytes:>20,}{human(nbytes):>14}"
        if found := formulas.get(name):
            line += f"{found['value']:>20,.0f}   {found['formula']} ({found['source']})"
        lines.append(line)
    held = ", ".join(f"{kind} {human(n)}" for kind, n in report["peak"]["held"].items() if n >= 0.001 * 2**20)
    lines += [
        f"the peak comes in: {report['peak']['when']}",
        f"it consists of: {held}",
        f"\n{'collectives of a step':16}{'axis':>11}{'ranks':>7}{'count':>8}{'formula':>9}{'bytes':>18}{'formula':>18}"
        f"{'sent in a ring':>18}",
    ]
    for row in report["collectives"]:
        count, nbytes = (formulas.get(f"{row['kind']} {row['axis']} {what}") for what in ("count", "bytes"))
        lines.append(
            f"{row['kind']:21}{row['axis']:>11}{row['ranks']:>7}{row['count']:>8,}"
            f"{format(count['value'], ',.0f') if count else '-':>9}{row['bytes']:>18,}"
            f"{format(nbytes['value'], ',.0f') if nbytes else '-':>18}"
            f"{'-' if row['sent_bytes'] is None else format(row['sent_bytes'], ','):>18}"
        )
    lines += [f"note: {note}" for note in report["notes"]]
    return "\n".join([*lines, f"{report['seconds']} s without a single real tensor"])


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(f"command line: {message}; see --help; settings of the script come after --")


def main() -> None:
    usage = "%(prog)s SCRIPT --world_size N [options] [-- settings of the script]"
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("planner/dry_run.py", usage, description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("script", type=to_path, help="a lesson's script, such as fsdp/train.py")
    parser.add_argument("--world_size", type=int, required=True, help="how many ranks there are to be")
    parser.add_argument("--rank", type=int, default=0, help="the rank to look at: stages of a pipeline differ")
    parser.add_argument(
        "--micro_batches", type=int, help="at most so many a step: two show all there is to see; of a pipeline more"
    )
    parser.add_argument("--device_memory_gib", type=float, help="say so if the peak is larger than this")
    parser.add_argument("--json", type=to_path, help="write the report to this file, too")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, of_script = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    if options.world_size < 1 or not 0 <= options.rank < options.world_size:
        found = f"--rank {options.rank} with --world_size {options.world_size}"
        fail(f"{found}; expected 0 <= rank < world size, which is at least 1; change one")
    if options.micro_batches is not None and options.micro_batches < 1:
        fail(f"--micro_batches {options.micro_batches}; expected 1 or more; leave it out for all")
    started = time.perf_counter()
    measured = DryRun(options.script, options.world_size, options.rank, options.micro_batches).run(of_script)
    found = report(measured, of_script, time.perf_counter() - started)
    if options.device_memory_gib and found["bytes"]["peak"] > options.device_memory_gib * 2**30:
        peak = found["bytes"]["peak"]
        least = peak - found["peak"]["held"].get(ACTIVATIONS, 0)
        found["notes"].append(
            f"the peak, {human(peak)}, exceeds the device's {options.device_memory_gib:g} GiB ({human(least)} of it "
            f"are not activations): try activation checkpointing, a smaller micro-batch, more ranks, or another "
            f"strategy"
        )
    print(table(found))
    if options.json:
        try:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
        except OSError as error:
            fail(f"--json {options.json}: {error.strerror}; choose a file that you can write")


if __name__ == "__main__":
    main()
