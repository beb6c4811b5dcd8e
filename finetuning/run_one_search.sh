#!/bin/sh
# The grid of one task: batch 16, 32, 64 x learning rate 3e-5, 5e-5, 1e-4, with the task's published epochs and length.
# Writes MODEL/models/TASK/LR_BATCH/ and MODEL/best.json. Finished cells are skipped, begun ones resume. What follows goes
# to run_clue.py. May be set: BATCH_SIZES, LEARNING_RATES, EPOCHS, MAX_SEQ_LENGTH, WORKERS (cells at once on a CPU),
# DRY_RUN=1 (print the plan only).
set -e
. "$(dirname -- "$0")/../common/launcher.sh"
usage 2 $# "sh run_one_search.sh MODEL TASK [GPU_ID] [more arguments of run_clue.py]"
model=$1 task=$2
# The other order, TASK MODEL, is understood, too.
if is_clue "$1"; then
    task=$1 model=$2
fi
shift 2
gpu=
case ${1-} in [0-9]*) gpu=$1; shift ;; esac

export TASKS="$task" GPUS="${gpu:-$GPUS}"
exec sh "$here/run_all_search.sh" "$model" "$@" # exec: a kill of the launcher is a kill of the search
