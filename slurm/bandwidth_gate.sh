#!/usr/bin/env bash
# End a job before it trains when its fabric is too slow: all-reduces between all its ranks, on its own nodes.
#
#   slurm/bandwidth_gate.sh 20        in an sbatch file, after slurm/job_env.sh: 20 GB/s of bus bandwidth or more
#
# Prints what it measured. Exit code 0: fast enough; 3: too slow; 2: called wrongly; any other: it could not measure.
set -euo pipefail

die() {
    echo "bandwidth_gate: error: $*" >&2
    exit 2
}

[[ $# -eq 1 && $1 =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)$ ]] ||
    die "found '$*'; expected one number, the least bus bandwidth in GB/s, such as slurm/bandwidth_gate.sh 20"
[[ -n ${SLURM_JOB_ID:-} ]] || die "this is no Slurm job; call it in an sbatch file"
for name in RDZV_ID RDZV_ENDPOINT RANKS_PER_NODE; do
    [[ -n ${!name:-} ]] || die "$name is not set; source slurm/job_env.sh first, which exports it"
done
cd "$(dirname "$0")/.."

errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
code=0
srun --kill-on-bad-exit=1 --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
    torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$RANKS_PER_NODE" \
    --rdzv-backend=c10d --rdzv-id="$RDZV_ID-gate" --rdzv-endpoint="$RDZV_ENDPOINT" \
    collectives/bandwidth.py --collective all_reduce --minimum_gbytes_per_second "$1" 2>"$errors" || code=$?

# A rank that ends badly makes torchrun and srun say so at length, on every node; its own line is what counts.
line=$(grep -m1 -oE '(^|\[rank [0-9]+\] )error: .*' "$errors" || true)
if [[ $code -ne 0 && -n $line ]]; then
    echo "bandwidth_gate: $line" >&2
    if [[ $line == *"the fabric is too slow"* ]]; then code=3; fi
else
    cat "$errors" >&2
fi
exit "$code"
