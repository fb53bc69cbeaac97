"""Settings: a YAML or JSON file, then the command line, into dataclasses; strict.

    torchrun --nproc-per-node=2 ddp/train.py --config ddp/configs/gpt_124m.yaml --train.steps 50

The sections stand beside the code that they configure (`ModelConfig` in `transformer.py`, `OptimizerConfig` in
`optimizer.py` …). A lesson that needs more derives its own class from `Config` or `RunConfig` and calls `parse` on it.
jsonargparse does the parsing; a key that does not exist, a value of the wrong type and a value that cannot work end
the program with one line and exit code 2, on every rank, before any process group exists.
"""

import dataclasses
import difflib
import itertools
import json
import os
import re
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from common.data import TextConfig
from common.data_sharding import BatchConfig
from common.manifest import CheckpointConfig
from common.optimizer import OptimizerConfig
from common.ranks import fail
from common.transformer import ModelConfig

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the text under a field is its --help


@dataclass
class TrainConfig:
    """How long to train, in which arithmetic, and what to look at on the way."""

    steps: int = 120
    """Optimizer steps of the whole training, whatever the world size."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """bf16 and fp16 compute in autocast over fp32 weights; fp64 holds everything in double, for proofs."""
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
    resume: str = "auto"
    """auto: go on where the run of this name stopped, if there is one; never: refuse a run name that exists; or the
    folder of a run or of one checkpoint to start from."""
    seed: int = 1234
    """Decides the initial weights and the order of the data."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: this rank's GPU if there is one, else the CPU, unless the variable DEVICE says which."""
    run_name: str | None = None
    """Name of the folder under runs_dir; by default made unique, and under Slurm made of the job id."""
    runs_dir: str = field(default_factory=lambda: os.environ.get("RUNS_DIR", "runs"))
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
        _check(self.timeout_s > 0, "timeout_s", self.timeout_s, "more than 0")
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


def _fields(config_class: type, prefix: str = "") -> dict[str, dataclasses.Field[Any]]:
    """Every setting of a config class by its dotted name, sections included."""
    found: dict[str, dataclasses.Field[Any]] = {}
    types = typing.get_type_hints(config_class)
    for item in dataclasses.fields(config_class):
        found[prefix + item.name] = item
        if dataclasses.is_dataclass(types[item.name]):
            found |= _fields(types[item.name], f"{prefix}{item.name}.")
    return found


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _unknown_key(source: str, key: str, value: object, known: dict[str, dataclasses.Field[Any]]) -> str:
    names = [name for name in known if not any(other.startswith(f"{name}.") for other in known)]
    leaf = {name.rsplit(".", 1)[-1]: name for name in names}
    near = difflib.get_close_matches(key, names, 1, 0.6) or [
        leaf[match] for match in difflib.get_close_matches(key.rsplit(".", 1)[-1], leaf, 1, 0.6)
    ]
    section = key.rpartition(".")[0]
    allowed = [name for name in names if name.rpartition(".")[0] == section] or names
    hint = f"; did you mean {near[0]}?" if near else ";"
    return f"{source}: unknown key {key} (value {value!r}){hint} allowed here: {', '.join(allowed)}"


def _config_files(arguments: list[str]) -> list[str]:
    follows = [value for flag, value in itertools.pairwise(arguments) if flag == "--config"]
    return follows + [a.split("=", 1)[1] for a in arguments if a.startswith("--config=")]


