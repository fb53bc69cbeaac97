"""Python, the packages, and what is imported in their place.

Nothing here imports torch or another heavy package into this process: a broken installation is what is looked for,
and one import that crashes must not take the other checks along. They are imported in a process of their own.
"""

from __future__ import annotations  # so that an old Python gets as far as being told that it is too old

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from doctor_results import ROOT, Result, ok, problem, warning

MODULES = {  # what is imported, and under which name; other packages are only tools, whose version is enough
    "torch": "torch", "torchvision": "torchvision", "numpy": "numpy", "PyYAML": "yaml", "tqdm": "tqdm",
    "psutil": "psutil", "matplotlib": "matplotlib", "scikit-learn": "sklearn", "setuptools": "setuptools",
    "transformers": "transformers", "safetensors": "safetensors", "torchdata": "torchdata",
    "tensorboard": "tensorboard",
}  # fmt: skip
FRAMEWORKS = ("deepspeed", "lightning", "horovod", "jax", "nemo")  # folders of lessons that bear a library's name
OLDEST_TORCH = (2, 11)
INSTALL = "make venv, or pip install -r requirements.txt"


def check_python() -> list[Result]:
    """Version of Python, and which environment it belongs to."""
    if sys.prefix != sys.base_prefix:
        kind = "a virtual environment"
    else:
        kind = "a conda environment" if (Path(sys.prefix) / "conda-meta").is_dir() else "no environment of its own"
    found = f"Python {platform.python_version()}, {sys.prefix} ({kind})"
    if sys.version_info < (3, 11):  # noqa: UP036
        return [problem("python", found, "install Python 3.11 or newer: make venv PYTHON=python3.12")]
    active = os.environ.get("VIRTUAL_ENV") or os.environ.get("CONDA_PREFIX")
    if active and Path(active).resolve() != Path(sys.prefix).resolve():
        return [warning("python", f"{found}, while {active} is active", "start the python of the one you mean")]
    return [ok("python", found)]


def pins(*files: str) -> dict[str, str]:
    """Package → exact version, as the requirement files in the repository's root name them."""
    lines = [line for file in files for line in (ROOT / file).read_text().splitlines()]
    return dict(match.groups() for line in lines if (match := re.match(r"([\w.-]+)==([^\s#;]+)", line)))


def release(version: str) -> str:
    """`2.15.0+cu132` → `2.15.0`: the part after + names the build."""
    return version.split("+")[0]


def installed(name: str) -> str | None:
    """Version of an installed package, by its metadata."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def check_packages() -> list[Result]:
    """Installed versions against the pinned ones."""
    lesson = pins("requirements-lesson.txt")
    everything = lesson | pins("requirements.txt")
    results, missing, good = [], [], 0
    for name, pinned in everything.items():
        found = installed(name)
        if found is None and name in lesson:
            results.append(problem("packages", f"{name} is not installed", INSTALL))
        elif found is None:
            missing.append(name)
        elif name == "torch" and tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST_TORCH:
            older = f"torch {found} is older than 2.11, which the lessons need"
            results.append(problem("packages", older, f"pip install torch=={pinned}"))
        elif release(found) != pinned:
            advice = f"pip install {name}=={pinned}, unless you chose {found} on purpose"
            results.append(warning("packages", f"{name} {found} is installed, {pinned} is pinned", advice))
        else:
            good += 1
    if missing:
        found = f"not installed: {', '.join(missing)}; the DDP lesson works without"
        results.append(warning("packages", found, INSTALL))
    return results or [ok("packages", f"{good} of {len(everything)} as pinned in requirements.txt")]


IMPORTER = """
import importlib, json, os, sys
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what a package prints must not get among the answers
for name in sys.argv[1:]:
    print("?", name, file=out, flush=True)
    answer = {}
    try:
        module = importlib.import_module(name)
        answer = {"file": getattr(module, "__file__", None), "version": getattr(module, "__version__", None)}
    except BaseException as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print("!", json.dumps(answer), file=out, flush=True)
