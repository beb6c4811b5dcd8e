#!/bin/sh
# Creates .venv beside this file from the lock files in requirements/. Does nothing if .venv is up to date.
#
#   sh setup_env.sh [--python PATH] [--paddle 2 | --paddle 3] [--gpu | --cpu] [--serving]
#
#   --python PATH  base interpreter, CPython 3.9-3.13 (default: that of .venv, else the newest one up to 3.12 on PATH,
#                  else 3.13)
#   --paddle N     2: Paddle 2.6.2, Python 3.9-3.12; 3: Paddle 3.1.1, CPU only, Python 3.9-3.13 (default: what .venv has,
#                  else 2, and 3 for Python 3.13)
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

python= flavour= serving= paddle=
while [ $# -gt 0 ]; do
    case $1 in
        --python) [ $# -gt 1 ] || fail "--python needs the path of an interpreter"; python=$2; shift ;;
        --paddle)
            case ${2-} in 2 | 3) paddle=$2 ;; *) fail "--paddle ${2-(nothing)}: must be 2 or 3" ;; esac
            shift
            ;;
        --gpu) flavour=gpu ;;
        --cpu) flavour=cpu ;;
        --serving) serving=serving ;;
        -h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) fail "unknown argument '$1'; there are --python PATH, --paddle N, --gpu, --cpu and --serving" ;;
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
if not (3, 9) <= sys.version_info[:2] <= (3, 13):
    sys.exit("is Python %d.%d; 3.9 to 3.13 are supported" % sys.version_info[:2])
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
        [ "$1" != gpu ] || libraries=gpu-libraries.txt
        serving=serving
        [ "$1" != paddle3 ] || serving=paddle3-serving
        cat build.txt "$1.txt" ${libraries:+"$libraries"} \
            ${2:+"$serving.txt" serving-wheels*.txt paddle_serving_client.py} | sha256sum | cut -c 1-16
    )
}

# What is asked for: a flavour, cpu or gpu (both Paddle 2), or paddle3.
case $paddle-$flavour in
    3-gpu) fail "--paddle 3 --gpu: PyPI has no Paddle 3 for GPUs; use --paddle 2" ;;
    3-*) flavour=paddle3 asked=paddle3 ;;
    *-gpu) asked=gpu ;;
    2-*) asked=cpu ;;
    *) asked= ;; # --cpu alone does not say which Paddle
esac

# Contents of .venv, if it is complete: flavour (cpu, gpu or paddle3), "serving" or "-", digest of its lock files, base interpreter.
if [ -f "$stamp" ] && "$venv/bin/python" -c '' 2> /dev/null; then
    read -r had_flavour had_serving had_digest had_base < "$stamp"
    # What is not asked for stays as it is.
    [ "$paddle$had_flavour" = 2paddle3 ] || flavour=${flavour:-$had_flavour}
    [ "$asked$had_flavour" != paddle3 ] || flavour=paddle3 # also with --cpu: both Paddles are for CPUs
    [ "$flavour" != gpu ] || asked=gpu                     # an environment for GPUs is not replaced silently
    [ "$had_serving" = - ] || serving=serving
fi

settle() { # MINOR: decides the flavour where it was not asked for; Python 3.13 has Paddle 3 alone
    if [ "$1" -lt 13 ]; then
        flavour=${flavour:-cpu}
    elif [ "${asked:-paddle3}" = paddle3 ]; then
        flavour=paddle3
    else
        fail "Paddle 2.6.2 has no wheel for Python 3.$1; use --paddle 3, or Python 3.9-3.12 (--python PATH)"
    fi
}

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
    settle "${found%% *}"
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
        if [ "$flavour" = paddle3 ]; then install paddle3-serving; else install serving; fi
        install serving-wheels
        # Paddle Serving's server and PipelineClient import a package that has no wheel for Python 3.10 and later.
        "$venv/bin/python" -c "import paddle_serving_client" 2> /dev/null ||
            cp "$root/requirements/paddle_serving_client.py" "$("$venv/bin/python" -c \
                "import sysconfig; print(sysconfig.get_path('purelib'))")"
        [ "$flavour" != gpu ] || install serving-wheels-gpu
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

newest() { # LIMIT: sets base and minor to the newest usable Python on PATH up to 3.LIMIT; minor is 0 if there is none
    minor=0 reasons=
    for candidate in python3.13 python3.12 python3.11 python3.10 python3.9 python3 python; do
        command -v "$candidate" > /dev/null || continue
        if found=$(probe "$candidate"); then
            if [ "${found%% *}" -gt "$minor" ] && [ "${found%% *}" -le "$1" ]; then
                minor=${found%% *}
                base=${found#* }
            fi
        else
            reasons="$reasons
  $candidate: $(echo "${found:-does not run}" | head -n 1)"
        fi
    done
}

if [ -z "$python" ]; then
    minor=0
    # A .venv that is made anew keeps its interpreter, unless that has no Paddle of the kind that is asked for.
    if [ -n "$had_base" ] && found=$(probe "$had_base"); then
        if [ "${found%% *}" -lt 13 ] || [ "${asked:-paddle3}" = paddle3 ]; then
            minor=${found%% *} base=$had_base
        fi
    fi
    [ "$minor" -gt 0 ] || [ "$flavour" = paddle3 ] || newest 12 # Paddle 2, if there is a Python for it
    [ "$minor" -gt 0 ] || newest 13
    [ "$minor" -gt 0 ] || fail "no usable Python 3.9-3.13 was found. On Debian and Ubuntu: apt-get install python3 \
python3-venv; or name one with --python PATH$reasons"
    settle "$minor"
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
