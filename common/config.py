"""Settings: a YAML or JSON file, then the command line, into dataclasses; strict.

    torchrun --nproc-per-node=2 ddp/train.py --config ddp/configs/gpt_124m.yaml --train.steps 50

In settings that name a file or folder, `~`, `$NAME` and `${NAME}` are replaced as a shell does.
The sections stand beside the code that they configure (`ModelConfig` in `transformer.py`, `OptimizerConfig` in
`optimizer.py` …). A lesson that needs more derives its own class from `Config` or `RunConfig` and calls `parse` on it.
A key that does not exist, a value of the wrong type and a value that cannot work end the program with one line and
exit code 2, on every rank, before any process group exists.
"""

import dataclasses
import difflib
import json
import os
import re
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import yaml

from common.config_fields import PathText, Setting, expand_path, find_settings, help_text, type_hints
from common.data import TextConfig
from common.data_sharding import BatchConfig
from common.launching import same_start
from common.optimizer import OptimizerConfig
from common.ranks import fail
from common.runs.manifest import CheckpointConfig
from common.runs.records import read_settings
from common.strict_files import read_json, read_yaml
from common.transformer import ModelConfig

COMMAND_LINE = "command line"  # where a value stands, in messages, unless it stands in a file
ConfigT = TypeVar("ConfigT")


@dataclass
class TrainConfig:
    """How long to train, in which arithmetic, and what to look at on the way."""

    steps: int = 120
    """Optimizer steps of the whole training, whatever the world size."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """bf16 and fp16 compute in autocast over fp32 weights; fp64 holds everything in double, for proofs."""
    tf32: bool = False
    """Let fp32 matmuls and convolutions round their factors to TF32 (10 bits, 8 times as fast) on NVIDIA GPUs."""
    compile: bool = False
    """Compile the model with torch.compile (the transformer block by block)."""
    activation_checkpointing: bool = False
    """Recompute the activations of each block in backward instead of keeping them."""
    log_every: int = 10
    """Steps between two printed metric lines (and points in TensorBoard); metrics.jsonl gets every step."""
    eval_every: int = 0
    """Steps between two evaluations; 0 evaluates once, at the end."""
    check_replicas_every: int = 50
    """Steps between two checks that all ranks hold the same weights; 0 never checks."""

    def __post_init__(self) -> None:
        _check(self.steps >= 1, "train.steps", self.steps, "at least 1")
        _check(self.log_every >= 1, "train.log_every", self.log_every, "at least 1")
        _check(self.eval_every >= 0, "train.eval_every", self.eval_every, "0 (only at the end) or more")
        _check(self.check_replicas_every >= 0, "train.check_replicas_every", self.check_replicas_every, "0 or more")


@dataclass
class RunConfig:
    """The settings that every training script has, whatever it trains."""

    train: TrainConfig = field(default_factory=TrainConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: PathText = "auto"
    """auto: go on where the run of this name stopped, if there is one; never: refuse a run name that exists; or the
    folder of a run or of one checkpoint to start from."""
    seed: int = 1234
    """Decides the initial weights and the order of the data."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: this rank's GPU if there is one, else the CPU, unless the variable DEVICE says which."""
    run_name: str | None = None
    """Name of the folder under runs_dir; by default made unique, and under Slurm made of the job id."""
    runs_dir: PathText = field(default_factory=lambda: os.environ.get("RUNS_DIR") or "runs")
    """Where run folders go (default: the variable RUNS_DIR, else runs)."""
    timeout_s: float = 600.0
    """Seconds after which a collective that a rank did not enter becomes an error."""
    network_profile: str = "default"
    """Which NCCL and Gloo variables to set; see python slurm/network.py --explain."""
    tensorboard: bool = False
    """Also write curves into the run folder for TensorBoard: tensorboard --logdir runs."""
    wandb: bool = False
    """Also log to Weights & Biases (needs the package, and its key in the environment)."""

    def __post_init__(self) -> None:
        _check(0 < self.timeout_s <= 1e6, "timeout_s", self.timeout_s, "more than 0, at most 1e6")
        if self.run_name is not None:
            legal = re.fullmatch(r"[\w][\w.=+-]*", self.run_name)
            _check(bool(legal), "run_name", self.run_name, "letters, digits and . _ = + - (it names a folder)")


