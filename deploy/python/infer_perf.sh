#!/usr/bin/env bash
# The speed table: BERT-base, PP-MiniLM, pruned, quantized, pruned and quantized, with and without the fast tokenizer.
# About twenty minutes, SHORT=1 about two. Arguments go to perf.py; `bash infer_perf.sh --help` lists them.
set -e
. "$(dirname -- "$0")/../../launcher.sh"
# shellcheck disable=SC2086  # no device is no argument
exec "$PYTHON" "$here/perf.py" $device_args ${SHORT:+--short} "$@"
