#!/usr/bin/env bash
# Start DDP training by hand, on one machine or on several. Arguments go to the script.
#
#   ddp/launch.sh --train.steps 50                                    one machine: every GPU, or two CPU processes
#   SCRIPT=ddp/train_vision.py NPROC=4 ddp/launch.sh                  another script, four processes
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 ddp/launch.sh           on the first of two machines …
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 ddp/launch.sh           … and, at the same time, on the second
#
# The address is the first machine's, as the others reach it; the port (MASTER_PORT) must be free there.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ -z ${NPROC:-} ]]; then
    NPROC=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
    if [[ $NPROC -eq 0 ]]; then NPROC=2; fi
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [[ ${NNODES:-1} -eq 1 ]]; then
    rendezvous=(--standalone)
else
    : "${NODE_RANK:?error: NNODES=$NNODES needs NODE_RANK: 0 on the first machine, 1 on the second, and so on}"
    : "${MASTER_ADDR:?error: NNODES=$NNODES needs MASTER_ADDR, the address of the first machine}"
    rendezvous=(--nnodes="$NNODES" --node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}")
fi
exec torchrun "${rendezvous[@]}" --nproc-per-node="$NPROC" "${SCRIPT:-ddp/train.py}" "$@"
