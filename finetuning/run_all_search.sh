#!/bin/sh
# The grids of all seven CLUE tasks (or of TASKS='TNEWS AFQMC'), spread over the GPUs that are there, or WORKERS on a CPU.
# Otherwise as run_one_search.sh, with the same variables.
set -e
. "$(dirname -- "$0")/../common/launcher.sh"
usage 1 $# "sh run_all_search.sh MODEL [more arguments of run_clue.py]"
model=$1
shift
dry=
[ "${DRY_RUN:-0}" = 0 ] || dry=--dry_run

# exec: a kill of the launcher is a kill of the search, and with it of the cells
exec "$PYTHON" -u "$here/grid_search.py" --model "$model" ${TASKS:+--tasks $TASKS} ${GPUS:+--gpus "$GPUS"} \
    ${BATCH_SIZES:+--batch_sizes $BATCH_SIZES} ${LEARNING_RATES:+--learning_rates $LEARNING_RATES} \
    ${EPOCHS:+--num_train_epochs "$EPOCHS"} ${MAX_SEQ_LENGTH:+--max_seq_length "$MAX_SEQ_LENGTH"} \
    ${WORKERS:+--workers "$WORKERS"} $dry $device_args -- "$@"
