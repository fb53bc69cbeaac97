# shellcheck shell=bash disable=SC2034  # read by use_cluster.sh and job_env.sh
# Zaratan, University of Maryland: 20 nodes of 4 A100 (40 GB), 8 nodes of 4 H100 (80 GB), HDR-100 InfiniBand.
# Facts from: https://hpcc.umd.edu/hpcc/zaratan.html, https://hpcc.umd.edu/hpcc/help/storage.html,
#   https://github.com/axonn-ai/distrib-dl-tutorial (train_multi.sh) (read November 2026)
PARTITION=gpu                        # the A100s; some are cut into slices, so name the type: --gpus-per-node=a100:4
ACCOUNT=${ACCOUNT:-}                 # your allocation: see sacctmgr show assoc user=$USER
CONSTRAINT=                          # none: GPUs are chosen by type
QOS=
MODULES=()                           # the tutorial loads none: torch's wheels bring CUDA and NCCL along
NETWORK_PROFILE=infiniband
LOCAL_STORAGE=/tmp                   # 0.75 TB on A100 nodes, 12 TB on H100 nodes; the tutorial stages to it as well
CACHE=${CACHE:-}                     # home has 10 GB: export CACHE=/scratch/zt1/project/YOUR_PROJECT/user/$USER/cache
# No GLOO_SOCKET_IFNAME: UMD's pages name no interface (ip -br addr on a compute node tells).
