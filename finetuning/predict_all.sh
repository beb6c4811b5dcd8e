#!/bin/sh
# Predicts test.json with the best model of each task in a grid search's best.json. Writes CLUE submission files,
# <task>_predict.json, to the model directories. Further arguments are passed on to run_clue.py.
set -e
. "$(dirname -- "$0")/../common/launcher.sh"
usage 1 $# "sh predict_all.sh BEST_JSON [more arguments of run_clue.py]"
best=$1
shift

predict_one() {
    "$PYTHON" "$here/run_clue.py" --do_predict --task_name "$task" --model_name_or_path "$model" $device_args "$@"
}
for_each_best "$best" predict_one "$@"
