#!/bin/sh
# Runs the grid search of one task: batch 16, 32, 64 x learning rate 3e-5, 5e-5, 1e-4, with published epochs and length.
# Writes MODEL/models/TASK/LR_BATCH/ and MODEL/best.json. Finished cells are skipped, unfinished ones resume. Further
# arguments are passed on to run_clue.py. Optional variables: BATCH_SIZES, LEARNING_RATES, EPOCHS, MAX_SEQ_LENGTH,
# WORKERS (number of concurrent cells on a CPU), DRY_RUN=1 (only print the plan).
set -e
. "$(dirname -- "$0")/../common/launcher.sh"
usage 2 $# "sh run_one_search.sh MODEL TASK [GPU_ID] [more arguments of run_clue.py]"
model=$1 task=$2
# The order TASK MODEL is accepted, too.
if is_clue "$1"; then
    task=$1 model=$2
fi
shift 2
gpu=
case ${1-} in [0-9]*) gpu=$1; shift ;; esac

export TASKS="$task" GPUS="${gpu:-$GPUS}"
exec sh "$here/run_all_search.sh" "$model" "$@" # exec: killing the launcher also kills the search
