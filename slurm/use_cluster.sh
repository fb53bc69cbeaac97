# shellcheck shell=bash
# Source it once in a login shell: what sbatch, salloc and srun have to know of this cluster before a job starts.
#
#   source slurm/use_cluster.sh ibex        # or: CLUSTER=ibex in your ~/.bashrc, then source slurm/use_cluster.sh
#   sbatch ddp/multi_node.sbatch
#
# A job inherits CLUSTER, so that slurm/job_env.sh reads the same profile again for what a job has to know.
use_cluster() {
    local name=${1:-${CLUSTER:-}} profile profiles facts program option value
    profiles=$(dirname "${BASH_SOURCE[0]}")/profiles
    profile=$profiles/$name.sh
    if [[ $name == */* ]]; then profile=$(realpath -m "$name") name=$profile; fi # a profile of your own
    if [[ -z $name || ! -f $profile ]]; then
        echo "use_cluster: error: no profile ${name:-named}; expected one of $(cd "$profiles" && echo *.sh), or a file" >&2
        return 2
    fi
    # The subshell keeps what else the profile sets out of this shell.
    # shellcheck source=slurm/profiles/default.sh
    facts=$(source "$profile" && for option in PARTITION ACCOUNT CONSTRAINT QOS; do
        echo "$option ${!option:-}"
    done)
    export CLUSTER=$name
    echo "cluster $name:"
    while read -r option value; do
        echo "  $option ${value:-(the default)}"
        for program in SBATCH SALLOC SLURM; do # SLURM_… is what srun reads
            if [[ -n $value ]]; then export "${program}_$option=$value"; else unset "${program}_$option"; fi
        done
    done <<<"$facts"
}
use_cluster "$@"
