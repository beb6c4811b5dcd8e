#!/usr/bin/env bash
# Measures the speed of BERT-base, PP-MiniLM, and its pruned and quantized models, with and without the fast tokenizer.
# Takes half an hour, with SHORT=1 two minutes. Arguments are passed on to perf.py; see `bash infer_perf.sh --help`.
set -e
. "$(dirname -- "$0")/../../common/launcher.sh"
short=
[ "${SHORT:-0}" = 0 ] || short=--short
# shellcheck disable=SC2086  # an empty variable adds no argument
exec "$PYTHON" "$root/deploy/benchmark/perf.py" $device_args $short "$@"
