# shellcheck shell=sh
# What the launchers share; they read it with `.`. Sets: here (the launcher's directory), root, PYTHON, device_args.
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
root=$here
while [ ! -f "$root/launcher.sh" ]; do root=$(dirname -- "$root"); done

if [ -z "$PYTHON" ]; then
    PYTHON=python3
    [ ! -x "$root/.venv/bin/python" ] || PYTHON=$root/.venv/bin/python
fi
export PYTHON
device_args=${DEVICE:+--device $DEVICE} # unset: the scripts take the GPU if there is one

usage() { # WANTED GIVEN "USAGE LINE": ends with status 2 if there are too few arguments
    [ "$2" -ge "$1" ] || { echo "usage: $3" >&2; exit 2; }
}

task_name() { # CLUE's names are upper case in paths, whatever case they were typed in; others stay as they are
    upper=$(echo "$1" | tr '[:lower:]' '[:upper:]')
    case $upper in
        AFQMC | TNEWS | IFLYTEK | OCNLI | CMNLI | CLUEWSC2020 | CSL) echo "$upper" ;;
        *) echo "$1" ;;
    esac
}

for_each_best() { # BEST_JSON FUNCTION ...: calls FUNCTION ... with task, lr, batch, epochs, length, model set, for each task
    file=$1 function=$2 failed=
    shift 2
    cells=$("$PYTHON" "$root/summarize.py" --cells "$file")
    while IFS='	' read -r task lr batch epochs length model; do
        "$function" "$@" < /dev/null || failed="$failed $task"
    done << CELLS
$cells
CELLS
    [ -z "$failed" ] || { echo "$(basename -- "$0"): failed:$failed" >&2; exit 1; }
}

lower() { echo "$1" | tr '[:upper:]' '[:lower:]'; }
