#!/usr/bin/env bash
# Train, evaluate, report: three jobs, each of which waits for the one before. Run it on the login node, from the
# repository root; its arguments go to the training:
#   slurm/chain.sh --config ddp/configs/gpt_124m.yaml --train.steps 500
# It prints the numbers of the jobs and ends at once; the table is in the output of the last one. afterok: the job
# before must have succeeded. If it fails, Slurm cancels those behind it, which would else wait in the queue for ever.
set -euo pipefail

run=chain-$(date +%Y%m%d-%H%M%S)-$$
folder=${RUNS_DIR:-runs}/$run
then_only=(--parsable --kill-on-invalid-dep=yes)

train=$(sbatch --parsable ddp/single_node.sbatch "$@" --run_name "$run" --runs_dir "${RUNS_DIR:-runs}")
evaluate=$(sbatch "${then_only[@]}" --dependency=afterok:"$train" slurm/evaluate.sbatch "$folder")
report=$(sbatch "${then_only[@]}" --dependency=afterok:"$evaluate" slurm/report.sbatch "$folder")

echo "train $train, evaluate $evaluate, report $report; run folder $folder"
echo "watch them: squeue --jobs=$train,$evaluate,$report"
