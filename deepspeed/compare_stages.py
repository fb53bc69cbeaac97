"""What each stage of ZeRO and each offload costs and saves: `finetune.py` once for each, and a table to fill.

    python deepspeed/compare_stages.py                                  # two processes on a laptop, a minute a row
    python deepspeed/compare_stages.py --ranks 4 --rounds 3 -- --model_path /path/to/model --batch.global_size 32
    python deepspeed/compare_stages.py --configs mine.json other.json   # the baseline and your own settings
    python deepspeed/compare_stages.py --ranks 8 --ranks-per-node 4 \\
        --launch "srun --nodes={nodes} --ntasks={ranks} --ntasks-per-node=4 python"          # inside a Slurm job
    python deepspeed/compare_stages.py --table runs/compare_stages/results.json              # the table again

Runs are called `2Z-4G2N`: stage 2, 4 processes (GPUs) a node, 2 nodes; `-offload` keeps the optimizer in host memory,
`-pinned` in memory that the GPU can read by itself, `-parameters` the parameters of stage 3, too. Each differs from the
one named beside it in one thing alone. Rounds are interleaved (all rows, then all again): a machine that slows
down harms all alike; the table shows medians over the rounds. What stands after `--` goes to `finetune.py`.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from stage_runs import measure
from stage_table import print_table, read_results

from common.config import runs_dir
from common.config_fields import to_path
from common.ranks import fail

CONFIGS = Path(__file__).with_name("configs")
OPTIMIZER, PARAMETERS = "offload_optimizer", "offload_param"
# name: (the row that it differs from, how; stage, sections of zero_optimization that are offloaded, pinned)
ROWS: dict[str, tuple[str | None, str, int | None, list[str], bool]] = {
    "DDP": (None, "Trainer without DeepSpeed", None, [], False),
    "0Z": ("DDP", "DeepSpeed's engine", 0, [], False),
    "1Z": ("0Z", "optimizer state cut up", 1, [], False),
    "1Z-offload": ("1Z", "optimizer in host memory", 1, [OPTIMIZER], False),
    "1Z-offload-pinned": ("1Z-offload", "pinned", 1, [OPTIMIZER], True),
    "2Z": ("1Z", "gradients cut up", 2, [], False),
    "2Z-offload": ("2Z", "optimizer in host memory", 2, [OPTIMIZER], False),
    "2Z-offload-pinned": ("2Z-offload", "pinned", 2, [OPTIMIZER], True),
    "3Z": ("2Z", "parameters cut up", 3, [], False),
    "3Z-offload": ("3Z", "optimizer in host memory", 3, [OPTIMIZER], False),
    "3Z-offload-pinned": ("3Z-offload", "pinned", 3, [OPTIMIZER], True),
    "3Z-offload-parameters": ("3Z-offload", "parameters in host memory", 3, [OPTIMIZER, PARAMETERS], False),
    "3Z-offload-parameters-pinned": ("3Z-offload-parameters", "pinned", 3, [OPTIMIZER, PARAMETERS], True),
}


def main() -> None:
    options, arguments = read_options()
    if options.table:
        return print_table(read_results(options.table))
    folder = options.output
    nodes = options.ranks // options.ranks_per_node
    place = f"{options.ranks_per_node}G{nodes}N"
    precision = value_of("--train.precision", arguments) or "fp32"
    if precision != "fp32" and "0Z" in options.rows and len(options.rows) > 1 and not options.configs:
        print(f"0Z is left out: without ZeRO DeepSpeed has another optimizer in {precision}")
        options.rows.remove("0Z")
    rows = own_rows(options.configs) if options.configs else standard_rows(options.rows, folder)
    if not value_of("--model_path", arguments):
        arguments = [*laptop_model(folder, options.width, options.layers), *arguments]
    results = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB",
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "nodes": nodes, "ranks": options.ranks,
        "arguments": arguments, "runs": [],
    }  # fmt: skip
    for number in range(options.rounds):
        for row in rows:
            name = f"{row['name']}-{place}"
            print(f"round {number + 1} of {options.rounds}: {name}", flush=True)
            found = measure(row, f"{name}-round{number + 1}", options, nodes, arguments)
            results["runs"].append({**row, "run": name, "round": number + 1, **found})
            (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")  # a stopped comparison is kept
    print_table(results, folder / "table.md")
    print(f"\n{folder}/results.json and table.md; the runs are beside them")


# ----------------------------------------------------------------------------------------------------- what to run


def read_options() -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and what stands after `--`."""
    given = sys.argv[1:]
    ours, theirs = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail  # type: ignore[method-assign]
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help=f"of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--configs", nargs="+", type=to_path, help="DeepSpeed's JSON files, instead of --rows")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--ranks-per-node", type=int, help="default: all of them")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--launch", help="a launcher's command with {ranks} and {nodes} in it (default: torchrun)")
    parser.add_argument("--output", type=to_path, help="a new folder (default: runs/compare_stages-<time>)")
    parser.add_argument("--width", type=int, default=512, help="of the random model, used without --model_path")
    parser.add_argument("--layers", type=int, default=4, help="likewise")
    parser.add_argument("--table", type=to_path, help="print the table of this results.json, and run nothing")
    options = parser.parse_args(ours)
    options.ranks_per_node = options.ranks_per_node or options.ranks
    if unknown := sorted(set(options.rows) - set(ROWS)):
        fail(f"--rows {' '.join(unknown)}: there is no such row; allowed: {', '.join(ROWS)}")
    if min(options.ranks, options.rounds, options.ranks_per_node) < 1 or options.ranks % options.ranks_per_node:
        fail(
            f"--ranks {options.ranks} --ranks-per-node {options.ranks_per_node} --rounds {options.rounds}: expected "
            f"numbers from 1 on, and as many ranks on each node"
        )
    if options.steps < 3:
        fail(f"--steps {options.steps}: expected at least 3; the first step is left out, and speed is a median")
    if options.table:
        return options, theirs
    if options.launch and not shutil.which(program := shlex.split(options.launch)[0]):
        fail(f"--launch {options.launch}: {program} is no program here; expected a launcher such as srun or mpirun")
    options.output = options.output or runs_dir() / f"compare_stages-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        options.output.mkdir(parents=True)
    except OSError as error:
        fail(f"--output {options.output}: {error.strerror}; give a new folder in a place that you can write to")
    return options, theirs


