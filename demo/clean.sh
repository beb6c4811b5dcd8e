#!/usr/bin/env bash
# Removes what demo/run.sh wrote, demo/output/; .venv stays:  bash demo/clean.sh
set -e
[ $# -eq 0 ] || { sed -n '2s/^# //p' "$0" >&2; exit 2; }
rm -rf "$(cd "$(dirname "$0")" && pwd)/output"
