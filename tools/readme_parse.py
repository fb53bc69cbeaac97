"""Check README commands without running them: shell syntax, files, options, values of our own settings."""

import multiprocessing
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import slurm_options
from docs_markdown import DocsError
from readme_commands import Block, environment, logical_lines

LAUNCHERS = {"mpirun", "mpiexec", "horovodrun", "deepspeed", "accelerate", "nsys", "py-spy"}
WARM = multiprocessing.get_context("forkserver")
PREFIXES = {"time", "exec", "nohup", "do", "then", "else", "if", "while", "!"}


def parse_problems(root: Path, block: Block) -> list[str]:
    """What would go wrong with a block that is not run here: shell syntax, files, options, values."""
    shell = subprocess.run(["bash", "-n"], input=block.script, capture_output=True, text=True)
    if shell.returncode:
        return [f"{block.where}: {shell.stderr.strip()}"]
    problems: list[str] = []
    here_document = re.compile(r"<<-?\s*['\"]?(\w+)['\"]?.*?\n\1\b", re.DOTALL)
    for line in logical_lines(here_document.sub("", block.script)):
        try:
            for words in simple_commands(line):
                _check_command(root, words)
        except DocsError as error:
            problems.append(f"{block.where}: {error}")
        except ValueError as error:  # quotes over several lines
            problems.append(f"{block.where}: {line}: {error}; keep a quoted text on one line")
    return problems


