# shellcheck shell=bash disable=SC2034  # read by use_cluster.sh and job_env.sh
# Google Cloud without RDMA: A2, G2, G4 and N1 machines behind Slurm (Cluster Toolkit, slurm-gcp). A3 and later need an
# NCCL plugin and its settings: for those copy default.sh.
# Facts from: https://github.com/GoogleCloudPlatform/cluster-toolkit/blob/main/examples/ml-slurm.yaml,
#   https://docs.cloud.google.com/cluster-toolkit/docs/modules/slurm-partition (read November 2026)
PARTITION=                           # your blueprint's; in ml-slurm.yaml a2 (the default, empty) and g2
ACCOUNT=${ACCOUNT:-}                 # yours; empty: the site's default
CONSTRAINT=                          # none: a partition is one type of machine
QOS=
MODULES=()                           # torch's wheels bring CUDA and NCCL along
NETWORK_PROFILE=gcp
LOCAL_STORAGE=/tmp                   # the machine's own boot disk; a local SSD is faster: see df -hT
CACHE=                               # empty: below /home, which ml-slurm.yaml puts on Filestore for all nodes
# No NCCL_SOCKET_IFNAME: guides set eth0, but the name depends on the image (ip -br addr), and with a single network
# card NCCL has nothing to choose from.
