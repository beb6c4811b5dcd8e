#!/bin/sh
# Takes one task through every stage, with the commands of the README: fine-tune, export, prune to 3/4 width, export, quantize in eight ways,
# score in INT8, and print the table of it all.
#
#   sh run_all.sh TASK LR BATCH EPOCHS MAX_SEQ_LEN GPU_ID MODEL [more arguments of run_clue.py]
#   sh run_all.sh BEST_JSON                     # every task of a grid search, from its best fine-tuned model on
#
# What follows the seven arguments goes to run_clue.py, which runs in finetuning/: its relative paths start there. But
# --data_dir DIR (which starts from where you are) and --overwrite go to every stage. These variables change the rest:
#   WIDTHS="0.75 0.5"   widths to prune to (default: 0.75)
#   PRUNE_LR, PRUNE_EPOCHS   learning rate and epochs of pruning (default: those of fine-tuning)
#   PRUNE_ARGS          more arguments of prune.py
#   ONNX=1              write the quantized models as ONNX, too, into deploy/onnx/onnx_models
#   DATA_ARGS           for every stage, such as '--max_train_samples 500 --max_eval_samples 200' for a quick trial
set -e
. "$(dirname -- "$0")/common/launcher.sh"

fail() { echo "run_all.sh: error: $1" >&2; exit 2; }
step() { printf '\n== %s\n' "$*"; }

best=
case ${1-} in
    *.json)
        [ -f "$1" ] || fail "$1: no such file"
        best=$(CDPATH= cd -- "$(dirname -- "$1")" && pwd)/$(basename -- "$1")
        "$PYTHON" "$root/summarize.py" --cells "$best" > /dev/null # ends here if it is no best.json
        shift
        ;;
    *)
        usage 7 $# "sh run_all.sh TASK LR BATCH EPOCHS MAX_SEQ_LEN GPU_ID MODEL [more arguments of run_clue.py]
  or: sh run_all.sh BEST_JSON [--data_dir DIR] [--overwrite]"
        task=$(task_name "$1") lr=$2 batch=$3 epochs=$4 length=$5 gpu=$6 model=$7
        shift 7
        ;;
esac

# Takes --data_dir and --overwrite out of the arguments: each one is taken from the front and, unless it is one of these
# two, put back at the end.
data_dir= overwrite= left=$#
while [ "$left" -gt 0 ]; do
    argument=$1
    shift
    left=$((left - 1))
    case $argument in
        --data_dir)
            [ -d "$1" ] || fail "--data_dir $1: no such directory"
            data_dir=$(CDPATH= cd -- "$1" && pwd) # the stages run in directories of their own
            shift
            left=$((left - 1))
            ;;
        --overwrite) overwrite=--overwrite ;;
        *) set -- "$@" "$argument" ;;
    esac
done
case $CLUE_DATA_DIR in '' | /*) ;; *) export CLUE_DATA_DIR="$PWD/$CLUE_DATA_DIR" ;; esac
widths=${WIDTHS:-0.75}

# A grid search has fine-tuned all tasks already. What follows is the same as below, for each of them; a task that fails
# does not stop the others.
if [ -n "$best" ]; then
    [ $# -eq 0 ] || fail "$1: with a best.json only --data_dir and --overwrite"
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

    exported=
    if [ "$ONNX" = 1 ]; then
        step "writing ONNX"
        exported=deploy/onnx/onnx_models
        cd "$root/deploy/onnx"
        sh export_all.sh "$@" $overwrite $DATA_ARGS || failed="$failed export_all.sh"
    fi

    step "summary"
    cd "$root"
    "$PYTHON" summarize.py "$(dirname -- "$best")" pruning quantization $exported || failed="$failed summarize.py"
    [ -z "$failed" ] || { echo "run_all.sh: failed:$failed" >&2; exit 1; }
    exit
fi

case $model in /*) base=$model ;; *) base=$root/finetuning/$model ;; esac
tuned=$base/models/$task/${lr}_$batch

# 1. Fine-tuning: the encoder learns the task. Of all evaluations on dev, one every 100 steps, the best checkpoint stays.
# The export turns it into a static graph, whose logits are compared with the model's.
step "fine-tuning -> $tuned"
cd "$root/finetuning"
sh run_clue.sh "$task" "$lr" "$batch" "$epochs" "$length" "$gpu" "$model" ${data_dir:+--data_dir "$data_dir"} \
    $overwrite $DATA_ARGS "$@"
"$PYTHON" export_model.py --task_name "$task" --model_path "$tuned" ${data_dir:+--data_dir "$data_dir"} \
    $DATA_ARGS $device_args

# 2. Pruning: every layer keeps its most important heads and neurons, 3/4 of them, and the fine-tuned model teaches what is
# left. 6 layers x 768: 59.7 M parameters become 49.1 M, and 5.44 G multiply-adds 4.08 G; published, that costs 0.25 points
# on average over the seven tasks.
step "pruning to $widths"
cd "$root/pruning"
sh prune.sh "$task" "${PRUNE_LR:-$lr}" "$batch" "${PRUNE_EPOCHS:-$epochs}" "$length" "$gpu" "$tuned" "$widths" \
    ${data_dir:+--data_dir "$data_dir"} $overwrite $DATA_ARGS $PRUNE_ARGS
sh export.sh pruned_models "$task" ${data_dir:+--data_dir "$data_dir"} $DATA_ARGS

# 3. Quantization: 4 algorithms x 4 and 8 calibration samples = 8 variants for each width, each scored on dev by the INT8
# engine. No training: a few seconds each.
step "quantizing"
cd "$root/quantization"
for static in "$root/pruning/pruned_models/$task"/*/sub_static; do
    sh quant.sh "$task" "$static" ${data_dir:+--data_dir "$data_dir"} $overwrite $DATA_ARGS
done

# 4. Inference: all variants in one table, as a service would compute them.
step "scoring in INT8"
cd "$root/deploy/python"
"$PYTHON" infer.py --task_name "$task" --int8 --model_path "$root/quantization/$(lower "$task")"_*quant_models/* \
    ${data_dir:+--data_dir "$data_dir"} $DATA_ARGS $device_args

# 5. If wanted: the same INT8 models for runtimes without Paddle. One that is refused does not stop the rest.
exported= failed=
if [ "$ONNX" = 1 ]; then
    step "writing ONNX"
    exported=deploy/onnx/onnx_models
    cd "$root/deploy/onnx"
    for models in "$root/quantization/$(lower "$task")"_*quant_models/*; do
        "$PYTHON" export_onnx.py --model_path "$models" ${data_dir:+--data_dir "$data_dir"} $overwrite $DATA_ARGS ||
            failed="$failed $models"
    done
fi

# 6. What was gained and lost from stage to stage, from the stage.json that each of them wrote.
step "summary"
cd "$root"
"$PYTHON" summarize.py --task_name "$task" "$base/models/$task" pruning quantization $exported
[ -z "$failed" ] || { echo "run_all.sh: failed:$failed" >&2; exit 1; }
