#!/bin/sh
# Evaluates all quantized models under $QUANT_DIR (default: ../../quantization) in INT8. Prints one table per model
# and marks its best variant. Continues after a failure and lists all failures at the end. Arguments go to infer.py.
set -e
. "$(dirname -- "$0")/../../common/launcher.sh"
QUANT_DIR=${QUANT_DIR:-$root/quantization}

failed= found=
for models in "${QUANT_DIR%/}"/*_quant_models; do
    [ -n "$(find "$models" -mindepth 2 -maxdepth 2 -name stage.json 2> /dev/null)" ] || continue
    found=yes
    (
        set -- "$@" --model_path
        for record in "$models"/*/stage.json; do set -- "$@" "${record%/stage.json}"; done
        "$PYTHON" "$here/infer.py" --int8 $device_args "$@"
    ) || failed="$failed $models"
done
[ -n "$found" ] || { echo "infer_all.sh: error: no *_quant_models under $QUANT_DIR; run quantization/quant_all.sh first" >&2; exit 2; }
[ -z "$failed" ] || { echo "infer_all.sh: failed:$failed" >&2; exit 1; }
