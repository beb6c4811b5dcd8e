# shellcheck shell=sh
# What the launchers share; they read it with `.`. It sets
#   here         the launcher's directory
#   root         the repository
#   PYTHON       the interpreter: what the user set, else the repository's .venv, else python3
#   device_args  `--device ...` if the user set DEVICE; otherwise nothing, and the scripts take a GPU if there is one
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
root=$here
while [ ! -f "$root/common/launcher.sh" ]; do root=$(dirname -- "$root"); done

if [ -z "$PYTHON" ]; then
    PYTHON=python3
    [ ! -x "$root/.venv/bin/python" ] || PYTHON=$root/.venv/bin/python
fi
export PYTHON
device_args=${DEVICE:+--device $DEVICE}

# usage WANTED GIVEN "USAGE LINE": ends with status 2 if there are fewer arguments than wanted.
usage() {
    [ "$2" -ge "$1" ] || { echo "usage: $3" >&2; exit 2; }
}

lower() { echo "$1" | tr '[:upper:]' '[:lower:]'; }
upper() { echo "$1" | tr '[:lower:]' '[:upper:]'; }

# alias_of NAME: CLUE's name of a task that the original's scripts also call by a shorter one (cli.TASK_ALIASES).
alias_of() {
    case $(lower "$1") in
        wsc) echo CLUEWSC2020 ;;
        ifly) echo IFLYTEK ;;
        *) echo "$1" ;;
    esac
}

# is_clue NAME: whether it is one of the CLUE tasks, which data.py lists as Task("NAME", ...), in any case.
is_clue() { grep -qF "Task(\"$(upper "$(alias_of "$1")")\"," "$root/data.py"; }

# task_name NAME: the name as it stands in paths: CLUE's in upper case, others as they were typed.
task_name() {
    if is_clue "$1"; then upper "$(alias_of "$1")"; else echo "$1"; fi
}

# for_each_best BEST_JSON FUNCTION ...: calls FUNCTION ... for each task in a best.json, with the variables task, lr, batch,
# epochs, length and model set. Goes on after a failure, and ends with status 1 and the tasks that failed.
for_each_best() {
    file=$1 function=$2 failed=
    shift 2
    cells=$("$PYTHON" "$root/summarize.py" --cells "$file")
    # The separator between the variables is a tab.
    while IFS='	' read -r task lr batch epochs length model; do
        "$function" "$@" < /dev/null || failed="$failed $task"
    done << CELLS
$cells
CELLS
    [ -z "$failed" ] || { echo "$(basename -- "$0"): failed:$failed" >&2; exit 1; }
}