def _find_unknown(arguments: list[str], known: dict[str, dataclasses.Field[Any]]) -> str | None:
    """Look for keys that do not exist, in the files first; jsonargparse finds them too, but suggests nothing."""
    for path in _config_files(arguments):
        if not Path(path).is_file():
            return f"config file {path} does not exist (looked in {Path(path).resolve().parent})"
        try:
            tree = yaml.safe_load(Path(path).read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            return f"{path}: not valid YAML or JSON: {error}"
        if not isinstance(tree, dict | None):
            return f"{path}: expected settings such as 'train: {{steps: 50}}', found {tree!r:.60}"
        for key, value in _flatten(tree or {}).items():
            if key not in known:
                return _unknown_key(path, key, value, known)
    for position, argument in enumerate(arguments):
        key, equals, value = argument[2:].partition("=")
        if argument.startswith("--") and key not in known and key not in ("config", "help", "print_config"):
            return _unknown_key("command line", key, value if equals else "".join(arguments[position + 1 :][:1]), known)
    return None


def _explain(message: str, parser: ArgumentParser, arguments: list[str]) -> str:
    """Turn a parser's message into one line that says where the wrong value stands and what is allowed there."""
    source = "command line"
    for path in _config_files(arguments):
        try:
            parser.parse_path(path)
        except (ArgumentError, ValueError, TypeError):
            source = path
            break
    if found := re.search(r'key "([\w.]+)".*?Expected an? (.*?)\. Got value: (.*)', message, re.DOTALL):
        key, allowed, value = found.groups()
        allowed = re.sub(r"<class '(\w+)'>|typing\.|Literal\[(.*)\]", r"\1\2", allowed)
        return f"{source}: {key} = {value.strip()} has the wrong type or value; allowed: {allowed}"
    if found := re.search(r'key "([\w.]+)".*Subtypes: \[(.*?)\]\n.*Given value: (.*)', message, re.DOTALL):
        key, allowed, value = found.groups()
        allowed = re.sub(r"<class '(\w+)'>", r"\1", allowed).replace("NoneType", "null")
        return f"{source}: {key} = {value.strip()} has the wrong type; allowed: {allowed}"
    return f"{source}: {message}"


ConfigT = TypeVar("ConfigT")


def parse(config_class: type[ConfigT], arguments: list[str] | None = None) -> ConfigT:
    """Read the settings: the defaults of `config_class`, then `--config FILE`, then overrides (`--train.steps 50`).

    Args:
        config_class: a dataclass whose fields are values or dataclasses.
        arguments: the command line without the program's name; `sys.argv[1:]` by default. The `--local_rank=N` that
            some launchers add is accepted and ignored: `common.ranks` reads the environment.

    Raises:
        SystemExit: exit code 2 after one line that names file, key, value, what is allowed, and the nearest key.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    arguments = [a for a in arguments if not re.fullmatch(r"--local[-_]rank=\d+", a)]
    known = _fields(config_class)
    if unknown := _find_unknown(arguments, known):
        fail(unknown)
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a YAML or JSON file with settings")
    parser.add_class_arguments(config_class, fail_untyped=True)
    # A section's default instance may have filled in values (a model preset fills the sizes); start from what the
    # fields say, so that an override of the preset is not overruled by the sizes of the default one.
    defaults = {name: item.default for name, item in known.items() if item.default is not dataclasses.MISSING}
    parser.set_defaults(defaults)
    try:
        settings = parser.instantiate(parser.parse_args(arguments))
        return config_class(**{name: settings[name] for name in known if "." not in name})
    except ArgumentError as error:
        fail(_explain(str(error), parser, arguments))
    except (ValueError, TypeError) as error:  # from the __post_init__ of a section
        fail(f"{', '.join(_config_files(arguments)) or 'command line'}: {error}")


def read_run_config(folder: Path) -> Config:
    """Read what an evaluation needs from a run's config.yaml: model, data, batch, seed and train.precision.

    Other settings have their defaults. A run's script may have sections of its own (fsdp, mesh, deepspeed …).

    Raises:
        ValueError: the run's model is no transformer, its data are no text, or the file is not valid YAML.
    """
    path = folder / "config.yaml"
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    sections = {"model": ModelConfig, "data": TextConfig, "batch": BatchConfig}
    wanted = {name: tree.get(name, {}) for name in sections}
    if unknown := _flatten(wanted).keys() - _fields(Config):
        raise ValueError(f"{path}: {sorted(unknown)[0]} is no setting of a transformer that trains on text")
    precision = tree.get("train", {}).get("precision", "fp32")
    values = {name: section(**wanted[name]) for name, section in sections.items()}
    return Config(train=TrainConfig(precision=precision), seed=tree.get("seed", 1234), **values)


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved settings as plain dicts, lists and values, as config.yaml holds them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
