"""Check sbatch files before the queue does: what Slurm would refuse, ignore, or read otherwise than meant.

    python tools/sbatch_lint.py my_job.sbatch          # path:line: what was found; what to do
    python tools/sbatch_lint.py                        # all sbatch files of this repository

Exit code 0: nothing found; 1: something found; 2: called wrongly. Only what can be understood without running the file
is judged: where a value is a variable, nothing is said. A file of this repository that does without slurm/job_env.sh
says why, in a comment: `# lint: without job_env: REASON`.
"""

import argparse
import difflib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import readme_parse
import slurm_options
from docs_markdown import ROOT, DocsError
from sbatch_file import Directive, Job

Problems = Iterator[tuple[int, str]]  # (line number, what was found; what to do)
SITE_FACTS = {"partition", "account", "constraint", "qos", "reservation", "mail-user", "licenses"}
TIME = re.compile(r"\d+(:\d+){0,2}|\d+-(\d+(:\d+){0,2})?|-1|infinite|unlimited", re.IGNORECASE)
OWN_LINE = "give each a line of its own"


# ---- the shell


def first_line(job: Job) -> Problems:
    if not job.text.startswith("#!"):
        yield 1, "the first line is no shebang, so Slurm refuses the file; begin with #!/bin/bash"
    if "\r\n" in job.text:
        yield 1, "the lines end as on Windows, so Slurm refuses the file; convert it with dos2unix"


def shell_syntax(job: Job) -> Problems:
    if not job.is_shell or not job.text.startswith("#!") or "\r\n" in job.text:
        return
    checked = subprocess.run(["bash", "-n"], input=job.text, capture_output=True, text=True)
    if checked.returncode:
        first = re.search(r"line (\d+): (.*)", checked.stderr)
        yield (int(first[1]), f"bash: {first[2]}; correct it") if first else (1, checked.stderr.strip())
        return
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if program := shutil.which("shellcheck", path=path):
        # Left out: matters of style, and variables that a sourced file or a started program may set or read.
        command = [program, "-x", "--severity=warning", "--exclude=2034,2154,2206,2207", "--format=json1", "-"]
        checked = subprocess.run(command, input=job.text, capture_output=True, text=True, cwd=ROOT)
        for each in json.loads(checked.stdout)["comments"]:
            page = f"https://www.shellcheck.net/wiki/SC{each['code']}"
            yield each["line"], f"shellcheck: {each['message'].rstrip('.')}; see {page}"


# ---- directives


def read_directives(job: Job) -> Problems:
    """Fills `job.directives`, hence the first check of all; reports what Slurm would refuse."""
    part = 0
    for number, line in enumerate(job.lines[: job.first_command - 1], 1):
        text = re.match(r"#SBATCH(?![A-Za-z])(.*)", line)
        try:
            options, rest = slurm_options.take("sbatch", shlex.split(text[1], comments=True)) if text else ([], [])
        except ValueError as error:
            yield number, str(error)
            continue
        if rest in (["hetjob"], ["packjob"]):
            part += 1
        elif rest:
            yield number, f"{rest[0]!r} is no option of sbatch; write --option=value, with quotes around blanks"
        job.directives += [Directive(number, part, name, value) for name, value in options]


def misspelt_directives(job: Job) -> Problems:
    for number, line in enumerate(job.lines, 1):
        match = re.match(r"(\s*#\s*)([A-Za-z]+)\s*(-.*)", line)
        if not match or number in job.here_documents:
            continue
        before, word, rest = match.groups()
        if line.startswith("#SBATCH"):
            if number > job.first_command and word == "SBATCH":
                yield number, f"Slurm ignores directives behind the first command, line {job.first_command}; move it up"
            elif line.startswith("#SBATCH-"):
                yield number, "no blank behind #SBATCH; write #SBATCH --option=value"
        elif number < job.first_command and not re.search(r"\s[^-\s]\S*\.\w+(\s|$)", rest):  # # sbatch -N2 a.sbatch
            near = difflib.get_close_matches(word.upper(), ["SBATCH"], cutoff=0.8)
            if word == "SBATCH" or (before.endswith("#") and near):
                yield number, f"Slurm takes {(before + word).strip()!r} for a comment; begin the line with #SBATCH"


