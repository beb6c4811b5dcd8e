#!/usr/bin/env bash
# Runs the whole pipeline on generated data, offline, in minutes: a teacher, general distillation, a small grid search
# on three tasks, export, pruning, quantization in eight ways, INT8 inference, timing, serving, tables and a plot. It calls
# the same launchers as a user, and ends with one screen of results. Everything is written to demo/output/. Rerun the same
# command to resume.
#
#   bash demo/run.sh [--task TASK] [--resume]
#
#   --task TASK  only TNEWS, AFQMC, CLUEWSC2020, or MULTILABEL, whose texts have several labels or none (default: the
#                first three; the first one is quantized and served)
#   --resume     resume an interrupted run; fail if there is none
set -e
asked=$PYTHON
. "$(dirname "$0")/../common/launcher.sh"
output=${DEMO_OUTPUT:-$here/output} # check_gpu.sh names another directory

fail() {
    echo "demo/run.sh: error: $1" >&2
    exit 2
}

tasks="TNEWS AFQMC CLUEWSC2020" resume=
while [ $# -gt 0 ]; do
    case $1 in
        --task)
            tasks=$(upper "${2-}")
            case $tasks in
                TNEWS | AFQMC | CLUEWSC2020 | MULTILABEL) ;;
                *) fail "--task ${2-(nothing)}: must be TNEWS, AFQMC, CLUEWSC2020 or MULTILABEL" ;;
            esac
            shift
            ;;
        --resume) resume=yes ;;
        -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) fail "unknown argument '$1'; there are --task TASK and --resume" ;;
    esac
    shift
done
[ -z "$resume" ] || [ -d "$output" ] || fail "--resume: there is no $output to resume"
first=${tasks%% *}
steps=${DEMO_STEPS:-600} # training steps of the teacher; the student takes two thirds
student_steps=$((steps * 2 / 3))
student=pretrain/model_$student_steps

