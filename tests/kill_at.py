"""Runs a stage script up to its N-th change of a file below a directory, for tests/test_faults.py.

A server process imports common.compat, Paddle and PaddleNLP once and forks for each run, which saves three seconds of
imports per run. Nothing else was done before the fork. What these imports change is set for all runs alike.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time

from warm import PRELOADED

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(PRELOADED)


class Run:
    """A script as a process: ``pid``, ``stdout`` and ``stderr`` (after finish).

    Args:
        command: path of the script and its arguments.
        directory, number: before the number-th change of a file below the directory the process kills itself, as
            kill -9 does; or, if ``pause`` is given, it says so and goes on. 0: never; then the last line of standard
            output is how many changes there were, and the seconds since the first.
        pause: the writing end of a FORKS.Pipe, which gets True before that change.
        stops: after that it does not go on, but stops itself, as by kill -STOP.
    """

    def __init__(self, command, log, directory=None, number=0, pause=None, stops=False):
        self.paths = [f"{log}.out", f"{log}.err"]
        arguments = (command, self.paths, directory and os.path.abspath(directory), number, pause, stops)
        self.process = FORKS.Process(target=run_script, args=arguments)
        self.process.start()
        self.pid = self.process.pid

    def finish(self, timeout=300):
        """Waits for the end. Returns: subprocess.CompletedProcess, its output as text."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, "the script did not end"
        texts = [open(path, encoding="utf-8", errors="replace").read() for path in self.paths]
        return subprocess.CompletedProcess([], self.process.exitcode, *texts)


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


def run_script(command, paths, directory, number, pause, stops):
    """In the forked process."""
    for descriptor, path in enumerate(paths, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    changes, first = 0, None

    def watch(event, arguments):
        nonlocal changes, first
        path = changed_path(event, arguments)
        if path is None or isinstance(path, int) or not os.path.abspath(os.fsdecode(path)).startswith(directory):
            return
        changes, first = changes + 1, first or time.monotonic()
        if changes == number:
            if pause:
                pause.send(True)
                if stops:
                    os.kill(os.getpid(), signal.SIGSTOP)
            else:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.argv = [str(word) for word in command]
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    if directory:
        sys.addaudithook(watch)
    runpy.run_path(sys.argv[0], run_name="__main__")
    if directory and not number:
        print(changes, time.monotonic() - (first or time.monotonic()), flush=True)
