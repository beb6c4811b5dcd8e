#!/usr/bin/env bash
# Removes what demo/run.sh wrote: demo/output/.
set -e
rm -rf "$(cd "$(dirname "$0")" && pwd)/output"
