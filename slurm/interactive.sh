#!/usr/bin/env bash
# What to do inside salloc: hold the nodes once, then start one short step after another without queueing again.
#   salloc --nodes=2 --gpus-per-node=2 --time=00:30:00 slurm/interactive.sh --train.steps 20
# salloc runs this script on the login node, inside the allocation, and gives the nodes back when it ends. Without a
# command, salloc opens a shell (at most sites on the first node): type the same srun lines there, `exit` at the end.
# What is started without srun runs where the shell is, as one process: plain python, and torchrun too.
RANKS_PER_NODE=${RANKS_PER_NODE:-${SLURM_GPUS_PER_NODE:-}}
RANKS_PER_NODE=${RANKS_PER_NODE##*:} # a100:4 is 4
source slurm/job_env.sh

echo "--- 1. the nodes, and the GPUs that Slurm gave on each"
# shellcheck disable=SC2016 # the inner shell expands
srun --nodes="$SLURM_NNODES" --ntasks-per-node=1 --label bash -c 'echo "$(hostname) has GPUs $CUDA_VISIBLE_DEVICES"'

echo "--- 2. without srun: one process, on this machine"
python -c 'import common.ranks as r, socket; print(r.read_environment().world_size, "process on", socket.gethostname())'

echo "--- 3. one node first: what does not run there need not be looked for in the network"
srun --nodes=1 --ntasks=1 --kill-on-bad-exit=1 torchrun --standalone --nproc-per-node="$RANKS_PER_NODE" \
    ddp/train.py "$@" --run_name "interactive-$SLURM_JOB_ID-one-node"

echo "--- 4. all nodes"
srun --nodes="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$RANKS_PER_NODE" \
    --rdzv-backend=c10d --rdzv-id="$RDZV_ID" --rdzv-endpoint="$RDZV_ENDPOINT" \
    ddp/train.py "$@" --run_name "interactive-$SLURM_JOB_ID-all-nodes"
