#!/bin/sh
# Prunes a fine-tuned model. Writes pruned_models/TASK/WIDTH/best_model/. Further arguments are passed on to prune.py.
# With the best.json of a grid search: prunes the best model of each task, with the settings of its cell.
set -e
. "$(dirname -- "$0")/../common/launcher.sh"
case ${1-} in
    *.json)
        usage 2 $# "sh prune.sh BEST_JSON WIDTHS [more arguments of prune.py]"
        best=$1 widths=$2
        shift 2
        prune_one() { sh "$0" "$task" "$lr" "$batch" "$epochs" "$length" "${GPU_ID:-0}" "$model" "$widths" "$@"; }
        for_each_best "$best" prune_one "$@"
        exit
        ;;
esac
usage 8 $# "sh prune.sh TASK LR BATCH EPOCHS MAX_SEQ_LEN GPU_ID MODEL WIDTHS [more arguments of prune.py]
  WIDTHS: one width, or several as one argument: '0.75 0.5'; or: sh prune.sh BEST_JSON WIDTHS"
task=$(task_name "$1") lr=$2 batch=$3 epochs=$4 length=$5 gpu=$6 model=$7 widths=$8
shift 8

# Of 12 heads and 3072 neurons per layer, width 0.75 keeps 9 and 2304. Learning rate and epochs are usually those of
# fine-tuning.
CUDA_VISIBLE_DEVICES=$gpu "$PYTHON" -u "$here/prune.py" --task_name "$task" --model_name_or_path "$model" \
    --learning_rate "$lr" --batch_size "$batch" --num_train_epochs "$epochs" --max_seq_length "$length" \
    --width_mult_list $widths --output_dir "pruned_models/$task" $device_args "$@"
