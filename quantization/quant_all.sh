#!/bin/sh
# Quantizes all exported models under $MODEL_DIR (default: ../pruning/pruned_models). Continues after a failure and
# lists all failures at the end. Arguments are passed on to quant_post.py. With the best.json of a grid search as first
# argument: quantizes the best fine-tuned model of each task (export them first: pruning/export_all.sh BEST_JSON).
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
