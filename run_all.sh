#!/bin/sh
# One task through every stage: fine-tune, export, prune to 3/4 width, export, quantize in eight ways, score in INT8, and
# the table of it all. What follows the seven arguments goes to run_clue.py, its relative paths from finetuning/ on; but
# --data_dir DIR (from here on) and --overwrite go to every stage. May be set: WIDTHS (0.75), PRUNE_LR and PRUNE_EPOCHS
# (those of fine-tuning), PRUNE_ARGS, and DATA_ARGS for every stage (e.g. '--max_eval_samples 200').
# With the best.json of a grid search in place of the seven: every task in it, from its best fine-tuned model on.
set -e
. "$(dirname -- "$0")/launcher.sh"
best=
case ${1-} in
    *.json)
        [ -f "$1" ] || { echo "run_all.sh: error: $1: no such file" >&2; exit 2; }
        best=$(CDPATH= cd -- "$(dirname -- "$1")" && pwd)/$(basename -- "$1")
        "$PYTHON" "$root/summarize.py" --cells "$best" > /dev/null # ends here if it is none
        shift
        ;;
    *)
        usage 7 $# "sh run_all.sh TASK LR BATCH EPOCHS MAX_SEQ_LEN GPU_ID MODEL [more arguments of run_clue.py]
  or: sh run_all.sh BEST_JSON [--data_dir DIR] [--overwrite]"
        task=$(task_name "$1") lr=$2 batch=$3 epochs=$4 length=$5 gpu=$6 model=$7
        shift 7
        ;;
esac
data_dir= overwrite= left=$#
while [ "$left" -gt 0 ]; do # each argument is taken from the front and, unless it is for every stage, put back at the end
    argument=$1
    shift
    left=$((left - 1))
    case $argument in
        --data_dir)
            [ -d "$1" ] || { echo "run_all.sh: error: --data_dir $1: no such directory" >&2; exit 2; }
            data_dir=$(CDPATH= cd -- "$1" && pwd)
            shift
            left=$((left - 1))
            ;;
        --overwrite) overwrite=--overwrite ;;
        *) set -- "$@" "$argument" ;;
    esac
done
widths=${WIDTHS:-0.75}
case $CLUE_DATA_DIR in '' | /*) ;; *) export CLUE_DATA_DIR="$PWD/$CLUE_DATA_DIR" ;; esac

step() { printf '\n== %s\n' "$*"; }

if [ -n "$best" ]; then
    [ $# -eq 0 ] || { echo "run_all.sh: error: $1: with a best.json only --data_dir and --overwrite" >&2; exit 2; }
    set -- ${data_dir:+--data_dir "$data_dir"}
    failed=
    step "exporting the fine-tuned models"
    cd "$root/pruning"
    sh export_all.sh "$best" "$@" $DATA_ARGS || failed="$failed export_all.sh"
    step "pruning to $widths"
    sh prune.sh "$best" "$widths" "$@" $overwrite ${PRUNE_LR:+--learning_rate "$PRUNE_LR"} \
        ${PRUNE_EPOCHS:+--num_train_epochs "$PRUNE_EPOCHS"} $DATA_ARGS $PRUNE_ARGS || failed="$failed prune.sh"
    sh export_all.sh pruned_models "$@" $DATA_ARGS || failed="$failed export_all.sh"
    step "quantizing"
    cd "$root/quantization"
    sh quant_all.sh "$best" "$@" $overwrite $DATA_ARGS || failed="$failed quant_all.sh"
    sh quant_all.sh "$@" $overwrite $DATA_ARGS || failed="$failed quant_all.sh"
    step "scoring in INT8"
    cd "$root/deploy/python"
    sh infer_all.sh "$@" $DATA_ARGS || failed="$failed infer_all.sh"
    step "summary"
    cd "$root"
    "$PYTHON" summarize.py "$(dirname -- "$best")" pruning quantization || failed="$failed summarize.py"
    [ -z "$failed" ] || { echo "run_all.sh: failed:$failed" >&2; exit 1; }
    exit
fi

case $model in /*) base=$model ;; *) base=$root/finetuning/$model ;; esac
tuned=$base/models/$task/${lr}_$batch

step "fine-tuning -> $tuned"
cd "$root/finetuning"
sh run_clue.sh "$task" "$lr" "$batch" "$epochs" "$length" "$gpu" "$model" ${data_dir:+--data_dir "$data_dir"} \
    $overwrite $DATA_ARGS "$@"
"$PYTHON" export_model.py --task_name "$task" --model_path "$tuned" ${data_dir:+--data_dir "$data_dir"} \
    $DATA_ARGS $device_args

step "pruning to $widths"
cd "$root/pruning"
sh prune.sh "$task" "${PRUNE_LR:-$lr}" "$batch" "${PRUNE_EPOCHS:-$epochs}" "$length" "$gpu" "$tuned" "$widths" \
    ${data_dir:+--data_dir "$data_dir"} $overwrite $DATA_ARGS $PRUNE_ARGS
sh export.sh pruned_models "$task" ${data_dir:+--data_dir "$data_dir"} $DATA_ARGS

step "quantizing"
cd "$root/quantization"
for static in "$root/pruning/pruned_models/$task"/*/sub_static; do
    sh quant.sh "$task" "$static" ${data_dir:+--data_dir "$data_dir"} $overwrite $DATA_ARGS
done

step "scoring in INT8"
cd "$root/deploy/python"
"$PYTHON" infer.py --task_name "$task" --int8 --model_path "$root/quantization/$(lower "$task")"_*quant_models/* \
    ${data_dir:+--data_dir "$data_dir"} $DATA_ARGS $device_args

step "summary"
cd "$root"
"$PYTHON" summarize.py --task_name "$task" "$base/models/$task" pruning quantization
