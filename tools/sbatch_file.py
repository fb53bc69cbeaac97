"""What an sbatch file says, as far as it can be known without running it: directives, commands, launches."""

import re
import shlex
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import readme_parse
import slurm_options
from docs_markdown import ROOT
from readme_commands import logical_lines

RANK_PROGRAM = re.compile(r"(?:.*/)?(torchrun|python)[\d.]*")
MODULES_OF_TORCHRUN = ("torch.distributed.run", "torch.distributed.launch")


@dataclass(frozen=True)
class Directive:
    """One option of an #SBATCH line, by its long name; `part` counts the parts of a heterogeneous job."""

    line: int
    part: int
    name: str
    value: str


@dataclass(frozen=True)
class Launch:
    """One start of torchrun or python: `srun` holds the step's options (None: no srun), `words` stand behind."""

    line: int
    srun: dict[str, str] | None
    program: str
    words: list[str]

    def option(self, name: str) -> str | None:
        """The value of an option of torchrun, which takes hyphens and underscores; None where it is not given."""
        given = re.findall(rf"(?:^| )--{name.replace('-', '[-_]')}[= ](\S*)", " ".join(self.words))
        return given[-1] if given else None

    @property
    def understood(self) -> bool:
        """False where a variable may stand for options, as in `torchrun $DISTRIBUTED train.py`."""
        end = next((i for i, word in enumerate(self.words) if word.endswith(".py")), len(self.words))
        before_script = ["", *self.words[:end]]
        pairs = pairwise(before_script)
        return not any(word.startswith("$") and (last[:1] != "-" or "=" in last) for last, word in pairs)


