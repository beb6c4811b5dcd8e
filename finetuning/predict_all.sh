#!/bin/sh
# Writes the predictions for test.json, as CLUE takes them, of the best model of each task in a grid search's best.json:
# <task>_predict.json beside the model. What follows goes to run_clue.py.
set -e
. "$(dirname -- "$0")/../common/launcher.sh"
usage 1 $# "sh predict_all.sh BEST_JSON [more arguments of run_clue.py]"
best=$1
shift

predict_one() {
    "$PYTHON" "$here/run_clue.py" --do_predict --task_name "$task" --model_name_or_path "$model" $device_args "$@"
}
for_each_best "$best" predict_one "$@"
