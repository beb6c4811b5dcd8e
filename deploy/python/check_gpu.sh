#!/usr/bin/env bash
# Checks on your GPU what this project could not run for want of one: every stage, TensorRT against the CPU, mixed
# precision, two processes, speed; see `bash check_gpu.sh --help`. DEVICE=cpu rehearses it without a GPU: the same steps
# on the CPU, in about five minutes.
set -e
. "$(dirname -- "$0")/../../common/launcher.sh"
# shellcheck disable=SC2086  # an empty variable adds no argument
exec "$PYTHON" "$root/deploy/benchmark/check_gpu.py" $device_args "$@"
