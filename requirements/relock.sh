#!/bin/sh
# Makes the lock files anew from pyproject.toml:  sh requirements/relock.sh   (needs uv on PATH, or UV=path)
# What is locked keeps its version where it can; UPGRADE=1 takes the newest of everything.
# cffi and pycparser are left out: only PyPy would need them.
# One version of every package for all supported Pythons; what only an older Python needs carries a marker.
set -e
cd "$(dirname "$0")"
linux="platform_machine == 'x86_64' and platform_python_implementation == 'CPython' and sys_platform == 'linux'"

lock() { # NAME ARGUMENTS...: the locks are for Linux x86-64 CPython anyway, so the marker that says so goes
    name=$1
    shift
    rm -f "$name.new"
    [ -n "$UPGRADE" ] || [ ! -f "$name.txt" ] || cp "$name.txt" "$name.new" # uv prefers what it finds there
    "${UV:-uv}" pip compile "$@" --universal --python-version "${oldest:-3.9}" --fork-strategy "${forks:-fewest}" --generate-hashes \
        --no-emit-package cffi --no-emit-package pycparser --no-header --no-annotate --quiet --output-file "$name.new" > /dev/null
    sed -e "s/ and $linux//" -e "s/ ; $linux//" "$name.new" > "$name.txt"
    rm "$name.new"
}

lock build --group build
lock cpu pyproject.toml --extra cpu --constraints build.txt
lock gpu pyproject.toml --extra gpu --constraints cpu.txt
lock gpu-libraries --group gpu-libraries --no-deps
lock serving --group serving --constraints cpu.txt
lock serving-wheels --group serving-wheels --no-deps
lock serving-wheels-gpu --group serving-wheels-gpu --no-deps
lock lint --group lint
lock draw --group draw --no-deps
oldest=3.11 lock peers --group peers --constraints cpu.txt

# Paddle 3: the newest version of every package for each Python, as NumPy 2 has no version for all of 3.9 to 3.13.
cd paddle3
forks=requires-python
lock ../paddle3 pyproject.toml
lock ../paddle3-serving --group serving --constraints ../paddle3.txt
# What deploy/onnx/infer_onnx.py needs on a machine without Paddle: here, as it wants NumPy 2 on Python 3.13, too.
lock ../onnx --group onnx --constraints ../paddle3.txt
