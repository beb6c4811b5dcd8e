#!/bin/sh
# Quantizes every exported model under $MODEL_DIR (default: ../pruning/pruned_models). Goes on after a failure, and lists
# the failures at the end. Arguments go to quant_post.py. With the best.json of a grid search as the first one: quantizes
# the fine-tuned model that it names for each task (pruning/export_all.sh BEST_JSON exports them).
set -e
. "$(dirname -- "$0")/../common/launcher.sh"
MODEL_DIR=${MODEL_DIR:-$root/pruning/pruned_models}
case ${1-} in
    *.json)
        best=$1
        shift
        quantize_one() { sh "$here/quant.sh" "$task" "$model" "$@"; }
        for_each_best "$best" quantize_one "$@"
        exit
        ;;
esac

failed= found=
for static in "${MODEL_DIR%/}"/*/*/sub_static; do
    [ -f "$static/stage.json" ] || continue
    found=yes
    task=$(basename -- "$(dirname -- "$(dirname -- "$static")")")
    sh "$here/quant.sh" "$task" "$static" "$@" || failed="$failed $static"
done
[ -n "$found" ] || { echo "quant_all.sh: error: no sub_static under $MODEL_DIR; run pruning/export_all.sh first" >&2; exit 2; }
[ -z "$failed" ] || { echo "quant_all.sh: failed:$failed" >&2; exit 1; }
