#!/bin/sh
# Exports all tasks and widths under DIR (default: pruned_models). Continues after a failure and lists all failures.
# With the best.json of a grid search instead of DIR: exports the best fine-tuned model of each task.
set -e
. "$(dirname -- "$0")/../common/launcher.sh"
dir=${1:-pruned_models}
[ $# -eq 0 ] || shift
case $dir in
    *.json)
        export_one() {
            "$PYTHON" "$root/finetuning/export_model.py" --task_name "$task" --model_path "$model" $device_args "$@"
        }
        for_each_best "$dir" export_one "$@"
        exit
        ;;
esac

failed= found=
for task_dir in "$dir"/*/; do
    task=$(basename -- "$task_dir")
    case $task in '*' | *.unfinished) continue ;; esac
    found=yes
    sh "$here/export.sh" "$dir" "$task" "$@" || failed="$failed $task"
done
[ -n "$found" ] || { echo "export_all.sh: error: no task under $dir; run prune.sh first" >&2; exit 2; }
[ -z "$failed" ] || { echo "export_all.sh: failed:$failed" >&2; exit 1; }
