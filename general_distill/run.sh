#!/bin/sh
# Runs the published general distillation: RoBERTa-wwm-ext-large (layer 20 of 24) into a student of 6 layers, 400,000
# steps with batches of 512 sentences. Writes pretrain/model_STEP. Further arguments are passed on to general_distill.py
# and override the settings below. On several GPUs: NPROC=8 sh run.sh ... (--batch_size is per process).
set -e
. "$(dirname -- "$0")/../common/launcher.sh"
usage 2 $# "sh run.sh INPUT_DIR STUDENT [more arguments of general_distill.py]
  STUDENT: 6L768H, 4L256H or 2L128H from random weights, a built-in name, or a model directory of 6 layers"
input=$1 student=$2
shift 2
case $student in
    6L768H | 4L256H | 2L128H)
        set -- --init_config "$root/configs/ppminilm-$(lower "${student%L*}l-${student#*L}").json" \
            --student_layer_index $((${student%L*} - 1)) "$@"
        ;;
    *) set -- --student_model_name_or_path "$student" --student_layer_index 5 "$@" ;;
esac
launch=
case ${NPROC:-1} in
    *[!0-9]* | 0) echo "run.sh: error: NPROC=$NPROC: must be a number of processes" >&2; exit 2 ;;
esac
[ "${NPROC:-1}" -eq 1 ] || launch="-m paddle.distributed.launch --nproc_per_node $NPROC"

# 512 sentences per step in all: NPROC processes take equal parts, 64 each with NPROC=8. Layer 20 of the teacher has index
# 19. beta 1 is the loss of sample-sample relations alone.
"$PYTHON" -u $launch "$here/general_distill.py" --input_dir "$input" --output_dir pretrain \
    --teacher_model_type roberta --teacher_model_name_or_path roberta-wwm-ext-large --teacher_layer_index 19 \
    --num_relation_heads 64 --alpha 0 --beta 1 --max_seq_length 128 --batch_size "$((512 / ${NPROC:-1}))" \
    --learning_rate 6e-4 --weight_decay 0.01 --warmup_proportion 0.01 --max_steps 400000 $device_args "$@"