def fused_directives(job: Job) -> Problems:
    for number, line in enumerate(job.lines[: job.first_command - 1], 1):
        if re.match(r"#SBATCH.*#\s*SBATCH", line):
            yield number, f"two directives on one line, of which Slurm ignores the second; {OWN_LINE}"
        elif re.match(r"#SBATCH\s.*=[\w:.]+--[a-z]", line):
            yield number, f"two options without a blank between them; {OWN_LINE}"
        elif line.startswith("#SBATCH") and len(re.findall(r"\s--[a-z]", line.partition(" #")[0])) > 1:
            yield number, f"two options on one line, of which one is easily overlooked; {OWN_LINE}"


def repeated_options(job: Job) -> Problems:
    seen: dict[tuple[int, str], Directive] = {}
    for each in job.directives:
        first = seen.setdefault((each.part, each.name), each)
        if first.value != each.value:
            yield each.line, f"--{each.name} is {first.value} in line {first.line}, {each.value} here; keep one of them"


def variables_in_directives(job: Job) -> Problems:
    for each in job.directives:
        if re.search(r"\$[\w{(]|`|^~/", each.value):
            advice = "write it out, use a % pattern, or give it to sbatch on the command line"
            yield each.line, f"--{each.name}={each.value}: Slurm does not expand what the shell would; {advice}"


def times(job: Job) -> Problems:
    for each in job.directives:
        if each.name in ("time", "time-min") and not TIME.fullmatch(each.value) and not re.search(r"\$|--", each.value):
            yield each.line, f"{each.value} is no time for Slurm; write 30 (minutes), 1:30:00, or 2-12 (days-hours)"


def patterns(job: Job) -> Problems:
    for each in job.directives:
        if each.name in ("output", "error", "input") and "\\" not in each.value:
            for letter in re.findall(r"%\d*(?![\dAabJjNnstux])(.?)", each.value.replace("%%", "")):
                yield each.line, f"--{each.name}: Slurm knows no %{letter}; use %j (job), %x (its name), %A_%a, %N, %u"


def signals(job: Job) -> Problems:
    for each in job.directives:
        match = re.fullmatch(r"(?:[A-Z]+:)?(?:SIG)?([A-Z]+\d?)(@\d+)?", each.value) if each.name == "signal" else None
        if not match or "B" in each.value.rpartition(":")[0]:
            continue
        wanted = {match[1], f"SIG{match[1]}"}
        if any(w[0] == "supervise" or (w[0] == "trap" and wanted & set(w[2:])) for _, w in job.simple_commands):
            advice = f"write --signal=B:{match[1]}{match[2] or ''}"
            yield each.line, f"--signal={each.value} goes to the steps, not to this shell, which handles it; {advice}"


def requeue_appends(job: Job) -> Problems:
    for each in job.directives:
        if each.name == "requeue" and each.part == 0 and all(other.name != "open-mode" for other in job.directives):
            yield each.line, "a requeued job overwrites its output; add #SBATCH --open-mode=append"


def site_facts(job: Job) -> Problems:
    for each in job.directives:
        if job.ours and each.name in SITE_FACTS:
            yield each.line, f"--{each.name} is a fact of one site; it belongs in a profile under slurm/profiles/"


# ---- launch lines


def srun_options(job: Job) -> Problems:
    for line, words in job.simple_commands:
        if "srun" in words[:2] and words[0] not in ("command", "echo", "printf", "type", "which"):
            try:
                slurm_options.take("srun", words[words.index("srun") + 1 :])
            except ValueError as error:
                yield line, str(error)


def files_and_arguments(job: Job) -> Problems:
    """Scripts and --config files exist; what scripts of this repository are given, they accept."""
    if any(words[0] in ("cd", "pushd") for _, words in job.simple_commands) or job.directive("chdir"):
        return
    for line, name in job.sourced:
        if name.endswith(".sh") and not _exists(job, name):
            yield line, f"there is no file {name}; correct the path, as seen from the repository root"
    for launch in job.launches:
        words = launch.words
        try:
            if launch.understood and launch.program == "torchrun":
                script, rest, _ = readme_parse.after_torchrun_options(tuple(readme_parse.filled(words)))
                words = [script, *words[len(words) - len(rest) :]]
            if not launch.understood or not words[:1] or not words[0].endswith(".py"):
                continue
            for name in [words[0], *re.findall(r" --config[= ]([\w.-]+(?:/[\w.-]+)*)(?= |$)", " ".join(words))]:
                if not _exists(job, name):
                    raise DocsError(f"there is no file {name}")
            arguments = _without_variables(words[1:])
            if arguments and (ROOT / words[0]).is_file():
                readme_parse.check_python(ROOT, words[0], arguments, module=False)
        except DocsError as error:
            yield launch.line, f"{error}; correct the line, with paths as seen from the repository root"


