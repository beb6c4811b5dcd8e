#!/bin/sh
# Fine-tunes one model on one task with one setting. Writes MODEL/models/TASK/LR_BATCH/.
# Arguments after the first seven are passed on to run_clue.py.
set -e
. "$(dirname -- "$0")/../common/launcher.sh"
usage 7 $# "sh run_clue.sh TASK LR BATCH EPOCHS MAX_SEQ_LEN GPU_ID MODEL [more arguments of run_clue.py]"
task=$(task_name "$1") lr=$2 batch=$3 epochs=$4 length=$5 gpu=$6 model=$7
shift 7

# The directory names the setting, so the cells of a grid lie side by side: 1e-4_32 is learning rate 1e-4, batch size 32.
# On a CPU the GPU id has no effect.
CUDA_VISIBLE_DEVICES=$gpu "$PYTHON" -u "$here/run_clue.py" --task_name "$task" --model_name_or_path "$model" \
    --learning_rate "$lr" --batch_size "$batch" --num_train_epochs "$epochs" --max_seq_length "$length" \
    --output_dir "$model/models/$task/${lr}_$batch" $device_args "$@"