"""


def import_all(modules: list[str], timeout_s: float = 300) -> dict[str, dict]:
    """Import each module in a process that may die: name → {file, version} or {error}.

    `-P` keeps the working directory off the path, as it is when a script of a lesson is started.
    """
    answers: dict[str, dict] = {}
    left, deadline = list(modules), time.monotonic() + timeout_s
    while left:
        command = [sys.executable, "-P", "-c", IMPORTER, *left]
        try:
            seconds = max(1.0, deadline - time.monotonic())
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=seconds, stdin=subprocess.DEVNULL
            )
            text, end = done.stdout, f"the import killed Python (exit status {done.returncode})"
        except subprocess.TimeoutExpired as error:
            text, end = (error.stdout or b"").decode(errors="replace"), f"the import took longer than {timeout_s:g} s"
        tried = None
        for line in text.splitlines():
            mark, _, rest = line.partition(" ")
            if mark == "?":
                tried = rest
            elif tried:
                answers[tried], tried = json.loads(rest), None
        dead = tried or next((name for name in left if name not in answers), None)
        if dead:  # go on behind it
            answers[dead] = {"error": end}
        left = [name for name in left if name not in answers]
    return answers


def check_imports() -> list[Result]:
    """Does each package import, is it the version that was installed, and from the place where it was installed?"""
    everything = pins("requirements-lesson.txt", "requirements.txt")
    present = {name: module for name, module in MODULES.items() if installed(name) is not None}
    answers = import_all([*present.values(), "common"])
    found = f"{len(answers)} packages, each from its place"
    return judge_imports(present, answers, everything) or [ok("imports", found)]


def judge_imports(present: dict[str, str], answers: dict[str, dict], pinned: dict[str, str]) -> list[Result]:
    """What is wrong with the answers of `import_all`, for the installed packages `present` (name → module)."""
    strays, broken = [], []  # the first are often the cause of the second
    for name, module in present.items():
        answer, version = answers[module], installed(name) or ""
        place = Path(str(metadata.distribution(name).locate_file(""))).resolve()
        if error := answer.get("error"):
            found = f"{module} does not import: {' '.join(error.split())[:200]}"
            advice = f"mend what is said above, or pip install --force-reinstall {name}=={pinned.get(name, version)}"
            if "torchvision::nms" in error:
                found = f"{found}: torch {installed('torch')} and torchvision {version} are not built for each other"
                both = " ".join(f"{name}=={pinned[name]}" for name in ("torch", "torchvision"))
                advice = f"pip install {both}, both from one index; until then lightning and transformers break too"
            broken.append(problem("imports", found, advice))
        elif not answer["file"] or not Path(answer["file"]).resolve().is_relative_to(place):
            where = answer["file"] or "a folder without __init__.py"
            found = f"{module} is loaded from {where}, in place of {name} {version} in {place}"
            strays.append(problem("imports", found, "rename it, or take its parent out of PYTHONPATH"))
        elif answer["version"] and release(answer["version"]) != release(version):
            found = f"{module} is loaded as {answer['version']}, but its metadata say {version}: two copies are mixed"
            strays.append(problem("imports", found, f"pip uninstall {name} until it is gone, then install it once"))
    common = answers["common"]
    if "error" in common:
        broken.append(problem("imports", f"common does not import: {common['error']}", "pip install -e ."))
    elif Path(common["file"] or "").resolve().parent != ROOT / "common":
        found = f"common is loaded from {common['file']}, not from this checkout"
        strays.append(problem("imports", found, "pip install -e . in the checkout that you work in"))
    return strays + broken


def check_shadows(root: Path = ROOT) -> list[Result]:
    """Files of the repository that would be imported in the place of a library with the same name."""
    names = {*MODULES.values(), *FRAMEWORKS}
    folders = [root, *(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))]
    found = []
    for folder in folders:
        for name in names:
            found += [p for p in (folder / f"{name}.py", folder / name / "__init__.py") if p.is_file()]
    if not found:
        return [ok("shadows", "nothing in the repository hides a library")]
    advice = "rename it; folders named like a library must not hold an __init__.py"
    return [problem("shadows", f"{path.relative_to(root)} hides a library", advice) for path in sorted(found)]
