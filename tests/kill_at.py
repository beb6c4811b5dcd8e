"""Runs a stage script up to its N-th change of a file below a directory, for tests/test_faults.py.

    python kill_at.py DIRECTORY N FD script.py arguments...

Before that change it kills itself, as kill -9 does, or, if FD is not -1, says so by one byte to that file descriptor and
goes on. With N 0 it runs to the end and prints how many changes there were, and the seconds since the first.
"""

import os
import runpy
import signal
import sys
import time

directory, number, descriptor = os.path.abspath(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
sys.argv = sys.argv[4:]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
changes, first = 0, None


def changed_path(event, arguments):
    """The path that an audit event of Python is about to change, or None."""
    if event == "open":
        path, _, flags = arguments
        return path if flags & (os.O_WRONLY | os.O_RDWR) else None
    if event not in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
        return None
    path, relative_to = arguments[0], arguments[-1]
    if isinstance(path, (str, bytes)) and not os.path.isabs(path) and event != "os.rename" and relative_to != -1:
        return os.path.join(os.readlink(f"/proc/self/fd/{relative_to}"), os.fsdecode(path))
    return path


def watch(event, arguments):
    global changes, first
    path = changed_path(event, arguments)
    if path is None or isinstance(path, int) or not os.path.abspath(os.fsdecode(path)).startswith(directory):
        return
    changes, first = changes + 1, first or time.monotonic()
    if changes == number:
        os.kill(os.getpid(), signal.SIGKILL) if descriptor < 0 else os.write(descriptor, b"!")


sys.addaudithook(watch)
runpy.run_path(sys.argv[0], run_name="__main__")
print(changes, time.monotonic() - (first or time.monotonic()))