@dataclass
class Job:
    """An sbatch file. `directives` are those that Slurm obeys; sbatch_lint.read_directives fills them in."""

    path: Path
    text: str
    directives: list[Directive] = field(default_factory=list)

    @cached_property
    def lines(self) -> list[str]:
        return self.text.split("\n")

    @cached_property
    def ours(self) -> bool:
        return self.path.resolve().is_relative_to(ROOT)

    @cached_property
    def is_shell(self) -> bool:
        """A file without a shebang counts: that it lacks one is reported, and the rest is judged all the same."""
        return not self.text.startswith("#!") or bool(re.match(r"#!.*\b(ba)?sh\b", self.text))

    @cached_property
    def first_command(self) -> int:
        """The line number where Slurm stops to look for directives."""
        found = (n for n, line in enumerate(self.lines, 1) if line.strip() and not line.lstrip().startswith("#"))
        return next(found, len(self.lines) + 1)

    @cached_property
    def here_documents(self) -> set[int]:
        """The line numbers of texts behind `<<END`."""
        inside, end = set(), ""
        for number, line in enumerate(self.lines, 1):
            if end:
                inside.add(number)
                end = "" if line.strip() == end else end
            elif start := re.search(r"(?<!<)<<-?\s*(['\"]?)([A-Za-z_]\w*)\1", re.sub(r"^\s*#.*", "", line)):
                end = start[2]
        return inside

    @cached_property
    def commands(self) -> list[tuple[int, str, list[list[str]]]]:
        """(line number, logical line, the words of each of its commands); assignments of arrays are left out.

        Continuations, and quoted texts and arrays over several lines, are joined.
        """
        found, chunk, start = [], "", 1
        for number, line in enumerate(self.lines if self.is_shell else [], 1):
            if number in self.here_documents:
                continue
            start = start if chunk else number
            chunk += line + "\n"
            if line.endswith("\\") or _is_open(chunk):
                continue
            joined = re.sub(r"(^|\s)\w+\+?=\(.*\)", r"\1", _plain(" ".join(logical_lines(chunk))))
            with suppress(ValueError):  # quotes that only bash understands
                found.append((start, joined, readme_parse.simple_commands(joined)))
            chunk = ""
        return found

    @cached_property
    def simple_commands(self) -> list[tuple[int, list[str]]]:
        return [(line, words) for line, _, commands in self.commands for words in commands]

    @cached_property
    def environment(self) -> list[tuple[int, str, str]]:
        """(line number, name, value) of the variables that are exported, or set before a command for it alone."""
        exported = {word.split("=")[0] for _, words in self.simple_commands if words[0] == "export" for word in words}
        found = []
        for line, words in self.simple_commands:
            pairs = [word.partition("=") for word in words if re.match(r"\w+=", word)]
            alone = len(pairs) == len(words)
            found += [(line, p[0], p[2]) for p in pairs if p[0] in exported or (not alone and "=" in words[0])]
        return found

    @cached_property
    def sourced(self) -> list[tuple[int, str]]:
        return [(line, words[1]) for line, words in self.simple_commands if words[0] in ("source", ".") and words[1:]]

    @cached_property
    def texts(self) -> list[str]:
        """This file, and those that it sources, where they can be read."""
        texts = [self.text]
        for _, name in self.sourced:
            with suppress(OSError):
                texts.append((ROOT / name).read_text(errors="replace"))
        return texts

    @cached_property
    def launches(self) -> list[Launch]:
        """The commands that start torchrun or python, behind `supervise` and other functions, too."""
        functions = {name for text in self.texts for name in re.findall(r"^(\w+) *\(\)", text, re.MULTILINE)}
        found = []
        for line, words in self.simple_commands:
            options = None
            while words and (words[0] in readme_parse.PREFIXES | functions or re.match(r"\w+=", words[0])):
                words = words[1:]
            if words[:1] == ["srun"]:
                try:
                    pairs, words = slurm_options.take("srun", words[1:])
                except ValueError:
                    continue  # reported by itself
                if not words or words[0].startswith("$") or ":" in words:
                    continue
                options = dict(pairs)
            at = next((i for i, word in enumerate(words) if RANK_PROGRAM.fullmatch(word)), None)
            if at is None or (at and options is None):
                continue
            program, words = RANK_PROGRAM.sub(r"\1", words[at]), words[at + 1 :]
            while program == "python" and words and re.fullmatch(r"-[BEIOsSu]+", words[0]):
                words = words[1:]
            if words[:1] == ["-m"] and words[1:2] and words[1] in MODULES_OF_TORCHRUN:
                program, words = "torchrun", words[2:]
            found.append(Launch(line, options, program, words))
        return found

    def directive(self, name: str) -> str | None:
        """The value of an option; the last counts, as for Slurm. None: not given, or a job of several parts."""
        if any(each.part for each in self.directives):
            return None
        return next((each.value for each in reversed(self.directives) if each.name == name), None)

    def number(self, name: str, launch: Launch) -> int | str | None:
        """An option of a launch's step, else of the job: a number, other text, or None where it is not given."""
        value = (launch.srun or {}).get(name) or self.directive(name)
        if value and name.startswith("gpus"):
            value = re.sub(r"^[A-Za-z][\w.-]*:", "", value)  # a100:4 is 4
        return int(value) if value and value.isdigit() else value

    def nodes(self, launch: Launch) -> int | None:
        """How many nodes a launch runs on; None where that cannot be known."""
        nodes, tasks = self.number("nodes", launch), self.number("ntasks", launch)
        if tasks == 1 or (nodes is None and tasks is None):
            return 1
        return nodes if isinstance(nodes, int) else None

    def tasks_per_node(self, launch: Launch) -> int | None:
        """How many tasks srun starts on a node; None where that cannot be known."""
        if any(each.name == "ntasks-per-gpu" for each in self.directives):
            return None
        tasks, nodes = self.number("ntasks", launch), self.nodes(launch)
        if "ntasks" not in (launch.srun or {}) or "ntasks-per-node" in (launch.srun or {}):
            per_node = self.number("ntasks-per-node", launch)
            if per_node is not None or tasks is None:
                return 1 if per_node is None else per_node if isinstance(per_node, int) else None
        return -(-tasks // nodes) if isinstance(tasks, int) and nodes else None

    def gpus_per_node(self, launch: Launch) -> int | None:
        """How many GPUs each node has for a launch; None where that is not said, or not as a number."""
        gres = (launch.srun or {}).get("gres") or self.directive("gres") or ""
        if generic := re.fullmatch(r"gpu(:[a-zA-Z][\w.-]*)?(:(\d+))?", gres):
            return int(generic[3] or 1)
        count, total, nodes = (self.number(name, launch) for name in ("gpus-per-node", "gpus", "nodes"))
        if count is None and isinstance(total, int) and isinstance(nodes, int) and nodes and total % nodes == 0:
            count = total // nodes
        return count if isinstance(count, int) else None


def _is_open(chunk: str) -> bool:
    """A quote or an array goes on in the next line."""
    try:
        shlex.split(re.sub(r"\$\{?#", "$", chunk), comments=True)
    except ValueError:
        return True
    return bool(re.search(r"(^|\s)\w+\+?=\(", chunk)) and chunk.count("(") > chunk.count(")")


def _plain(line: str) -> str:
    """`line` with `${NAME}` as $NAME, `${NAME:-file}` as the file, and all that must be computed as $X."""
    line = re.sub(r"\$\(\(.*?\)\)|`[^`]*`", "$X", line)
    line = re.sub(r"\$\{\w+:-([\w./-]+\.(?:py|sh|ya?ml|json))\}", r"\1", line)
    line = re.sub(r"(PORT=\"?)\$\{\w+:-(\d+)\}", r"\1\2", line)
    line = re.sub(r"\$\{[^{}]*\}", "$X", re.sub(r"\$\{(\w+)\}", r"$\1", line))
    while (shorter := re.sub(r"\$\([^()]*\)", "$X", line)) != line:
        line = shorter
    return line
