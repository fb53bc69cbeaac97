# shellcheck shell=bash
# Sourced by every check, before slurm/job_env.sh: whatever happens from here on, the last line of the job's output is
# `PASSED name` or `FAILED name: reason`, and the exit code agrees with it.
#
# It reads    check     the check's name
# and defines step …    runs one part; the job ends with FAILED when the part does, or finds a problem, or says nothing
#             passed    the last command of a check
set -euo pipefail # a pipe fails when any part of it does

: "${check:?set it to the name of the check}"
# Until job_env.sh, once it has all that it needs, sets a trap of its own in the place of this one.
trap 'echo "FAILED $check: the job could not be prepared; the line above says why"' EXIT

step() {
    local code=0 reason='' said
    said=$(mktemp -d)
    "$@" 2>"$said/errors" | tee "$said/facts" || code=$?
    reason=$(grep -m1 '^problem ' "$said/facts" || grep -m1 -E '^(\[rank [0-9]+\] )?error: ' "$said/errors" || true)
    if [[ $code -eq 0 && -z $reason && ! -s $said/facts ]]; then
        reason="found no output; expected facts from: $*"
    fi
    if [[ $code -eq 0 && -z $reason ]]; then
        cat "$said/errors" >&2
    else
        # Ranks that end badly make srun and torchrun say so at length, on every node. Only without a line of our own
        # does that tell anything.
        if [[ -z $reason ]]; then
            cat "$said/errors" >&2
            reason=$(grep -oE '[A-Za-z_.]*(Error|Exception): .*' "$said/errors" | tail -n1 || true)
            reason=${reason:-$(head -n1 "$said/errors")}
            reason=${reason:-"exit code $code: $*"}
        else
            grep -E '^(\[rank [0-9]+\] )?error: ' "$said/errors" >&2 || true
        fi
        reason=$(tr -s ' ' <<<"${reason#problem }")
        rm -rf "$said"
        echo "FAILED $check: ${reason# }"
        exit $((code > 0 ? code : 1))
    fi
    rm -rf "$said"
}

passed() {
    echo "PASSED $check"
}
