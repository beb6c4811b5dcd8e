#!/bin/sh
# Creates .venv beside this file from the lock files in requirements/. Does nothing if .venv is up to date.
#
#   sh setup_env.sh [--python PATH] [--gpu | --cpu] [--serving]
#
#   --python PATH  base interpreter, CPython 3.9-3.12 (default: the newest usable one on PATH)
#   --gpu, --cpu   paddlepaddle-gpu, with CUDA 11.8, cuDNN and TensorRT in .gpu-libraries (4 GB more, of which 3.2 GB are
#                  downloaded once), or paddlepaddle (default: what .venv has, else paddlepaddle)
#   --serving      adds the Paddle Serving packages
set -e
root=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
venv=$root/.venv
stamp=$venv/installed

fail() {
    echo "setup_env.sh: $1" >&2
    exit 2
}

python= flavour= serving=
while [ $# -gt 0 ]; do
    case $1 in
        --python) [ $# -gt 1 ] || fail "--python needs the path of an interpreter"; python=$2; shift ;;
        --gpu) flavour=gpu ;;
        --cpu) flavour=cpu ;;
        --serving) serving=serving ;;
        -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) fail "unknown argument '$1'; there are --python PATH, --gpu, --cpu and --serving" ;;
    esac
    shift
done

# Prints "MINOR BASE_INTERPRETER" for a usable interpreter; otherwise prints the reason and fails. Runs the interpreter,
# because PATH may have a version manager's shim that fails. The interpreter of a virtual environment is resolved to
# its base, so that .venv does not depend on another environment.
probe() {
    answer=$("$1" -c '
import os, platform, sys
if sys.platform != "linux" or platform.machine() != "x86_64" or platform.python_implementation() != "CPython":
    sys.exit("is not CPython on Linux x86-64")
if not (3, 9) <= sys.version_info[:2] <= (3, 12):
    sys.exit("is Python %d.%d; 3.9 to 3.12 are supported" % sys.version_info[:2])
base = getattr(sys, "_base_executable", None) or sys.executable
if sys.prefix != sys.base_prefix:
    base = os.path.join(sys.base_prefix, "bin", "python%d.%d" % sys.version_info[:2])
try:
    import ensurepip, venv
except ImportError:
    sys.exit("has no venv module; on Debian and Ubuntu: apt-get install python%d.%d-venv" % sys.version_info[:2])
print("usable", sys.version_info[1], base)' 2>&1 | tail -n 1) # the last line: others may be warnings at start-up
    echo "${answer#usable }"
    [ "$answer" != "${answer#usable }" ]
}

digest() { # FLAVOUR SERVING: hash of the lock files of the environment
    (
        cd "$root/requirements"
        libraries=
        [ "$1" = cpu ] || libraries=gpu-libraries.txt
        cat build.txt "$1.txt" ${libraries:+"$libraries"} ${2:+serving*.txt paddle_serving_client.py} |
            sha256sum | cut -c 1-16
    )
}

# Contents of .venv, if it is complete: flavour, "serving" or "-", digest of its lock files, base interpreter.
if [ -f "$stamp" ] && "$venv/bin/python" -c '' 2> /dev/null; then
    read -r had_flavour had_serving had_digest had_base < "$stamp"
    flavour=${flavour:-$had_flavour}
    [ "$had_serving" = - ] || serving=serving
fi
flavour=${flavour:-cpu}

# CUDA, cuDNN and TensorRT, which paddlepaddle-gpu opens at run time and does not name. They are kept outside of .venv, so
# that one that is rebuilt, or that was interrupted, does not download them again.
install_gpu_libraries() {
    [ "$flavour" = gpu ] || return 0
    "$venv/bin/python" "$root/requirements/gpu_libraries.py" "$root/requirements/gpu-libraries.txt" \
        "$root/.gpu-libraries" "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/paddle/libs"
}

if [ -n "$python" ]; then
    command -v "$python" > /dev/null || fail "--python $python: there is no such interpreter"
    found=$(probe "$python") || fail "--python $python: ${found:-does not run}"
    base=${found#* }
fi
if [ -n "$had_digest" ] && [ "$had_flavour" = "$flavour" ] && [ "${had_serving#-}" = "$serving" ] &&
    [ "$had_digest" = "$(digest "$flavour" "$serving")" ] && [ "${base:-$had_base}" = "$had_base" ]; then
    install_gpu_libraries # does nothing, unless somebody has removed them
    echo "setup_env.sh: .venv is up to date ($flavour${serving:+, serving})"
    exit 0
fi

install() { # LOCK: the file lists every package with its hashes, so pip resolves and downloads nothing else
    echo "setup_env.sh: installing requirements/$1.txt"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
        --require-hashes --requirement "$root/requirements/$1.txt"
}

install_serving_and_finish() {
    if [ -n "$serving" ]; then
        install serving
        install serving-wheels
        # Paddle Serving's server and PipelineClient import a package that has no wheel for Python 3.10 and later.
        "$venv/bin/python" -c "import paddle_serving_client" 2> /dev/null ||
            cp "$root/requirements/paddle_serving_client.py" "$("$venv/bin/python" -c \
                "import sysconfig; print(sysconfig.get_path('purelib'))")"
        [ "$flavour" = cpu ] || install serving-wheels-gpu
    fi
    echo "$flavour ${serving:--} $(digest "$flavour" "$serving") $base" > "$stamp"
    echo "setup_env.sh: done; the launchers use .venv by themselves, for your own commands: . .venv/bin/activate"
}

# Adds Paddle Serving to the existing .venv. Programs that run from it are not disturbed.
if [ -n "$had_digest" ] && [ "$had_flavour" = "$flavour" ] && [ "$had_serving" = - ] &&
    [ "$had_digest" = "$(digest "$flavour" '')" ] && [ "${base:-$had_base}" = "$had_base" ]; then
    base=$had_base
    echo "setup_env.sh: adding Paddle Serving to .venv"
    rm -f "$stamp" # an interrupted installation must not count as finished
    install_serving_and_finish
    exit 0
fi

if [ -z "$python" ]; then
    minor=0 reasons=
    for candidate in python3.12 python3.11 python3.10 python3.9 python3 python; do
        command -v "$candidate" > /dev/null || continue
        if found=$(probe "$candidate"); then
            [ "${found%% *}" -le "$minor" ] || { minor=${found%% *}; base=${found#* }; }
        else
            reasons="$reasons
  $candidate: $(echo "${found:-does not run}" | head -n 1)"
        fi
    done
    [ "$minor" -gt 0 ] || fail "no usable Python 3.9-3.12 was found. On Debian and Ubuntu: apt-get install python3 \
python3-venv; or name one with --python PATH$reasons"
fi

# An unfinished or different .venv is rebuilt: a partly unpacked package cannot be told from a complete one.
echo "setup_env.sh: making .venv ($flavour${serving:+, serving}) with $("$base" --version)"
rm -f "$stamp" # first: a partly removed environment must not count as finished
rm -rf "$venv"
"$base" -m venv "$venv"
install build
install "$flavour"
install_gpu_libraries
install_serving_and_finish
