# shellcheck shell=bash disable=SC2034  # read by use_cluster.sh and job_env.sh
# AWS with the Elastic Fabric Adapter: p4d, p5 and the like behind Slurm (ParallelCluster).
# Facts from: https://docs.aws.amazon.com/parallelcluster/latest/ug/Scheduling-v3.html,
#   https://docs.aws.amazon.com/parallelcluster/latest/ug/directories-v3.html,
#   https://github.com/aws/aws-parallelcluster/blob/develop/cli/src/pcluster/constants.py (read November 2026)
PARTITION=                           # SlurmQueues/Name in your cluster's configuration: a queue is a partition
ACCOUNT=${ACCOUNT:-}                 # yours; empty: the site's default
CONSTRAINT=                          # for queues of several instance types: see sinfo -o "%P %f %G"
QOS=
MODULES=()                           # torch's wheels bring CUDA and NCCL along; the plugin for EFA they do not
NETWORK_PROFILE=aws-efa
LOCAL_STORAGE=/scratch               # where ParallelCluster mounts the NVMe disks, unless MountDir says otherwise
CACHE=                               # where you mount FSx for Lustre; empty: /home, by NFS from the head node, and slow
# NCCL must find libnccl-net.so of aws-ofi-nccl, else it stops: EFA's installer puts it below /opt/amazon/ofi-nccl/lib.
# If the machine's linker does not look there (ldconfig -p | grep nccl-net), put that folder on LD_LIBRARY_PATH here.
