# shellcheck shell=bash
# Sourced by every sbatch file, at the repository root. Prepares the job, says what it prepared, and ends the job with
# one line when something is missing.
#
# It reads   CLUSTER         which profile of slurm/profiles/ describes this cluster (default: default), or a file
#            VENV            the environment's folder (default: .venv, else what is active)
#            RANKS_PER_NODE  processes on each node (default: its GPUs)
#            RESTARTS        requeue a job that failed after it had saved a checkpoint, until it was requeued this often
#            STAGE_ENV=1     copy the environment to each node's own disk first
#            BANDWIDTH_GATE  GB/s; end the job if an all-reduce between its GPUs is slower
#            MEMORY_LOG      seconds; log the memory of all nodes this often, beside the job
# and sets   RANKS_PER_NODE, RDZV_ID, RDZV_ENDPOINT          for torchrun
#            MASTER_ADDR, MASTER_PORT                        for srun and mpirun with one task a device
#            SRUN_CPUS_PER_TASK, OMP_NUM_THREADS, STOP_FILE  for all
# It defines `supervise`, which runs the training so that it is saved and requeued when Slurm takes the nodes away.
set -euo pipefail

die() {
    echo "job_env: error: $*" >&2
    exit 2
}

whole_number() { # NAME LEAST [ADVICE]
    [[ ${!1} =~ ^(0|[1-9][0-9]{0,5})$ && ${!1} -ge $2 ]] ||
        die "$1=${!1} is no whole number from $2 on; correct it${3:+, or $3}"
}

[[ -n ${SLURM_JOB_ID:-} ]] || die "this is no Slurm job; submit the file with sbatch"
[[ -f common/ranks.py ]] || die "the job runs in $PWD; submit it from the repository root"

