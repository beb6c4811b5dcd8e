#!/usr/bin/env bash
# The tests: makes the environment if needed, Paddle Serving included, then runs pytest; arguments go to pytest.
set -e
root=$(cd "$(dirname "$0")/.." && pwd)
sh "$root/setup_env.sh" --serving
exec "$root/.venv/bin/python" -m pytest -c "$root/tests/pytest.ini" "${@:-$root/tests}"
