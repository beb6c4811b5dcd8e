#!/bin/sh
# Writes every quantized model under $QUANT_DIR (default: ../../quantization) as ONNX, into onnx_models/ of the directory
# that it is called in. Continues after a failure and lists all failures at the end. Arguments go to export_onnx.py.
set -e
. "$(dirname -- "$0")/../../common/launcher.sh"
QUANT_DIR=${QUANT_DIR:-$root/quantization}

failed= found=
for record in "${QUANT_DIR%/}"/*_quant_models/*/stage.json; do
    [ -f "$record" ] || continue
    found=yes
    "$PYTHON" "$here/export_onnx.py" --model_path "${record%/stage.json}" "$@" || failed="$failed ${record%/stage.json}"
done
[ -n "$found" ] || { echo "export_all.sh: error: no *_quant_models under $QUANT_DIR; run quantization/quant_all.sh first" >&2; exit 2; }
[ -z "$failed" ] || { echo "export_all.sh: failed:$failed" >&2; exit 1; }
