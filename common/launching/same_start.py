"""Do all ranks start alike? Two nodes with two copies of a file train one plausible curve, and it is the wrong one.

`common.config.parse` notes the settings here, and the functions that open data note what they found.
`common.ranks.join` compares settings, code and software as soon as the ranks have met, before a difference can make
them hang; `common.run.Run` compares settings and data before the first step.
"""

import hashlib
import json
import platform
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from common.ranks import Ranks

Facts = dict[str, str]  # by name, such as "setting optimizer.lr"

# Settings that may differ from rank to rank: what they name is a fact of the node, or of rank 0 alone. The content of
# the data is compared by its fingerprint.
MAY_DIFFER = {"runs_dir", "data.path", "data.workers", "network_profile", "nvme_path", "tensorboard", "wandb"}
PACKAGES = ("numpy", "transformers", "torchvision", "deepspeed", "lightning", "jax")  # compared where they are imported
ADVICE = {
    "version": "install the same environment on all nodes",
    "device": "give all ranks the same --device, and the variable DEVICE the same value on all nodes",
    "file": "give all nodes the same checkout",
    "setting": "start all ranks with the same command line and the same config files",
    "data": "copy the same data to all nodes",
}
_noted: Facts = {}  # not compared yet


def note(facts: Facts) -> None:
    """Keep facts that are known before the ranks have met, or where no `Ranks` is at hand."""
    _noted.update(facts)


def noted() -> Facts:
    """Return what was noted since the last comparison, and forget it."""
    facts = dict(_noted)
    _noted.clear()
    return facts


def at_start(device: torch.device) -> Facts:
    """Return what all ranks must have alike when they meet: software, kind of device, code, and what was noted."""
    loaded = {name: getattr(sys.modules.get(name), "__version__", None) for name in PACKAGES}
    versions = {"python": platform.python_version(), "torch": torch.__version__} | loaded
    facts = {f"version of {name}": str(version) for name, version in versions.items() if version}
    return facts | {"device type": device.type} | of_code() | noted()


def of_code() -> Facts:
    """Return a digest of each Python file of the script's folder, of `common/`, and of other packages of the checkout
    that are imported."""
    common = Path(__file__).parents[1]
    packages = [common.parent / name for name in ("finetuning", "vision") if name in sys.modules]
    script = Path(sys.argv[0]).resolve()
    folders = dict.fromkeys([script.parent, common, common / "launching", common / "runs", *packages])
    files = [file for folder in folders for file in sorted(folder.glob("[!.]*.py"))]
    return {f"file {file.parent.name}/{file.name}": __digest_of(file) for file in files}


def of_settings(settings: dict[str, Any], prefix: str = "") -> Facts:
    """Return each setting that must be the same on all ranks, and a digest of each file that a setting names."""
    facts: Facts = {}
    for key, value in settings.items():
        name = prefix + key
        if isinstance(value, dict):
            facts |= of_settings(value, f"{name}.")
        elif name not in MAY_DIFFER:
            facts[f"setting {name}"] = json.dumps(value)
            for path in (Path(value), Path(value, "config.json")) if isinstance(value, str) else ():
                if len(value) < 1000 and path.is_file() and path.stat().st_size < 2**20:
                    facts[f"file {path}"] = __digest_of(path)
    return facts


def difference(ranks: "Ranks", facts: Facts) -> str | None:
    """Return the first difference between the ranks, with its values and ranks; None where all are alike.

    All ranks must call it, and get the same answer.
    """
    if len(set(ranks.all_gather(digest(json.dumps(facts, sort_keys=True).encode())))) == 1:
        return None
    return first_difference(ranks.all_gather((socket.gethostname(), facts)))


def first_difference(starts: list[tuple[str, Facts]]) -> str | None:
    """Return one line about the first fact that differs. `starts`: host and facts of each rank."""
    names = dict.fromkeys(name for _, facts in starts for name in facts)
    values = {name: [facts.get(name, "absent") for _, facts in starts] for name in names}
    # A package that some ranks have not imported is no difference: what needs it may run on rank 0 alone.
    ignored = {name: {"absent"} if name.startswith("version ") else set() for name in names}
    different = [name for name in names if len(set(values[name]) - ignored[name]) > 1]
    if not different:
        return None
    name = different[0]
    shown = []
    for value in dict.fromkeys(values[name]):
        places = [f"{rank} ({host})" for rank, (host, _) in enumerate(starts) if values[name][rank] == value]
        more = f" and {len(places) - 4} more" if len(places) > 4 else ""
        shown.append(f"{value} on rank {', '.join(places[:4])}{more}")
    others = f" ({len(different) - 1} more differ, such as {different[1]})" if len(different) > 1 else ""
    return f"the ranks were started differently: {name} is {'; '.join(shown)}{others}; {ADVICE[name.split()[0]]}"


def __digest_of(file: Path) -> str:
    try:
        return digest(file.read_bytes())
    except OSError as error:
        return str(error.strerror)


def digest(content: bytes) -> str:
    """Return a short hash, for a fact that is compared."""
    return hashlib.sha256(content).hexdigest()[:12]