# ---- the cluster: all facts about it stand in its profile
CLUSTER=${CLUSTER:-default}
profile=slurm/profiles/$CLUSTER.sh
if [[ $CLUSTER == */* ]]; then profile=$CLUSTER; fi # a profile of your own, outside the repository
[[ -f $profile ]] || die "CLUSTER=$CLUSTER: there is no $profile; there are: $(cd slurm/profiles && echo *.sh)"
MODULES=()
# shellcheck source=slurm/profiles/default.sh
source "$profile"
if ((${#MODULES[@]})); then
    declare -F module >/dev/null || die "profile $CLUSTER loads modules (${MODULES[*]}), and there is no command module"
    set +u # the modules of many sites read variables that are not set
    module load "${MODULES[@]}" || die "module load ${MODULES[*]} failed; see module avail, and correct $profile"
    set -u
fi
if [[ -n ${CACHE:-} ]]; then # downloads belong on a large, shared disk, not in the home folder
    export HF_HOME=${HF_HOME:-$CACHE/huggingface} TORCH_HOME=${TORCH_HOME:-$CACHE/torch}
fi

RESTARTS=${RESTARTS:-0}
whole_number RESTARTS 0

# ---- the environment
if [[ -n ${VENV:-} || -d .venv ]]; then
    VENV=$(realpath -m "${VENV:-.venv}")
    [[ -x $VENV/bin/torchrun ]] || die "there is no environment with torch in $VENV; make venv, or correct VENV"
    export PATH=$VENV/bin:$PATH
fi
command -v torchrun >/dev/null || die "no environment: neither VENV nor .venv, and no torchrun on the PATH; make venv"

each_node=(srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1)
if [[ ${STAGE_ENV:-0} == 1 ]]; then
    # Python opens thousands of small files when it starts: slow on a shared disk, worse from a hundred nodes at once.
    # One node reads them, once; the archive travels to the others through Slurm.
    [[ -f ${VENV:-}/pyvenv.cfg ]] || die "STAGE_ENV=1 copies an environment made by venv; found ${VENV:-none}"
    : "${LOCAL_STORAGE:?profile $CLUSTER names no LOCAL_STORAGE to stage the environment to}"
    staged=$LOCAL_STORAGE/environment-$SLURM_JOB_ID SECONDS=0
    tar -C "$VENV" -cf "$staged.tar" . || die "could not pack $VENV into $staged.tar; is there room?"
    if ((SLURM_NNODES > 1)); then sbcast --force "$staged.tar" "$staged.tar"; fi
    # shellcheck disable=SC2016 # the inner shell expands
    "${each_node[@]}" bash -c 'mkdir -p "$1" && tar -C "$1" -xf "$1.tar" && rm "$1.tar" &&
        find "$1/bin" -type f -exec env LC_ALL=C sed -i "1s|^#!$2/|#!$1/|" {} +' _ "$staged" "$VENV" ||
        die "could not unpack the environment to $staged on every node"
    export PATH=$staged/bin:$PATH
    echo "job_env: environment copied to $staged on each node in $SECONDS s"
fi

# ---- the network: what the profile's kind of network needs; names and reasons: python slurm/network.py --explain
network=$(python slurm/network.py --profile "${NETWORK_PROFILE:-default}") || exit 2
eval "$network"

# ---- the ranks: how many on a node, and where they meet
if [[ -z ${RANKS_PER_NODE:-} ]]; then
    # Inside salloc, --gres gives GPUs too, and no variable says so.
    [[ -n ${SLURM_GPUS_ON_NODE:-} ]] || die "Slurm does not say how many GPUs a node of this job has; submit it with" \
        "--gpus-per-node=N, or export RANKS_PER_NODE=N (salloc --gres; on CPUs, together with DEVICE=cpu)"
    RANKS_PER_NODE=${SLURM_GPUS_ON_NODE##*:}
    gpus=${SLURM_GPUS:-} # --gpus=N is a total, which Slurm may spread unevenly
    whole_number RANKS_PER_NODE 1
    if [[ ${gpus##*:} =~ ^[0-9]+$ && $((RANKS_PER_NODE * SLURM_NNODES)) -ne ${gpus##*:} ]]; then
        die "--gpus=$gpus does not lie evenly on $SLURM_NNODES nodes; ask for --gpus-per-node=N instead"
    fi
fi
whole_number RANKS_PER_NODE 1 "leave it out for one process on each GPU"
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*} # this script runs there
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000)) # two jobs that share a node get two ports, …
while (exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do # … and one that is taken is passed over
    MASTER_PORT=$((MASTER_PORT + 1))
done
RDZV_ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0} # a rank left over from before a requeue cannot join
RDZV_ENDPOINT=$MASTER_ADDR:$MASTER_PORT
export RANKS_PER_NODE RDZV_ID RDZV_ENDPOINT MASTER_ADDR MASTER_PORT
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun no longer inherits it (Slurm 22.05 and later)
fi
threads=$((${SLURM_CPUS_ON_NODE:-1} / RANKS_PER_NODE))
if [[ -n ${SLURM_CPUS_ON_NODE:-} && ${DEVICE:-} != cpu ]] && ((threads < 4)); then
    echo "job_env: warning: $SLURM_CPUS_ON_NODE cores for $RANKS_PER_NODE ranks on a node; a rank that trains on a GPU" \
        "wants 4 or more (itself, autograd, NCCL, data); more GPUs need more --cpus-per-task"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
# torchrun passes SIGTERM on to its ranks, and kills them 30 s later: too soon for a checkpoint that takes longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

# ---- what is stopped with the job, however it ends
# Its name for Slurm's commands: the number of one task of an array is also that of the whole array.
this_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}
end_job() {
    rm -f "$STOP_FILE" "$MISTAKE_FILE" "$started"
    if [[ -n ${memory_logger:-} ]]; then
        # The only step that is left. scancel's signal lets the loggers end; srun, signalled itself, has them killed.
        scancel --quiet --signal=TERM "$this_job" && wait "$memory_logger" || true
        python slurm/memory_logger.py summary "$memory_log" --plot "$memory_log/memory.png" || true
    fi
    if [[ -n ${staged:-} ]]; then "${each_node[@]}" rm -rf "$staged"; fi
}
runs=$(realpath -m "${RUNS_DIR:-runs}")
STOP_FILE=$runs/stop-job$SLURM_JOB_ID
MISTAKE_FILE=$runs/mistake-job$SLURM_JOB_ID # a rank that ends with 2 makes it: torchrun ends with 1 whatever its ranks do
started=$runs/started-job$SLURM_JOB_ID
export STOP_FILE MISTAKE_FILE
mkdir -p "$runs" || die "the run folder $runs cannot be made; set RUNS_DIR"
rm -f "$STOP_FILE" "$MISTAKE_FILE" "$started"
trap end_job EXIT

# ---- preemption: Slurm's signals reach this shell, not the ranks (torchrun would die of USR1). A file reaches them:
# they agree on a step, save, and end. SIGUSR1 comes before the time limit (--signal=B:USR1@120), or by
# `scancel --batch --signal=USR1 JOB`; SIGTERM when the job is preempted or cancelled.
signals=0 requeue=
ask_to_stop() {
    signals=$((signals + 1))
    echo "job_env: SIG$1: the ranks are asked to save and stop"
    : >"$STOP_FILE"
}
trap 'ask_to_stop USR1; requeue=1' USR1
trap 'ask_to_stop TERM' TERM

# Whether the run of this job has a checkpoint that is newer than its start. Arguments: the command.
has_progress() {
    local name="*-job$SLURM_JOB_ID" folder=$runs word before=
    for word in "$@"; do
        case $before in --run_name) name=$word ;; --runs_dir) folder=$word ;; esac
        case $word in --run_name=*) name=${word#*=} ;; --runs_dir=*) folder=${word#*=} ;; esac
        before=$word
    done
    [[ -n $(find "$folder" -path "$folder/$name/checkpoints/*/manifest.json" -newer "$started" -print -quit) ]]
}

# Requeue a job that failed, RESTARTS times at most (Slurm's own requeues count): never for a mistake that only the user
# can mend, nor when it would fail at the same place again, because nothing was saved since it began.
may_restart() { # CODE COMMAND…
    local code=$1 count=${SLURM_RESTART_COUNT:-0}
    shift
    ((${RESTARTS:-0} > 0 && signals == 0)) || return 1
    if ((code == 2)) || [[ -e $MISTAKE_FILE ]]; then
        echo "job_env: not restarted: the ranks ended by a mistake that only you can mend; see their line above"
    elif ((count >= RESTARTS)); then
        echo "job_env: not restarted: the job was requeued $count time(s), RESTARTS=$RESTARTS"
    elif ! has_progress "$@"; then
        echo "job_env: not restarted: no checkpoint is newer than this start, so it would fail again; see the error above"
    else
        echo "job_env: failed with code $code after a new checkpoint: requeued, restart $((count + 1)) of $RESTARTS"
        return 0
    fi
    return 1
}

requeue_job() {
    end_job
    trap - EXIT TERM
    scontrol requeue "$this_job" || die "Slurm did not requeue the job; submit it again with the same run_name"
    sleep 60 # Slurm ends this shell
}

supervise() {
    local pid seen code
    : >"$started"
    "$@" &
    pid=$!
    while :; do # bash handles a signal only while it waits for something in the background
        seen=$signals code=0
        wait "$pid" || code=$?
        if ((seen == signals)); then break; fi # otherwise a signal has ended the wait, not the command
    done
    if [[ $code -eq 0 && -n $requeue ]]; then
        echo "job_env: saved; job $SLURM_JOB_ID is requeued and will go on from the checkpoint"
        requeue_job
    elif [[ $code -ne 0 ]] && may_restart "$code" "$@"; then
        requeue_job
    fi
    return "$code"
}

echo "job_env: job $SLURM_JOB_ID on ${hosts//$'\n'/ }: $SLURM_NNODES node(s) × $RANKS_PER_NODE ranks," \
    "profile $CLUSTER, rendezvous $RDZV_ENDPOINT, environment ${VENV:-$(dirname "$(dirname "$(command -v torchrun)")")}"

if [[ -n ${BANDWIDTH_GATE:-} ]]; then slurm/bandwidth_gate.sh "$BANDWIDTH_GATE"; fi
if [[ -n ${MEMORY_LOG:-} ]]; then
    memory_log=$(realpath -m "${RUNS_DIR:-runs}")/memory-job$SLURM_JOB_ID
    "${each_node[@]}" --overlap \
        python slurm/memory_logger.py --output "$memory_log" --interval "$MEMORY_LOG" >/dev/null &
    memory_logger=$!
fi
