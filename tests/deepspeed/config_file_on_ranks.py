"""DeepSpeed's files, read one after the other on a rank that has imported DeepSpeed."""

import contextlib
import io
from pathlib import Path

from own_folder import own_folder
from rank_worker import starts_its_own_group

ROOT = Path(__file__).resolve().parents[2]


@starts_its_own_group
def read_each(files: list[str]) -> list[tuple[int, str]]:
    """How reading each file ends: exit code, and what was written to stderr."""
    answers = []
    with own_folder(ROOT / "deepspeed/train.py"):
        import config_file

        for file in files:
            stderr, code = io.StringIO(), 0
            with contextlib.redirect_stderr(stderr):
                try:
                    config_file.read(Path(file))
                except SystemExit as ended:
                    code = ended.code
            answers.append((code, stderr.getvalue()))
    return answers
