#!/bin/sh
# Prunes a fine-tuned model; what follows the eight arguments goes to prune.py. Writes pruned_models/TASK/WIDTH/best_model/.
set -e
. "$(dirname -- "$0")/../launcher.sh"
usage 8 $# "sh prune.sh TASK LR BATCH EPOCHS MAX_SEQ_LEN GPU_ID MODEL WIDTHS [more arguments of prune.py]
  WIDTHS: one width, or several as one argument: '0.75 0.5'"
task=$(task_name "$1") lr=$2 batch=$3 epochs=$4 length=$5 gpu=$6 model=$7 widths=$8
shift 8

CUDA_VISIBLE_DEVICES=$gpu "$PYTHON" -u "$here/prune.py" --task_name "$task" --model_name_or_path "$model" \
    --learning_rate "$lr" --batch_size "$batch" --num_train_epochs "$epochs" --max_seq_length "$length" \
    --width_mult_list $widths --output_dir "pruned_models/$task" $device_args "$@"