def _exists(job: Job, name: str) -> bool:
    """Relative to the repository's root; for files elsewhere, also to where they lie and to the current folder."""
    folders = [ROOT] if job.ours else [ROOT, job.path.parent, Path()]
    return name.startswith(("/", "~")) or "$" in name or any((folder / name).exists() for folder in folders)


def _without_variables(words: list[str]) -> tuple[str, ...]:
    kept: list[str] = []
    for word in words:
        if "$" not in word:
            kept.append(word)
        elif word[0] != "-" and kept and kept[-1][0] == "-" and "=" not in kept[-1]:
            kept.pop()  # the option whose value this is
    return tuple(kept)


def kill_on_bad_exit(job: Job) -> Problems:
    if any(name == "SLURM_KILL_BAD_EXIT" for _, name, _ in job.environment):
        return
    for launch in job.launches:
        step = launch.srun
        several = (job.nodes(launch) or 0) * (job.tasks_per_node(launch) or 0) > 1
        if step is None or step.get("ntasks") == "1" or not (several or launch.program == "torchrun"):
            continue
        if step.get("kill-on-bad-exit", "0") == "0":
            yield launch.line, "when a task fails, the others idle to the time limit; add --kill-on-bad-exit=1 to srun"


def tasks_and_gpus(job: Job) -> Problems:
    """One torchrun a node, which starts a process for each GPU; or one task for each GPU."""
    for launch in (each for each in job.launches if each.understood):
        tasks, gpus = job.tasks_per_node(launch), job.gpus_per_node(launch)
        per_task, processes = job.number("gpus-per-task", launch), launch.option("nproc-per-node")
        if launch.program == "python":
            said = launch.srun is not None and "ntasks" not in launch.srun and job.number("ntasks-per-node", launch)
            ours = (ROOT / " ".join(launch.words[:1])).is_file()  # one task of other scripts may drive all GPUs
            if said and tasks and gpus and tasks != gpus and (tasks > 1 or ours):
                advice = "set --ntasks-per-node to --gpus-per-node, or start torchrun"
                yield launch.line, f"{tasks} task(s) and {gpus} GPU(s) on a node, where a task drives one GPU; {advice}"
        elif launch.srun is not None and tasks and tasks > 1 and processes != "1":
            yield launch.line, f"{tasks} torchruns on a node, each of which starts all ranks; write --ntasks-per-node=1"
        elif launch.srun is not None and per_task is not None and processes not in ("1", str(per_task)):
            yield launch.line, "--gpus-per-task hides the other GPUs from torchrun; ask for --gpus-per-node instead"
        elif gpus and processes and processes.isdigit() and int(processes) * ((launch.srun and tasks) or 1) != gpus:
            advice = 'write --nproc-per-node="$SLURM_GPUS_ON_NODE"'
            yield launch.line, f"--nproc-per-node={processes}, and the job has {gpus} GPU(s) on a node; {advice}"


def meeting_point(job: Job) -> Problems:
    for launch in (each for each in job.launches if each.understood and each.srun is not None):
        nodes, given = job.nodes(launch) or 1, [launch.option(name) for name in ("rdzv-endpoint", "master-addr")]
        by_environment = "PET_" in "".join(job.texts)  # PET_RDZV_ENDPOINT is --rdzv-endpoint
        if launch.program == "torchrun" and nodes > 1 and not any(given) and not by_environment:
            advice = "give --rdzv-backend=c10d and --rdzv-endpoint=HOST:PORT"
            yield launch.line, f"the torchruns of {nodes} nodes have no common meeting point; {advice}"


def torchrun_of_one_node(job: Job) -> Problems:
    """Without srun a command runs on the job's first node alone."""
    for launch in (each for each in job.launches if each.program == "torchrun" and each.srun is None):
        wanted, nodes = launch.option("nnodes") or "1", job.number("nodes", launch)
        several = re.fullmatch(r"[\"']?(?:\d+:)?([2-9]|[1-9]\d+)[\"']?", wanted) is not None
        of_job = "$" in wanted and nodes not in (None, 1)
        if several or of_job:
            advice = "write srun --ntasks-per-node=1 --kill-on-bad-exit=1 torchrun …"
            found = f"torchrun --nnodes={wanted} without srun runs on the first node alone, and waits for the others"
            yield launch.line, f"{found}; {advice}"
        elif isinstance(nodes, int) and nodes > 1:
            yield launch.line, f"torchrun without srun uses one of {nodes} nodes; start it by srun, or ask for one node"


