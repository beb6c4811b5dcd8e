#!/bin/sh
# Runs the grid search of all seven CLUE tasks (or of TASKS='TNEWS AFQMC') on all GPUs, or with WORKERS cells on a CPU:
# 7 tasks x 3 batch sizes x 3 learning rates = 63 cells.
# For the results and the other variables, see run_one_search.sh.
set -e
. "$(dirname -- "$0")/../common/launcher.sh"
usage 1 $# "sh run_all_search.sh MODEL [more arguments of run_clue.py]"
model=$1
shift
dry=
[ "${DRY_RUN:-0}" = 0 ] || dry=--dry_run

# exec: killing the launcher also kills the search and its cells
exec "$PYTHON" -u "$here/grid_search.py" --model "$model" ${TASKS:+--tasks $TASKS} ${GPUS:+--gpus "$GPUS"} \
    ${BATCH_SIZES:+--batch_sizes $BATCH_SIZES} ${LEARNING_RATES:+--learning_rates $LEARNING_RATES} \
    ${EPOCHS:+--num_train_epochs "$EPOCHS"} ${MAX_SEQ_LENGTH:+--max_seq_length "$MAX_SEQ_LENGTH"} \
    ${WORKERS:+--workers "$WORKERS"} $dry $device_args -- "$@"
