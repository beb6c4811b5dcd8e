#!/bin/sh
# Runs the published general distillation: RoBERTa-wwm-ext-large (layer 20 of 24) into 6 layers x 768 from random weights,
# 400,000 steps of 1,024 sentences. Writes pretrain/model_STEP. Further arguments are passed on to general_distill.py and
# override the settings below. On several GPUs: NPROC=8 sh run.sh ... (--batch_size is per process).
#
#   sh run.sh [INPUT_DIR [STUDENT]] [more arguments of general_distill.py]
#   INPUT_DIR: text files with one sentence per line (default: dataset)
#   STUDENT: 6L768H (default), 4L256H or 2L128H from random weights, a built-in name, or a model directory of 6 layers
set -e
. "$(dirname -- "$0")/../common/launcher.sh"
input=dataset student=6L768H
case ${1-} in '' | -*) ;; *) input=$1; shift ;; esac
case ${1-} in '' | -*) ;; *) student=$1; shift ;; esac
[ -d "$input" ] || {
    echo "run.sh: error: $input: no such directory; put text files with one sentence per line there (published: a corpus" \
        "such as CLUECorpus2020 in about 64 files)" >&2
    exit 2
}
case $student in
    6L768H | 4L256H | 2L128H)
        set -- --init_config "$root/configs/ppminilm-$(lower "${student%L*}l-${student#*L}").json" \
            --student_layer_index $((${student%L*} - 1)) "$@"
        ;;
    *) set -- --student_model_name_or_path "$student" --student_layer_index 5 "$@" ;;
esac
# 1,024 sentences per step: published are 8 processes (V100 of 32 GB) with 128 each. The relations between samples are
# those of a micro-batch, so that stays 128, and fewer processes take several of them in a step.
launch=
case ${NPROC:-1} in
    1 | 2 | 4 | 8) accumulated=$((8 / ${NPROC:-1})) ;;
    *) echo "run.sh: error: NPROC=$NPROC: must be 1, 2, 4 or 8, as a step has 8 micro-batches of 128" >&2; exit 2 ;;
esac
[ "${NPROC:-1}" -eq 1 ] || launch="-m paddle.distributed.launch --nproc_per_node $NPROC"
# Whoever names another size of micro-batches also says how many are accumulated.
case " $* " in *" --batch_size"*) accumulated=1 ;; esac
# Published: mixed precision (AMP), which needs a GPU.
amp=
if [ "${DEVICE:-gpu}" != cpu ] && "$PYTHON" -c "import sys, paddle; sys.exit(paddle.device.cuda.device_count() == 0)"; then
    amp=--use_amp
fi

# Layer 20 of the teacher has index 19. beta 1 is the loss of sample-sample relations alone. 1 % of the steps, 4,000, are
# warm-up.
"$PYTHON" -u $launch "$here/general_distill.py" --input_dir "$input" --output_dir pretrain \
    --teacher_model_type roberta --teacher_model_name_or_path roberta-wwm-ext-large --teacher_layer_index 19 \
    --num_relation_heads 64 --alpha 0 --beta 1 --max_seq_length 128 --batch_size 128 \
    --gradient_accumulation_steps "$accumulated" --learning_rate 6e-4 --weight_decay 0.01 --warmup_proportion 0.01 \
    --max_steps 400000 $amp $device_args "$@"
