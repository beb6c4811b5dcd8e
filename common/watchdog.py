"""The watchdog of each process of a training with several: ends it as soon as another one is lost.

Otherwise the others would wait: at the start for 15 minutes, later on CPUs for 30 if a machine has gone silent, on GPUs
forever (NCCL's default). The watchdogs keep connections of their own. The first one listens; the others send a
heartbeat every two seconds and get one. Whoever notices a loss tells all, each prints the same line and kills its
process. A watchdog is a process and not a thread, because Paddle starts in C++ code that lets no thread run.

    python -I -S watchdog.py RANK PROCESS LAUNCHER SCRIPT HOST:PORT ...    # of all ranks; the first one listens

PROCESS is the id of the one to watch, LAUNCHER that of paddle.distributed.launch, without which the process ends, too.
Standard input says how the process ends: the line ``done``, a line with what went wrong, or nothing if it was killed.
"""

import contextlib
import hashlib
import os
import select
import signal
import socket
import subprocess
import sys
import time

HEARTBEAT_INTERVAL = 2.0  # seconds
HEARTBEAT_TIMEOUT = 30.0  # seconds without a heartbeat, after which a process is lost
JOIN_TIMEOUT = 45.0  # seconds that processes have to come, once the first one is there
EXIT_TIMEOUT = 20.0  # seconds that a process has to end, once it has said that it will
PORTS = 8  # that the first one tries: between the launcher's choice and its use, another program may take a port
DONE = "done"
WATCHED = "PPMINILM_WATCHED"  # in the environment of what a process with a watchdog starts
HINT = "; run the same command on every machine again: it goes on from the newest saved state"

# In the process that is watched

_started = []  # its watchdog, if it has one


