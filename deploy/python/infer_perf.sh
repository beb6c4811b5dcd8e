#!/usr/bin/env bash
# The speed table: BERT-base, PP-MiniLM, pruned, quantized, pruned and quantized, with and without the fast tokenizer.
# About half an hour, SHORT=1 about two minutes. Arguments go to perf.py; `bash infer_perf.sh --help` lists them.
set -e
. "$(dirname -- "$0")/../../common/launcher.sh"
[ "${SHORT:-0}" = 0 ] || short=--short
# shellcheck disable=SC2086  # no device is no argument
exec "$PYTHON" "$root/deploy/benchmark/perf.py" $device_args $short "$@"
