#!/usr/bin/env bash
# Faults on purpose: kills of one process and of one of two nodes, power cuts, full disks, damaged files, second runs, a
# service under bad requests. Prints a table of what was tried and how it ended. A quarter of an hour; LONG=1: about two
# hours, and the table goes into tests/README.md.
set -e
root=$(cd "$(dirname "$0")/.." && pwd)
sh "$root/setup_env.sh" --serving
FAULTS=short
[ "${LONG:-0}" = 0 ] || FAULTS=long
export FAULTS
exec "$root/.venv/bin/python" -m pytest -c "$root/tests/pytest.ini" -q "$@" "$root/tests/test_faults.py" \
    "$root/tests/test_power_loss.py" "$root/tests/test_damage.py" "$root/tests/test_damaged_data.py" "$root/tests/test_gates.py" \
    "$root/tests/test_nodes.py" "$root/tests/test_pretraining.py::test_a_kill_changes_nothing" \
    "$root/tests/test_search.py::test_a_killed_search_leaves_nothing_running_and_goes_on" \
    "$root/tests/test_soak.py" "$root/tests/test_serving_attack.py"
