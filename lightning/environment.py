"""Says in one line that the package lightning is missing. Scripts import it first: an import of theirs would raise."""

from importlib import metadata

from common.ranks import fail

try:
    metadata.version("lightning")  # `import lightning` alone would find this folder where the package is missing
except metadata.PackageNotFoundError:
    fail("this lesson needs the package lightning; install the core environment: make venv, or pip install lightning")
