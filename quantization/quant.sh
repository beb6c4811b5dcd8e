#!/bin/sh
# Quantizes one exported model in eight ways (4 algorithms, 4 or 8 samples). Further arguments go to quant_post.py.
set -e
. "$(dirname -- "$0")/../common/launcher.sh"
usage 2 $# "sh quant.sh TASK INPUT_DIR [more arguments of quant_post.py]"
task=$(task_name "$1") input=$2
shift 2

"$PYTHON" "$here/quant_post.py" --task_name "$task" --input_dir "$input" $device_args "$@"