@dataclass
class Config(RunConfig):
    """The settings of the scripts that train the transformer on text."""

    data: TextConfig = field(default_factory=TextConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        longest = f"at most model.max_sequence = {self.model.max_sequence}; set that too for more"
        length = self.data.sequence_length
        _check(length <= self.model.max_sequence, "data.sequence_length", length, longest)


def _check(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{key} = {value!r} cannot work; allowed: {allowed}")


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_file(path: str) -> dict[str, Any]:
    """Return the settings of a YAML or JSON file by dotted name, not checked yet."""
    try:
        file = expand_path(path)
        if not os.path.isfile(file):
            found = "is no file" if os.path.lexists(file) else "does not exist"
            fail(f"config file {path} {found} (looked in {os.path.dirname(os.path.abspath(file))})")
        tree = (read_json if file.endswith(".json") else read_yaml)(file)
    except ValueError as error:
        fail(str(error))
    if not isinstance(tree, dict | None):
        fail(f"{path}: expected settings such as 'train: {{steps: 50}}', found {tree!r:.60}")
    pairs = list(_flatten(tree or {}))
    flat = dict(pairs)
    for key in flat if len(flat) < len(pairs) else ():
        if sum(name == key for name, _ in pairs) > 1:
            fail(f"{path}: {key} is given twice, by its dotted name and in its section; keep one")
    return flat


def _read_command_line(arguments: list[str]) -> list[tuple[str, str | None]]:
    """Return key and text of each `--key value` and `--key=value`, None where no value follows."""
    pairs: list[tuple[str, str | None]] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            fail(f"command line: unexpected {word!r}; expected --key value or --key=value")
        key, equals, text = word[2:].partition("=")
        follows = words and not words[0].startswith("--") and key != "print_config"
        pairs.append((key, text if equals else words.pop(0) if follows else None))
    return pairs


def _fail_unknown(source: str, key: str, value: object, names: list[str]) -> NoReturn:
    """End the program with a line that names the unknown key, its value, the nearest setting and its neighbors."""
    leaf = {name.rsplit(".", 1)[-1]: name for name in names}
    near = difflib.get_close_matches(key, names, 1, 0.6) or [
        leaf[match] for match in difflib.get_close_matches(key.rsplit(".", 1)[-1], leaf, 1, 0.6)
    ]
    section = key.rpartition(".")[0]
    allowed = [name for name in names if name.rpartition(".")[0] == section] or names
    hint = f"; did you mean {near[0]}?" if near else ";"
    fail(f"{source}: unknown key {key} (value {value!r}){hint} allowed here: {', '.join(allowed)}")


def _read_value(source: str, key: str, value: Any, settings: dict[str, Setting]) -> Any:
    """Return a value as the type of its setting; end the program if the setting does not exist or cannot have it."""
    if inside := [name for name in settings if name.startswith(f"{key}.")]:
        fail(f"{source}: {key} = {value!r}, but {key} is a section; expected settings in it, such as {inside[0]}")
    if above := [name for name in settings if key.startswith(f"{name}.")]:
        fail(f"{source}: {key} = {value!r:.60}, but {above[0]} is no section; allowed: {settings[above[0]].allowed}")
    if key not in settings:
        _fail_unknown(source, key, value, list(settings))
    setting = settings[key]
    try:
        return setting.convert_text(value) if source == COMMAND_LINE else setting.convert(value)
    except (ValueError, OverflowError) as error:
        shown = value if isinstance(value, str) and value else json.dumps(value, default=str)
        reason = f" ({error})" if str(error) else ""
        advice = "; put it in quotes" if setting.hint is str and not isinstance(value, str | list | dict) else ""
        allowed = f"allowed: {setting.allowed}{advice}"
        fail(f"{source}: {key} = {shown:.80} has the wrong type or value{reason}; {allowed}")


def _build(config_class: type[ConfigT], values: dict[str, Any], prefix: str = "") -> ConfigT:
    """Return the config, with the values by dotted name given to it and to its sections."""
    given: dict[str, Any] = {}
    fields, hints = dataclasses.fields(typing.cast(Any, config_class)), type_hints(typing.cast(Any, config_class))
    for item in fields:
        name = prefix + item.name
        if dataclasses.is_dataclass(hints[item.name]):
            given[item.name] = _build(hints[item.name], values, f"{name}.")
        elif name in values:
            given[item.name] = values[name]
    return config_class(**given)


def resolve(config_class: type[ConfigT], given: list[tuple[str, str, Any]]) -> ConfigT:
    """Return the config of what is given as (source, key, value), the last of a key; what cannot work ends the program.

    A path that comes from the environment by default is expanded like one that is given.
    """
    settings = find_settings(config_class)
    sections = {name.rpartition(".")[0] for name in settings}
    given = [(source, key, value) for source, key, value in given if not (key in sections and value in (None, {}))]
    paths = {key: setting.value for key, setting in settings.items() if setting.is_path and setting.value}
    keys = {key for _, key, _ in given}
    defaults = [("default", key, value) for key, value in paths.items() if key not in keys]
    values = {key: _read_value(source, key, value, settings) for source, key, value in defaults + given}
    try:
        config = _build(config_class, values)
        for key, value in _flatten(to_dict(config)):
            for item in value if isinstance(value, list) else [value]:
                _check(not isinstance(item, int | float) or item >= 0, key, value, "0 or more")
    except ValueError as error:  # from the __post_init__ of a section
        sources = [source for source, key, _ in given if key in str(error)] or [source for source, *_ in given]
        fail(f"{', '.join(dict.fromkeys(sources)) or 'defaults'}: {error}")
    return config


def parse(config_class: type[ConfigT], arguments: list[str] | None = None) -> ConfigT:
    """Read the settings: the defaults of `config_class`, then `--config FILE`, then overrides (`--train.steps 50`).

    Args:
        config_class: a dataclass whose fields have defaults, and are values or dataclasses (sections).
        arguments: the command line without the program's name; `sys.argv[1:]` by default. The `--local_rank=N` that
            some launchers add is accepted and ignored: `common.ranks` reads the environment.

    Raises:
        SystemExit: exit code 2 after one line that names file, key, value, what is allowed, and the nearest key; exit
            code 0 after `--help` or `--print_config`, which print.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    arguments = [a for a in arguments if not re.fullmatch(r"--local[-_]rank=\d+", a)]
    if "--help" in arguments or "-h" in arguments:
        print(help_text(config_class))
        raise SystemExit(0)
    settings = find_settings(config_class)
    flags = _read_command_line(arguments)
    for key, text in flags:
        if (text is None and key in settings) or (not text and key == "config"):
            fail(f"{COMMAND_LINE}: --{key}: expected one argument")
    given = [(str(file), *pair) for flag, file in flags if flag == "config" for pair in _read_file(str(file)).items()]
    given += [(COMMAND_LINE, key, text or "") for key, text in flags if key not in ("config", "print_config")]
    config = resolve(config_class, given)
    if "print_config" in dict(flags):
        print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
        raise SystemExit(0)
    same_start.note(same_start.of_settings(to_dict(config)))
    return config


def runs_dir() -> Path:
    """Return the folder for new runs: the variable RUNS_DIR, else runs. SystemExit: a variable in it is not set."""
    return Path(resolve(RunConfig, []).runs_dir)


def read_run_config(folder: Path) -> Config:
    """Read what an evaluation needs from a run's config.yaml: model, data, batch, seed and train.precision.

    Other settings have their defaults. A run's script may have sections of its own (fsdp, mesh, deepspeed …).

    Raises:
        ValueError: the run's model is no transformer, its data are no text, or the file is damaged.
        SystemExit: (exit code 2) the file is not valid YAML, or has values that cannot work.
    """
    read_settings(folder)  # a crash leaves an empty file, which would be all defaults
    path = str(folder / "config.yaml")
    wanted = ("model", "data", "batch", "seed", "train.precision")
    given = [(path, key, value) for key, value in _read_file(path).items() if key.startswith(wanted)]
    if unknown := {key for _, key, _ in given} - {*find_settings(Config), "model", "data", "batch"}:
        raise ValueError(f"{path}: {min(unknown)} is no setting of a transformer that trains on text")
    return resolve(Config, given)


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved settings as plain dicts, lists and values, as config.yaml holds them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
