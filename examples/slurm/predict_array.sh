#!/bin/bash
# Answers a data set with eight jobs of one GPU each; every job takes each eighth shard.
#
#     sbatch examples/slurm/predict_array.sh hf://datasets/OWNER/NAME s3://BUCKET/answers
#
# A job that is preempted or runs out of time goes on where it was: `--requeue` starts it again, and so does the same
# command. Rows depend neither on the number of jobs nor on interruptions.
#SBATCH --job-name=segcompass-predict
#SBATCH --array=0-7
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@60
#SBATCH --output=predict-%A-%a.log
set -euo pipefail

DATASET=${1:?name the data set}
OUTPUT=${2:?name a folder that all jobs reach, or a URL}
MODEL=${MODEL:-}  # folder or Hub id of a checkpoint; without it the bundled one

# The shell gets SIGTERM a minute before the end and passes it on; the command then says how it goes on.
segcompass predict --dataset "$DATASET" --output "$OUTPUT" ${MODEL:+--model "$MODEL"} \
    --shard "$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))/$SLURM_ARRAY_TASK_COUNT" &
trap 'kill -TERM $!' TERM
wait $!
