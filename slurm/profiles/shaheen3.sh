# shellcheck shell=bash disable=SC2034  # read by use_cluster.sh and job_env.sh
# Shaheen III, KAUST, GPU partition: nodes of 4 GH200, Slingshot 11. Arm: make the environment there, not on IBEX.
# Facts from: https://github.com/kaust-rccl/ksl-docs (docs/source/quickstart/shaheen3gpu.rst,
#   docs/source/policy/shaheen3.rst, docs/source/systems/shaheen3/filesystem.rst),
#   https://github.com/HewlettPackard/shs-ccl-docs (read November 2026)
PARTITION=workq                      # the default; whole nodes, 24 hours, 64 GPUs a user
ACCOUNT=${ACCOUNT:-}                 # your project's id: see groups
CONSTRAINT=
QOS=
MODULES=()                           # loaded on top of PrgEnv-cray, which must stay: no module purge
NETWORK_PROFILE=default              # Slingshot is no InfiniBand: NCCL_NET=IB would find no adapter
LOCAL_STORAGE=                       # KAUST's pages name none: see df -hT /tmp on a compute node
CACHE=/scratch/${USER:-$(id -un)}/cache  # compute nodes do not mount /home; untouched files go after 60 days
export NCCL_SOCKET_IFNAME=hsn        # Slingshot's cards are hsn0 to hsn3 (HPE's ccl_env.sh); NCCL would take every card
# That is TCP: right, and slow. RDMA needs the plugin aws-ofi-nccl, for which KAUST's pages name no module (module avail
# nccl). With it: add the module to MODULES, and export what HPE's ccl_env.sh does, all of it (NCCL_NET='AWS Libfabric'
# for jobs of several nodes only; srun --network=disable_rdzv_get). On GH200 nodes of other sites NCCL returned wrong
# data over that plugin: https://github.com/NVIDIA/nccl/issues/2001 and pull request 21 of HPE's repository.