def fixed_ports(job: Job) -> Problems:
    fixed = re.compile(r"(?:^|\s)(?:MASTER_PORT|--master[-_]port)[= ][1-9]\d*\b|--rdzv[-_]endpoint[= ]\S*:[1-9]\d*\b")
    for line, text, _ in job.commands if job.directive("exclusive") is None else []:
        if found := fixed.search(re.sub("[\"']", "", text)):
            advice = "derive it from SLURM_JOB_ID, as slurm/job_env.sh does"
            yield line, f"{found[0].strip()}: two jobs with the same port may meet on a node; {advice}"


def hand_made_environment(job: Job) -> Problems:
    for line, name, value in job.environment:
        if name == "CUDA_VISIBLE_DEVICES" and re.fullmatch(r"\d+(,\d+)*", value):
            yield line, f"{name}={value} overrides what Slurm has given to the job; leave it out"
        elif name == "WORLD_SIZE" and re.fullmatch(r"\d+|\$SLURM_(NNODES|JOB_NUM_NODES)", value):
            yield line, f"{name}={value} is not the number of ranks; leave it to torchrun, or write $SLURM_NTASKS"
        elif name in ("RANK", "LOCAL_RANK"):
            yield line, f"{name}, set in the job's shell, is the same for all ranks; leave it to torchrun or srun"


def hidden_failures(job: Job) -> Problems:
    launched = {launch.line for launch in job.launches}
    for line, text, _ in job.commands:
        if line in launched and re.search(r"\|\|\s*(true|:|echo\b[^;&|]*)\s*$", text):
            yield line, "a failure of this command is hidden, and the job seems completed; leave out what follows ||"
    for line, text in enumerate(job.lines, 1):
        if re.search(r"^[^#]*\|\|\s*echo\s+['\"]?(localhost|127\.0\.0\.1)", text):
            yield line, "the job goes on at localhost, each node alone, when this fails; leave out what follows ||"
    for match in re.finditer(r"^\s*if\s+!\s(?:.*\\\n)*.*?\bthen\b\s*(\w+=\$\?)", job.text, re.MULTILINE):
        line = job.text.count("\n", 0, match.start(1)) + 1
        yield line, f"{match[1]} behind `if !` stores 0, whatever failed; write: code=0; command || code=$?"


def cpus_of_steps(job: Job) -> Problems:
    if job.directive("cpus-per-task") in (None, "1") or any("SRUN_CPUS_PER_TASK" in text for text in job.texts):
        return
    for launch in job.launches:
        if launch.srun is not None and "cpus-per-task" not in launch.srun:
            advice = "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK, or source slurm/job_env.sh"
            yield launch.line, f"since Slurm 22.05, srun ignores the job's --cpus-per-task; {advice}"
            return


def job_environment(job: Job) -> Problems:
    opted_out = re.search(r"^# lint: without job_env: \S", job.text, re.MULTILINE)
    if job.ours and job.launches and not opted_out and all(name != "slurm/job_env.sh" for _, name in job.sourced):
        advice = "add `source slurm/job_env.sh`, or a comment `# lint: without job_env: REASON`"
        yield job.launches[0].line, f"nothing prepares the job before its first launch; {advice}"


CHECKS = (
    read_directives, first_line, shell_syntax, misspelt_directives, fused_directives, repeated_options,
    variables_in_directives, times, patterns, signals, requeue_appends, site_facts, srun_options,
    files_and_arguments, kill_on_bad_exit, tasks_and_gpus, meeting_point, torchrun_of_one_node, fixed_ports,
    hand_made_environment, hidden_failures, cpus_of_steps, job_environment,
)  # fmt: skip


def problems(path: Path, text: str) -> list[tuple[int, str]]:
    """(line number, what was found; what to do) for each problem of the sbatch file `text`, by line."""
    job = Job(path, text)
    return sorted({problem for check in CHECKS for problem in check(job)})


def repository_files() -> list[Path]:
    """All sbatch files that git tracks or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.sbatch"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in sorted(set(listed.split("\0"))) if name and (ROOT / name).is_file()]


def main() -> int:
    parser = argparse.ArgumentParser(description="Check sbatch files; without arguments, all of this repository.")
    parser.add_argument("files", nargs="*", type=Path, help="sbatch files")
    files = parser.parse_args().files or repository_files()
    found = 0
    for path in files:
        try:
            text = path.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"{path} cannot be read: {error}; expected the path of an sbatch file")
        shown = path.relative_to(ROOT) if path.is_absolute() and path.is_relative_to(ROOT) else path
        for line, message in problems(path, text):
            print(f"{shown}:{line}: {message}")
            found += 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
