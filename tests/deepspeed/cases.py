"""What the ranks of a `group` run for the tests of deepspeed/: the scripts as they stand, one after the other."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
spec = importlib.util.spec_from_file_location("ddp_cases", ROOT / "tests" / "ddp" / "cases.py")
ddp = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ddp)


def forget_groups() -> None:
    """DeepSpeed keeps process groups in module variables; those of the script before are gone. Only tests need this."""
    if "deepspeed.comm.comm" in sys.modules:
        from deepspeed.utils import groups

        sys.modules["deepspeed.comm.comm"].cdb = None
        for name, value in vars(groups).items():
            if name.startswith("_") and name.isupper():
                setattr(groups, name, {} if isinstance(value, dict) else None)


def train(script: str, arguments: list[str]) -> None:
    """Run a script with these arguments on this rank."""
    forget_groups()
    ddp.train(script, arguments)


def train_until(script: str, arguments: list[str], steps: int) -> None:
    """The same, told to stop when `steps` steps are done."""
    forget_groups()
    ddp.train_until(script, arguments, steps)


def ends(script: str, arguments: list[str]) -> tuple[int, str]:
    """The same for a script that must end with a message: its exit code and that message."""
    forget_groups()
    return ddp.ends(script, arguments)


train.joins_itself = train_until.joins_itself = ends.joins_itself = True
