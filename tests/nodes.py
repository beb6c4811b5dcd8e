"""Two nodes of one machine: two launches of Paddle on 127.0.0.1, with a process each, for tests/test_nodes.py."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import psutil


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


class Nodes:
    """Args: command: path of the script and its arguments. directory: of the logs, new. of_node: more arguments of each.
    places: the directories in which they run."""

    def __init__(self, command, directory, of_node=((), ()), places=(None, None)):
        self.directory, self.script, master = directory, str(command[0]), f"127.0.0.1:{free_port()}"
        directory.mkdir(parents=True)
        self.launchers = []
        for node, more in enumerate(of_node):
            options = ["--nnodes", "2", "--master", master, "--rank", str(node), "--nproc_per_node", "1"]
            options += ["--log_dir", str(directory / str(node))]
            words = [sys.executable, "-m", "paddle.distributed.launch", *options, *map(str, [*command, *more])]
            with open(directory / f"launch.{node}", "w") as said:
                # A session for each node: all its processes, also those whose parent has gone.
                self.launchers.append(
                    subprocess.Popen(
                        words,
                        stdout=said,
                        stderr=said,
                        start_new_session=True,
                        cwd=places[node],
                        env={**os.environ, "OMP_NUM_THREADS": "1"},
                    )
                )

    def log(self, node):
        """What the process of a node has printed."""
        with contextlib.suppress(FileNotFoundError):
            return (self.directory / str(node) / "workerlog.0").read_text(encoding="utf-8")
        return ""

    def of_session(self, node):
        """The processes of a node that have not ended."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == self.launchers[node].pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def rank(self, node):
        """The training process of a node, as psutil.Process; None before it has been started."""
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self.launchers[node].pid).children():
                if self.script in process.cmdline():  # not one of the programs that the launcher asks at its start
                    return process
        return None

    def wait_until(self, condition, timeout=120):
        """Returns: the seconds until it was so."""
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < timeout, self.all_logs()
            time.sleep(0.05)
        return time.monotonic() - started

    def wait_for_processes(self):
        self.wait_until(lambda: self.rank(0) and self.rank(1))

    def wait_for_line(self, beginning):
        """Waits until the first process has printed it, or all has ended."""
        self.wait_until(lambda: beginning in self.log(0) or None not in self.statuses())

    def finish(self, timeout=180):
        """Waits until all processes have ended. Returns: the seconds that it took."""
        return self.wait_until(lambda: None not in self.statuses() and not any(map(self.of_session, (0, 1))), timeout)

    def statuses(self):
        return [launcher.poll() for launcher in self.launchers]

    def all_logs(self):
        texts = [
            f"{path}:\n{path.read_text()[-2000:]}"
            for path in [*self.directory.glob("launch.*"), *self.directory.glob("*/workerlog.*")]
        ]
        return "\n".join(texts)

    def kill(self, victim, node):
        """Kills -9 the training process of a node, its launcher, or the whole node at once."""
        chosen = {"rank": [self.rank(node)], "launcher": [self.launchers[node]], "node": self.of_session(node)}[victim]
        for process in chosen:
            with contextlib.suppress(psutil.Error, ProcessLookupError, AttributeError):
                os.kill(process.pid, signal.SIGKILL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for node in range(2):
            self.kill("node", node)
        for launcher in self.launchers:
            launcher.wait()