started=$SECONDS
step() { printf '\n== %d:%02d  %s\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "$*"; }

# Functions for for_each_best of common/launcher.sh, which sets task, lr and model; asked_for skips all other tasks.
asked_for() { case " $tasks " in *" $task "*) "$@" ;; esac; }
export_one() { "$PYTHON" "$root/finetuning/export_model.py" --task_name "$task" --model_path "$model" --device "$DEVICE"; }
prune_one() { sh "$root/pruning/prune.sh" "$task" "$lr" 32 2 64 0 "$model" 0.75 --group_by_length; }
export_pruned_one() { sh "$root/pruning/export.sh" pruned_models "$task"; }
# time_first QUANTIZED: times the three models of the first task one after the other, so that the machine is equally busy.
time_first() {
    [ "$task" = "$first" ] || return 0
    pruned=pruned_models/$task/0.75/sub_static
    ! are_timed "$model" "$pruned" "$1" || return 0
    perf_of fp32 "$model" "$pruned" && perf_of int8 "$1"
}
# are_timed MODEL...: whether speed/ has figures of these very parameters.
are_timed() {
    for directory; do
        hash=$(sha256sum "$directory"/*.pdiparams | cut -d ' ' -f 1)
        grep -qs "$hash" "speed/$first-$DEVICE"-*.json || return 1
    done
}
perf_of() {
    "$PYTHON" "$root/deploy/python/infer.py" --perf --perf_json "speed/$first-$DEVICE-$1.json" --precision "$1" \
        --device "$DEVICE" --model_path "${@:2}"
}

if [ -z "$asked" ]; then
    sh "$root/setup_env.sh" --serving
    PYTHON=$root/.venv/bin/python
fi
mkdir -p "$output"
cd "$output"
output=$PWD
export DEVICE=${DEVICE:-cpu} CLUE_DATA_DIR=$output/data

step "generating data -> data/"
[ -d data/multilabel_public ] || "$PYTHON" "$root/demo/generate_data.py" --output_dir data

step "pre-training a teacher by masked language modelling -> teacher/"
"$PYTHON" "$root/demo/pretrain_mlm.py" --init_config "$root/configs/teacher-2l-192h.json" --vocab_file data/vocab.txt \
    --input_dir data/corpus --output_dir teacher --max_steps "$steps" --batch_size 32 --learning_rate 2e-3 \
    --warmup_proportion 0.04 --max_seq_length 64 --group_by_length

step "general distillation into a student -> $student/"
sh "$root/general_distill/run.sh" data/corpus 2L128H --init_config "$root/configs/student-2l-128h.json" \
    --teacher_model_name_or_path "$output/teacher" --teacher_layer_index 1 --num_relation_heads 8 --max_seq_length 64 \
    --batch_size 32 --learning_rate 3e-3 --max_steps $student_steps --save_steps 200 --group_by_length

step "fine-tuning, a small grid -> $student/models/"
for task in $tasks; do
    rates=1e-3 epochs=4
    [ "$task" != AFQMC ] || { rates=5e-4 epochs=6; } # comparing sentences takes longer to learn
    [ "$task" != "$first" ] || rates="5e-4 1e-3"
    [ "$task" != MULTILABEL ] || { rates="1e-3 2e-3" epochs=8; } # most of its 15 labels are rare
    BATCH_SIZES=32 LEARNING_RATES=$rates EPOCHS=$epochs MAX_SEQ_LENGTH=64 \
        sh "$root/finetuning/run_one_search.sh" "$student" "$task" --group_by_length
done

step "exporting the best of the grid"
for_each_best "$student/best.json" asked_for export_one

step "pruning to 3/4 width -> pruned_models/"
for_each_best "$student/best.json" asked_for prune_one
for_each_best "$student/best.json" asked_for export_pruned_one

step "quantizing $first in eight ways -> *_quant_models/"
sh "$root/quantization/quant.sh" "$first" "pruned_models/$first/0.75/sub_static"

step "scoring in INT8"
QUANT_DIR=$output sh "$root/deploy/python/infer_all.sh"

# The best on dev of the eight is timed and served; of equal ones the first, as in the tables.
quantized=$(PYTHONPATH=$root "$PYTHON" -c 'import sys
from common.records import read_record, score
print(max(sys.argv[1:], key=lambda directory: score(read_record(directory))))' "$(lower "$first")_quant_models"/*)

step "timing the models of $first -> speed/"
mkdir -p speed
for_each_best "$student/best.json" time_first "$quantized"

step "serving the INT8 model, $quantized -> serving_server/"
"$PYTHON" "$root/deploy/serving/export_to_serving.py" --dirname "$quantized" --server_path serving_server \
    --client_path serving_client
ports=$("$PYTHON" -c 'import socket
probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(probe.getsockname()[1] for probe in probes))')
device_type=2 # the GPU, with TensorRT
[ "$DEVICE" != cpu ] || device_type=0
"$PYTHON" "$root/deploy/serving/web_service.py" --model serving_server --log_dir . --http_port "${ports% *}" \
    --rpc_port "${ports#* }" --device_type $device_type &
service=$!
trap 'kill $service 2> /dev/null' EXIT
"$PYTHON" "$root/deploy/serving/web_service.py" --http_port "${ports% *}" --wait-ready 60
case $first in
    TNEWS) question=(--text "记者说股价创下新高，散户也受影响") ;;
    AFQMC) question=(--text "怎么查账单" --text_pair "账单在哪里看") ;;
    MULTILABEL) question=(--text "昨晚球队绝杀对手，银行下调利率，与芯片无关") ;;
    CLUEWSC2020) question=(--text "今天，_小明_感谢了小刚，因为[他]心里很感动。") ;;
esac
"$PYTHON" "$root/deploy/serving/rpc_client.py" --address "127.0.0.1:${ports#* }" "${question[@]}" > answer.json
kill $service
wait $service
trap - EXIT

step "the same model for runtimes without Paddle -> onnx_model/"
"$PYTHON" "$root/deploy/onnx/export_onnx.py" --model_path "$quantized" --output_dir onnx_model --overwrite
"$PYTHON" "$root/deploy/onnx/infer_onnx.py" --model_path onnx_model "${question[@]}" > onnx_answer.json

step "tables and plot -> tables.md, clue.png"
perf=()
for timed in speed/*-"$DEVICE"-*.json; do perf+=(--perf "$timed"); done
"$PYTHON" "$root/summarize.py" "$student" pruned_models ./*_quant_models "${perf[@]}" --plot clue.png > tables.md

step "done: what each stage cost and gained"
models=() # of the tasks that were asked for; an earlier run may have left others
for task in $tasks; do models+=("$student/models/$task" "pruned_models/$task"); done
"$PYTHON" "$root/summarize.py" "${models[@]}" "${quantized%/*}" "${perf[@]}" --format short
"$PYTHON" - << 'END'
import json

for file, whose in (("answer.json", "The service's"), ("onnx_answer.json", "ONNX Runtime's")):
    with open(file, encoding="utf-8") as opened:
        answer = json.load(opened)
    text = " / ".join(answer[key] for key in ("text", "text_pair") if key in answer)
    labels = answer["labels"] if "labels" in answer else [answer["label"]]
    name = f" ({answer['label_name']})" if "label_name" in answer else ""
    given = [f"{label}{name}, probability {answer['probabilities'][label]:.2f}" for label in labels]
    print(f"\n{whose} answer to {text}\n-> {'; '.join(given) or 'no label'}")
END
cat << END

All tables: ${output#"$root/"}/tables.md; plot: ${output#"$root/"}/clue.png. \`bash demo/clean.sh\` removes them.
The models are tiny and the data generated: the stages work together, but no figure is one of CLUE.

With real data, from the root of the repository (without a network: README, Data):
  sh run_all.sh TNEWS 5e-5 32 3 128 0 ppminilm-6l-768h                  # downloads model and data
  sh run_all.sh NAME 5e-5 32 3 128 0 ppminilm-6l-768h --data_dir DIR    # your train.json, dev.json
  python summarize.py --format short                                    # these tables, of yours
END
