# shellcheck shell=bash disable=SC2034  # read by use_cluster.sh and job_env.sh
# IBEX, KAUST: GPU nodes with 4 or 8 A100 (80 GB) or V100 (32 GB), HDR InfiniBand. Submit GPU jobs from glogin.
# Facts from: https://docs.hpc.kaust.edu.sa/systems/ibex/compute_node.html, …/interconnect.html, …/filesystem.html,
#   https://github.com/kaust-rccl/ksl-docs (docs/source/policy/ibex.rst),
#   https://github.com/kaust-rccl/Dist-DL-training (read November 2026)
PARTITION='batch'                    # the default
ACCOUNT=${ACCOUNT:-}                 # yours; empty: the site's default
CONSTRAINT=a100                      # with &4gpus or &8gpus for one kind of node. KAUST's course takes v100, whose
                                     # instructions (sm_70) torch's wheels no longer hold: torch._C._cuda_getArchFlags()
QOS=
MODULES=()                           # torch's wheels bring CUDA. The course loads cuda/12.4.1; what compiles extensions
                                     # (DeepSpeed) wants the major version of torch.version.cuda: module avail cuda
NETWORK_PROFILE=infiniband
LOCAL_STORAGE=/tmp                   # of the job, emptied after it; A100 nodes have NVMe disks of 5 or 11 TB at /local
CACHE=/ibex/user/${USER:-$(id -un)}/cache  # WekaIO, 1.5 TB a user; KAUST asks to keep caches out of /home
export GLOO_SOCKET_IFNAME=ib0        # Gloo takes the host name's address, and eth0 has 1 Gbit/s (interconnect.html)
# No NCCL_SOCKET_IFNAME=ib0, which the course sets: NCCL takes the interfaces named ib* by itself
# (https://github.com/NVIDIA/nccl/blob/master/src/misc/socket.cc). No NCCL_IB_HCA: it finds all 2 or 4 adapters, too.