def simple_commands(line: str) -> list[list[str]]:
    """The words of each command in a line, without redirections; `$(…)` counts as one unknown word."""
    lexer = shlex.shlex(re.sub(r"\$\([^()]*\)", "$X", line), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    skip = False
    for word in lexer:
        if re.fullmatch(r"[;&|()]+", word):
            commands.append([])
        elif re.fullmatch(r"[<>&]+", word):
            if commands[-1] and commands[-1][-1].isdigit():  # the 2 of 2>
                commands[-1].pop()
            skip = True
        elif skip:
            skip = False
        else:
            commands[-1].append(word)
    return [words for words in commands if words]


def _check_command(root: Path, words: list[str], variables: dict[str, str] | None = None) -> None:
    """`variables`: what stands before the command as NAME=value."""
    variables = dict(variables or {})
    _check_files(root, words)
    while words and (words[0] in PREFIXES or re.match(r"^\w+=", words[0])):
        name, equals, value = words[0].partition("=")
        variables |= {name: value} if equals else {}
        words = words[1:]
    if not words or words[0] in ("for", "done", "fi", "case", "esac"):
        return
    program, rest = Path(words[0]).name, words[1:]
    if program == "env":
        _check_command(root, [w for w in rest if not w.startswith("-")], variables)
    elif program in ("srun", "sbatch", "salloc"):
        try:
            _, words = slurm_options.take(program, rest)
            while words[:1] == [":"]:  # the next part of a heterogeneous job
                _, words = slurm_options.take(program, words[1:])
        except ValueError as error:
            raise DocsError(str(error)) from None
        if program == "sbatch" and words:
            _check_shell_script(root, words[0], words[1:], variables)
        elif words:
            _check_command(root, words, variables)
    elif program == "torchrun":
        script, script_arguments, module = after_torchrun_options(tuple(filled(rest)))
        if "CONFIG_FILE" in variables and "--config" not in script_arguments:  # the scripts of lightning/ read it
            script_arguments = ("--config", variables["CONFIG_FILE"], *script_arguments)
        check_python(root, script, script_arguments, module)
    elif re.fullmatch(r"python[\d.]*", program):
        _check_interpreter(root, rest)
    elif program in ("bash", "sh"):
        rest = rest[next((i for i, w in enumerate(rest) if not w.startswith("-")), len(rest)) :]
        if rest and "-c" not in words:
            _check_shell_script(root, rest[0], rest[1:], variables)
    elif program == "make":
        _check_make(root, rest)
    elif program in LAUNCHERS:
        at = next((i for i, word in enumerate(rest) if word.endswith(".py")), None)
        if at is not None:
            check_python(root, rest[at], tuple(filled(rest[at + 1 :])), module=False)
    elif (root / words[0]).is_file() and words[0].endswith((".sh", ".sbatch")):
        _check_shell_script(root, words[0], rest, variables)


def filled(words: list[str]) -> list[str]:
    """Words with every shell variable replaced by 1, so that options with a number still parse."""
    return [re.sub(r"\$(\{[^}]*\}|\w+)", "1", word) for word in words]


def _check_files(root: Path, words: list[str]) -> None:
    """Every word that looks like a file of ours must be one; `/path/to/…`, `~`, `$X` are the reader's."""
    for word in words:
        path = re.sub(r"^(-[\w.-]+|\w+)=", "", word)
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*\.(py|sh|sbatch|ya?ml|json|toml|ipynb|md|txt)", path):
            continue
        if not path.startswith(("runs/", "-")) and not (root / path).exists():
            raise DocsError(f"there is no file {path} (for one that readers bring, write /path/to/{path})")


@cache
def after_torchrun_options(words: tuple[str, ...]) -> tuple[str, tuple[str, ...], bool]:
    """(script, its arguments, is it a module) after torchrun's own options, by torchrun's own parser."""
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()

    def fail(message: str) -> None:
        raise DocsError(f"torchrun: {message}")

    parser.error = fail  # type: ignore[method-assign,assignment]
    parsed = parser.parse_args(list(words))
    return parsed.training_script, tuple(parsed.training_script_args), parsed.module


def _check_interpreter(root: Path, words: list[str]) -> None:
    index = 0
    while index < len(words) and words[index].startswith("-"):
        if words[index] == "-m" and index + 1 < len(words):
            if words[index + 1] == "torch.distributed.run":
                _check_command(root, ["torchrun", *words[index + 2 :]])
            else:
                check_python(root, words[index + 1], tuple(filled(words[index + 2 :])), module=True)
            return
        if words[index] in ("-c", "-"):
            return
        index += 2 if words[index] in ("-X", "-W") else 1
    if index < len(words):
        check_python(root, words[index], tuple(filled(words[index + 1 :])), module=False)


def _check_make(root: Path, words: list[str]) -> None:
    makefile = root / "Makefile"
    if not makefile.is_file():
        raise DocsError("there is no Makefile")
    targets = {t for line in re.findall(r"^([\w .-]+):(?!=)", makefile.read_text(), re.MULTILINE) for t in line.split()}
    for word in words:
        if not word.startswith("-") and "=" not in word and word not in targets:
            raise DocsError(f"the Makefile has no target {word}")


def _check_shell_script(root: Path, script: str, arguments: list[str], variables: dict[str, str]) -> None:
    """An sbatch or shell file of ours: it exists, and what it passes on fits the Python script that it starts.

    That script is the one on the line with "$@"; `${SCRIPT:-ddp/train.py}` counts as the value of SCRIPT given before
    the command, or as the default.
    """
    if "$" in script or script.startswith(("/", "~")):
        return
    if not (root / script).is_file():
        raise DocsError(f"there is no file {script}")
    code = re.sub(r"^\s*#.*$", "", (root / script).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    code = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: variables.get(match[1], match[2]), code)
    passing_on = "\n".join(line for line in code.split("\n") if '"$@"' in line)
    started = set(re.findall(r"[\w./-]+\.py\b", passing_on) or re.findall(r"[\w./-]+\.py\b", code))
    for name in started:
        if not (root / name).is_file():
            raise DocsError(f"{script} starts {name}, which does not exist")
    if len(started) == 1 and arguments:
        check_python(root, started.pop(), tuple(filled(arguments)), module=False)


def check_python(root: Path, script: str, arguments: tuple[str, ...], module: bool) -> None:
    """One of our Python programs accepts `arguments`: by its own parser, without doing its work."""
    if module:
        path = root.joinpath(*script.split("."))
        path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        if not path.is_file():
            return  # pip, pytest and the like
    elif "$" in script or script.startswith(("/", "~")):
        return
    else:
        path = root / script
        if not path.is_file():
            raise DocsError(f"there is no file {script}")
    if "--" in arguments:  # what follows is for the script that ours starts
        at = arguments.index("--")
        arguments, of_script = arguments[:at], arguments[at + 1 :]
        started = [word for word in arguments if word.endswith(".py")]
        if started:
            check_python(root, started[0], of_script, module=False)
    problem = _python_problem(root, path, arguments)
    if problem:
        raise DocsError(f"{script} {' '.join(arguments)}: {problem}")


@cache
def _python_problem(root: Path, path: Path, arguments: tuple[str, ...]) -> str | None:
    """Ask the program itself: `--print_config` parses all values and exits, argparse lists the flags."""
    code = path.read_text()
    reads_config = re.search(r"^\s*from common\.config import .*\bparse\b|\bconfig\.parse\(", code, re.MULTILINE)
    if not reads_config and "argparse" not in code:
        reads_words = "sys.argv" in code  # by itself: only a run would tell
        return f"it takes no arguments, found {arguments[0]}" if arguments and not reads_words else None
    if reads_config:
        exit_code, output = _ask(root, path, (*arguments, "--print_config"))
        last = output.strip().splitlines()[-1:] or ["it failed without a word"]
        if "unrecognized arguments: --print_config" not in last[0]:  # else: a sub-command with flags of its own
            return None if exit_code == 0 else last[0]
    words = [word for word in arguments if not word.startswith("-")]
    exit_code, output = _ask(root, path, ("--help",))
    if "{" in output.split("\n\n")[0] and words:  # sub-commands have a help of their own
        exit_code, output = _ask(root, path, (words[0], "--help"))
    if exit_code != 0:
        return (output.strip().splitlines() or ["--help failed"])[-1]
    for flag in (word.split("=")[0] for word in arguments if word.startswith("--")):
        if not re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", output):
            return f"there is no option {flag}"
    return None


@cache
def _ask(root: Path, path: Path, arguments: tuple[str, ...]) -> tuple[int | None, str]:
    """Run a program of ours on arguments that make it speak and end: its exit code, and all that it has written.

    It runs in a copy of a process that has imported torch already, which takes most of the time of a fresh one.
    """
    WARM.set_forkserver_preload(["torch._dynamo", "torch.distributed.checkpoint", "common.config"])
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        output.touch()
        process = WARM.Process(target=_become, args=(root, path, arguments, environment(folder), output))
        process.start()
        process.join(120)
        process.kill()
        process.join()
        return process.exitcode, output.read_text(errors="replace")


def _become(root: Path, path: Path, arguments: tuple[str, ...], surroundings: dict[str, str], output: Path) -> None:
    """Turn this process into `python path arguments`, or `python -m` for a module of a package."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(surroundings)
    os.chdir(root)
    sys.argv = [str(path.relative_to(root)), *arguments]
    if (root / path.relative_to(root).parts[0] / "__init__.py").exists():
        sys.path[:0] = [str(root)]
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__main__")
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.path[:0] = [str(path.parent), str(root)]
        runpy.run_path(str(path), run_name="__main__")
