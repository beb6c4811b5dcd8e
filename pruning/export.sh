#!/bin/sh
# Exports all pruned widths of a task under DIR/TASK. Further arguments are passed on to export_model.py.
set -e
. "$(dirname -- "$0")/../common/launcher.sh"
usage 2 $# "sh export.sh DIR TASK [more arguments of export_model.py], e.g. sh export.sh pruned_models TNEWS"
dir=$1 task=$(task_name "$2")
shift 2

found=
for best in "$dir/$task"/*/best_model; do
    [ -f "$best/stage.json" ] || continue
    found=yes
    width_dir=$(dirname -- "$best")
    "$PYTHON" "$here/export_model.py" --task_name "$task" --model_name_or_path "$best" \
        --sub_model_output_dir "$width_dir/sub" --static_sub_model "$width_dir/sub_static/float" $device_args "$@"
done
[ -n "$found" ] || { echo "export.sh: error: no finished $dir/$task/*/best_model; run prune.sh first" >&2; exit 2; }
