# shellcheck shell=bash disable=SC2034  # read by use_cluster.sh and job_env.sh
# No site at all: Slurm's own defaults, no modules, and diagnostics as the only variables of NCCL.
# It is what you get without CLUSTER. For a new cluster copy it; README.md here says which command tells each fact.
PARTITION=                           # for sbatch and salloc; empty: the site's default
ACCOUNT=${ACCOUNT:-}                 # yours; empty: the site's default
CONSTRAINT=                          # node features
QOS=
MODULES=()                           # loaded in the job, in this order
NETWORK_PROFILE=default              # of common/launching/network.py
LOCAL_STORAGE=                       # node-local, where an environment may be staged; empty: nowhere
CACHE=                               # shared and large: Hugging Face, torch, …; empty: where they put it themselves