def value_of(name: str, arguments: list[str]) -> str | None:
    """What the arguments of `finetune.py` give for a setting, as `--name value` or `--name=value`."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    return dict(itertools.pairwise(words)).get(name)


def standard_rows(names: list[str], folder: Path) -> list[dict[str, Any]]:
    """The chosen rows; the files of those with offload are made from configs/zeroN.json, in `folder`."""
    rows = []
    for name in names:
        other, difference, stage, sections, pinned = ROWS[name]
        row = {"name": name, "differs_from": other, "by": difference, "config": None}
        if stage is not None:
            settings = json.loads((CONFIGS / f"zero{stage}.json").read_text())
            zero = settings["zero_optimization"]
            zero |= {section: {"device": "cpu", "pin_memory": pinned} for section in sections}
            row["config"] = str(folder / f"{name}.json")
            Path(row["config"]).write_text(json.dumps(settings, indent=1) + "\n")
        rows.append(row)
    return rows


def own_rows(files: list[Path]) -> list[dict[str, Any]]:
    """The baseline, and a row for each of the learner's files."""
    if missing := [str(file) for file in files if not file.is_file()]:
        fail(f"--configs {' '.join(missing)}: no such file; give JSON files with DeepSpeed's settings")
    if len({file.stem for file in files} | {"DDP"}) <= len(files):
        fail(f"--configs {' '.join(map(str, files))}: rows are called after their files; give each another name")
    first = {"name": "DDP", "differs_from": None, "by": ROWS["DDP"][1], "config": None}
    return [first, *({"name": f.stem, "differs_from": None, "by": str(f), "config": str(f)} for f in files)]


def laptop_model(folder: Path, width: int, layers: int) -> list[str]:
    """Write a model with random weights, large enough to be seen in memory; returns arguments that train it."""
    import torch
    from environment import deepspeed  # noqa: F401  (before transformers, which imports it, too)

    from finetuning.models import require
    from finetuning.tokens import load_tokenizer

    transformers = require("transformers")
    torch.manual_seed(0)
    hf_config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64 or 1, num_key_value_heads=width // 64 or 1, max_position_embeddings=256,
        eos_token_id=256, bos_token_id=None,
    )  # fmt: skip
    transformers.utils.logging.disable_progress_bar()
    model = transformers.LlamaForCausalLM(hf_config)
    model.save_pretrained(folder / "model")
    load_tokenizer(None).save_pretrained(folder / "model")
    print(f"a random model of {sum(p.numel() for p in model.parameters()):,} parameters: {folder}/model")
    return ["--model_path", str(folder / "model"), "--data.sequence_length", "96", "--batch.global_size", "8",
            "--optimizer.lr", "3e-4"]  # fmt: skip


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
