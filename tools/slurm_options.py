"""The options of sbatch, srun and salloc, by their manual pages (Slurm 22.05, and what 25.05 has in addition).

https://slurm.schedmd.com/sbatch.html, srun.html and salloc.html
"""

import difflib
from functools import cache

# Options with a value, as `--name=value` or as the next word; those whose value may be left out, and is then no next
# word; those without. Under a program's name: what only that program has.
VALUES = {
    "all": "account acctg-freq bb bbf chdir cluster-constraint clusters comment constraint container container-id "
    "core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency distribution "
    "exclude extra extra-node-info gid gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-task gres "
    "gres-flags hint job-name licenses mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus "
    "network nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket "
    "oom-kill-step partition power prefer priority profile qos reservation segment signal sockets-per-node switches "
    "tasks-per-node thread-spec threads-per-core time time-min tmp tres-bind tres-per-task uid wckey",
    "sbatch": "array batch begin error export export-file input kill-on-invalid-dep open-mode output "
    "wait-all-nodes wrap",
    "srun": "accel-bind bcast-exclude begin cpu-bind epilog error export het-group input jobid mpi msg-timeout "
    "open-mode output prolog relative slurmd-debug task-epilog task-prolog threads wait",
    "salloc": "begin wait-all-nodes",
}
OPTIONAL_VALUES = {
    "all": "exclusive nice no-kill resv-ports",
    "sbatch": "get-user-env propagate",
    "srun": "bcast compress immediate kill-on-bad-exit propagate send-libs x11",
    "salloc": "get-user-env immediate kill-command x11",
}
FLAGS = {
    "all": "consolidate-segments contiguous help hold overcommit oversubscribe quiet reboot spread-job "
    "spread-segments stepmgr usage use-min-nodes verbose version",
    "sbatch": "ignore-pbs no-requeue parsable requeue test-only wait",
    "srun": "disable-status exact external interactive label multi-prog no-allocate overlap preserve-env pty "
    "quit-on-interrupt test-only unbuffered whole",
    "salloc": "bell no-bell no-shell",
}
# Of plug-ins that many sites have: Pyxis (https://github.com/NVIDIA/pyxis), the container engine and uenv of CSCS, and
# the switch of NVIDIA's monitoring. Whole names only: which site has which is not known.
PLUGINS = {
    "value": "container-image container-mounts container-workdir container-name container-save container-env "
    "environment uenv view",
    "flag": "container-mount-home no-container-mount-home container-remap-root no-container-remap-root "
    "container-entrypoint no-container-entrypoint container-entrypoint-log container-writable container-readonly "
    "disable-dcgm",
}
SHORT = dict(
    A="account", a="array", B="extra-node-info", b="begin", C="constraint", c="cpus-per-task", D="chdir",
    d="dependency", E="preserve-env", e="error", F="nodefile", G="gpus", H="hold", h="help", I="immediate", i="input",
    J="job-name", K="kill-on-bad-exit", k="no-kill", L="licenses", l="label", M="clusters", m="distribution",
    N="nodes", n="ntasks", O="overcommit", o="output", p="partition", Q="quiet", q="qos", r="relative", S="core-spec",
    s="oversubscribe", T="threads", t="time", u="unbuffered", V="version", v="verbose", W="wait", w="nodelist",
    X="disable-status", x="exclude", Z="no-allocate",
)  # fmt: skip
ALIASES = {"tasks-per-node": "ntasks-per-node"}


@cache
def known(program: str) -> dict[str, str]:
    """The long options of `program`, each with its kind: "value", "optional" or "flag"."""
    kinds = (("value", VALUES), ("optional", OPTIONAL_VALUES), ("flag", FLAGS))
    return {name: kind for kind, names in kinds for name in f"{names['all']} {names.get(program, '')}".split()}


@cache
def of_plugins() -> dict[str, str]:
    """The options of plug-ins, each with its kind."""
    return {name: kind for kind, names in PLUGINS.items() for name in names.split()}


def take(program: str, words: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """The options at the start of `words` as (long name, value), and the words behind them.

    Reads them as getopt does: a unique beginning of a name stands for the name. Raises ValueError with what was found
    and what to do, for an unknown option and for a value too many or too few.
    """
    options: list[tuple[str, str]] = []
    rest = list(words)
    while rest and rest[0].startswith("-") and rest[0] != "-":
        word = rest.pop(0)
        if word == "--":
            break
        if word.startswith("--"):
            given, equals, value = word[2:].partition("=")
            name = _full_name(program, given)
        else:
            given, equals, value = word[1], word[2:], word[2:]
            if len(word) > 3 and word[1:].partition("=")[0] in known(program):
                raise ValueError(f"{word} has one dash; write -{word}")
            name = _long_name(program, given)
            while equals and known(program)[name] == "flag":  # -Qv is -Q -v
                options.append((name, ""))
                name, equals, value = _long_name(program, value[0]), value[1:], value[1:]
        kind = (known(program) | of_plugins())[name]
        if kind == "value" and not equals and rest and not rest[0].startswith("-"):
            equals = value = rest.pop(0)
        if (kind == "value" and not value) or value == "=":
            raise ValueError(f"{word} has no value; write --{name}=VALUE, without blanks")
        if kind == "flag" and equals:
            raise ValueError(f"{word}: this option takes no value; write --{name}")
        options.append((ALIASES.get(name, name), value))
    return options, rest


def _full_name(program: str, given: str) -> str:
    names = known(program)
    if given in of_plugins():
        return given
    longer = [name for name in names if name.startswith(given)]
    if given in names or (given and len(longer) == 1):
        return given if given in names else longer[0]
    near = longer[:1] if given else []
    near = difflib.get_close_matches(given, [*names, *of_plugins()], n=1) or near
    advice = f"did you mean --{near[0]}?" if near else f"{program} --help lists them, those of a site's plug-ins too"
    raise ValueError(f"{program} has no option --{given} that this check knows; {advice}")


def _long_name(program: str, letter: str) -> str:
    name = "kill-command" if (program, letter) == ("salloc", "K") else SHORT.get(letter, "")
    if name not in known(program):
        raise ValueError(f"{program} has no option -{letter} that this check knows; {program} --help lists them")
    return name