def is_one_of_several():
    """Whether paddle.distributed.launch started this process as one of several."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM", "1")) > 1


def start():
    """Starts the watchdog, if this process is one of several."""
    is_child = os.environ.get(WATCHED)  # a program that such a process has started, with the same environment
    if is_one_of_several() and not is_child:
        os.environ[WATCHED] = "1"
        numbers = os.environ["PADDLE_TRAINER_ID"], str(os.getpid()), str(os.getppid())
        endpoints = os.environ["PADDLE_TRAINER_ENDPOINTS"].split(",")
        # -I -S: it needs nothing but the standard library, and must not find the modules beside it.
        command = [sys.executable, "-I", "-S", os.path.abspath(__file__), *numbers, os.path.basename(sys.argv[0])]
        _started.append(subprocess.Popen([*command, *endpoints], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL))


def tell(message):
    """Says how this process ends. Args: message: what went wrong; None if all is well."""
    for watchdog in _started:
        with contextlib.suppress(OSError, ValueError):  # it may have ended, or been told already
            watchdog.stdin.write(" ".join((message or DONE).split()).encode() + b"\n")
            watchdog.stdin.close()


def wait_for_verdict():
    """After an error that the loss of another process may have caused: time for the watchdog to end this one."""
    if _started and _started[0].poll() is None:
        time.sleep(HEARTBEAT_TIMEOUT + 2 * HEARTBEAT_INTERVAL)


# In the watchdog


class Peer:
    """A connection to another watchdog. ``rank`` is None until it has said which it is."""

    def __init__(self, connection, rank=None):
        self.connection, self.rank = connection, rank
        self.received, self.heard = b"", time.monotonic()
        connection.settimeout(HEARTBEAT_INTERVAL)

    def send(self, text):
        with contextlib.suppress(OSError):  # if it is lost, that is noticed where it is read
            self.connection.sendall(text.encode() + b"\n")

    def lines(self):
        """The lines that have come, [] or more; None at the end of the connection."""
        try:
            received = self.connection.recv(1 << 16)
        except OSError:
            return None
        if not received:
            return None
        self.heard = time.monotonic()
        *lines, self.received = (self.received + received).split(b"\n")
        return [line.decode("utf-8", "replace") for line in lines]

    def close(self):
        """Sees to it that what was sent arrives: closing with unread input would discard it."""
        until = time.monotonic() + HEARTBEAT_INTERVAL
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while self.connection.recv(1 << 16) and time.monotonic() < until:
                pass
        self.connection.close()


class Watchdog:
    """Args: rank, process: of the process to watch. launcher: its parent's id. endpoints: HOST:PORT of all ranks."""

    def __init__(self, rank, process, launcher, script, endpoints):
        self.rank, self.process, self.launcher, self.script = rank, process, launcher, script
        self.hosts = [endpoint.rpartition(":")[0] for endpoint in endpoints]
        first = int(endpoints[0].rpartition(":")[2])
        self.ports = [first + number if first + number < 65536 else 1024 + number for number in range(PORTS)]
        # Of this training: a stranger, or a watchdog of an earlier one, does not know it.
        self.token = hashlib.sha256(" ".join(endpoints).encode()).hexdigest()[:16]
        self.peers, self.done = [], set()
        self.started = self.awake = time.monotonic()
        self.server = None

    def run(self):
        if self.rank == 0:
            self.server = self.listen()
        else:
            self.peers = [self.connect()]
        beaten = 0.0
        while True:
            watched = [0, *([self.server] if self.server else []), *(peer.connection for peer in self.peers)]
            readable = set(select.select(watched, [], [], HEARTBEAT_INTERVAL / 4)[0])
            if 0 in readable:
                self.own_end()
            if self.server in readable:
                self.peers.append(Peer(self.server.accept()[0]))
            for peer in list(self.peers):
                if peer.connection in readable:
                    self.hear(peer)
            if time.monotonic() - beaten >= HEARTBEAT_INTERVAL:
                beaten = time.monotonic()
                for peer in self.peers:
                    if peer.rank is not None:
                        peer.send("alive")
                self.look()

    def listen(self):
        for port in self.ports:
            with contextlib.suppress(OSError):
                return socket.create_server(("", port), backlog=len(self.hosts))
        raise OSError(f"the ports {self.ports[0]} to {self.ports[-1]} are in use")

    def connect(self):
        """To the first watchdog, which may not be there yet. Returns: Peer."""
        while True:
            for port in self.ports:
                with contextlib.suppress(OSError):
                    peer = Peer(socket.create_connection((self.hosts[0], port), timeout=HEARTBEAT_INTERVAL), rank=0)
                    peer.send(f"rank {self.rank} {self.token}")
                    if f"welcome {self.token}" in (peer.lines() or []):
                        return peer
            if select.select([0], [], [], HEARTBEAT_INTERVAL / 4)[0]:
                self.own_end()
            if time.monotonic() - self.started > JOIN_TIMEOUT:
                where = f"{self.hosts[0]}:{self.ports[0]}"
                self.lost(0, f"does not answer at {where} within {JOIN_TIMEOUT:.0f} s")

    def own_end(self):
        """The process beside this one has ended, or is about to, well or not."""
        said = os.read(0, 4096).decode("utf-8", "replace").strip()
        if said == DONE:
            # Nobody waits for it any more, so its end ends nothing. The end of the first is that of the watching.
            for peer in self.peers:
                peer.send(DONE)
            self.end_process()
        self.lost(self.rank, said or "has ended before the others", is_ending=True, has_spoken=bool(said))

    def hear(self, peer):
        lines = peer.lines()
        if lines is None:
            self.peers.remove(peer)
            peer.connection.close()
            if peer.rank is not None and peer.rank not in self.done:
                self.lost(peer.rank, "has ended before the others")
            return
        for line in lines:
            word, _, rest = line.partition(" ")
            number, _, text = rest.partition(" ")
            is_rank = number.isdigit() and int(number) < len(self.hosts)
            if peer.rank is None:  # so far a stranger
                if word == "rank" and is_rank and text == self.token:
                    peer.rank = int(number)
                    peer.send(f"welcome {self.token}")
            elif word in ("lost", "failed") and is_rank:
                self.lost(int(number), text, has_failed=word == "failed")
            elif word == DONE and self.rank:
                os.read(0, 4096)  # nothing is left to watch but the end of the own process
                self.end_process()
            elif word == DONE:
                self.done.add(peer.rank)

    def look(self):
        """For what no message comes from."""
        now = time.monotonic()
        if now - self.awake > HEARTBEAT_TIMEOUT / 2:  # this machine slept: the silence was its own
            for peer in self.peers:
                peer.heard = now
        self.awake = now
        for peer in self.peers:
            if peer.rank is not None and peer.rank not in self.done and now - peer.heard > HEARTBEAT_TIMEOUT:
                self.lost(peer.rank, f"has not answered for {HEARTBEAT_TIMEOUT:.0f} s")
        if self.server and now - self.started > JOIN_TIMEOUT:
            missing = set(range(1, len(self.hosts))) - {peer.rank for peer in self.peers} - self.done
            if missing:
                self.lost(min(missing), f"has not come within {JOIN_TIMEOUT:.0f} s")
        is_there, parent = status_of(self.process)
        if not is_there:
            self.lost(self.rank, "has ended before the others", is_ending=True)
        if parent not in (None, self.launcher):
            self.lost(self.rank, "has ended, because its launcher has")

    def lost(self, rank, why, is_ending=False, has_spoken=False, has_failed=None):
        """Tells all, prints the line, and ends the process.

        Args: is_ending, has_spoken: whether the own process is ending by itself, and has printed a line. has_failed:
            whether ``why`` is what the process of that rank has said: to run the same command again is no way out then.
        """
        has_failed = has_spoken if has_failed is None else has_failed
        for peer in self.peers:
            peer.send(f"{'failed' if has_failed else 'lost'} {rank} {why}")
        if not is_ending and select.select([0], [], [], HEARTBEAT_INTERVAL)[0]:
            # It ends by itself meanwhile: of what is wrong in all of them, such as a loss of NaN, each has said so.
            has_spoken, is_ending = bool(os.read(0, 4096).strip()), True
        if not has_spoken:
            end = "all processes end" if has_failed else "all processes end" + HINT
            with contextlib.suppress(OSError):
                os.write(2, f"{self.script}: error: rank {rank} (on {self.hosts[rank]}): {why}; {end}\n".encode())
        self.end_process(at_once=not is_ending, status=1)

    def end_process(self, at_once=False, status=0):
        """Ends this watchdog when the process has ended, which is killed if it does not."""
        for peer in self.peers:
            peer.close()
        until = time.monotonic() + (0 if at_once else EXIT_TIMEOUT)
        while time.monotonic() < until and status_of(self.process)[0]:
            time.sleep(HEARTBEAT_INTERVAL / 10)
        if status_of(self.process)[0]:
            with contextlib.suppress(OSError):
                os.kill(self.process, signal.SIGKILL)
        os._exit(status)


def status_of(process):
    """(whether a process is there and has not ended, its parent's id; None if that cannot be known)"""
    if not os.path.isdir("/proc/self"):  # not Linux
        return True, None
    try:
        with open(f"/proc/{process}/stat") as file:
            state, parent = file.read().rpartition(")")[2].split()[:2]
    except OSError:
        return False, None
    return state not in "ZX", int(parent)


if __name__ == "__main__":
    for name in (signal.SIGINT, signal.SIGTERM):  # also sent to the whole group: it ends with its process instead
        signal.signal(name, signal.SIG_IGN)
    *numbers, script_name = sys.argv[1:5]
    watchdog = Watchdog(*map(int, numbers), script_name, sys.argv[5:])
    try:
        watchdog.run()
    except Exception as error:  # unwatched, the process could wait forever
        watchdog.lost(watchdog.rank, f"its watchdog failed ({error})")
