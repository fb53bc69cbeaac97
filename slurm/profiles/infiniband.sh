# shellcheck shell=bash disable=SC2034  # read by use_cluster.sh and job_env.sh
# Any cluster with InfiniBand or RoCE that has no profile of its own. Copy it and fill in what your site needs.
# Facts from: no site. What the network profile sets, and why: python slurm/network.py --profile infiniband --explain
PARTITION=                           # see sinfo; empty: the site's default
ACCOUNT=${ACCOUNT:-}                 # yours; empty: the site's default
CONSTRAINT=                          # see sinfo -o "%P %f %G"
QOS=
MODULES=()                           # torch's wheels bring CUDA and NCCL along
NETWORK_PROFILE=infiniband
LOCAL_STORAGE=                       # see df -hT /tmp on a compute node
CACHE=
# No NCCL_IB_HCA and no NCCL_SOCKET_IFNAME: NCCL finds the adapters and prefers interfaces named ib*
# (https://github.com/NVIDIA/nccl/blob/master/src/misc/socket.cc). Name them only where a node has a port that is up
# but leads elsewhere (storage, a second fabric).
