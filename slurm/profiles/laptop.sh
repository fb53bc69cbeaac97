# shellcheck shell=bash disable=SC2034  # read by use_cluster.sh and job_env.sh
# The Slurm cluster that slurm/cluster.py starts on one machine; its shells set CLUSTER=laptop by themselves.
# Facts from: slurm/cluster.py
PARTITION=                           # gpu is the default; preemptible is the other
ACCOUNT=${ACCOUNT:-}                 # it keeps no accounts
CONSTRAINT=
QOS=
MODULES=()
NETWORK_PROFILE=default              # each node has one network card, and its host name is that card's: nothing to name
LOCAL_STORAGE=${SLURM_CLUSTER_LOCAL:-/tmp}  # a folder of its own on each node; /tmp is shared there
CACHE=                               # your own: the nodes see your files
export DEVICE=cpu                    # Slurm counts its GPUs, but they are make-believe
export OMP_NUM_THREADS=1             # its CPUs too: a few cores pose as many, and more threads would only wait
