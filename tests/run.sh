#!/usr/bin/env bash
# The tests: makes the environment if needed, Paddle Serving included, then runs pytest; arguments go to pytest.
# --paddle 2 or --paddle 3 before them asks for the environment of that Paddle (default: what .venv has).
set -e
root=$(cd "$(dirname "$0")/.." && pwd)
paddle=()
if [ "${1-}" = --paddle ]; then
    paddle=("$1" "${2-}")
    shift $(($# > 1 ? 2 : 1))
fi
sh "$root/setup_env.sh" "${paddle[@]}" --serving
exec "$root/.venv/bin/python" -m pytest -c "$root/tests/pytest.ini" "${@:-$root/tests}"
