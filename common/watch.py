"""The companion of each process of a training with several: ends it as soon as another one is lost.

Otherwise the others would wait: at the start for 15 minutes, later on CPUs for 30 if a machine has gone silent, on GPUs
for ever (NCCL's default). The companions keep connections of their own. The first one listens; the others send a sign
of life every two seconds and get one. Whoever notices a loss tells all, each prints the same line and kills its
process. A companion is a process and not a thread, because Paddle starts in C++ code that lets no thread run.

    python -I -S watch.py RANK PROCESS LAUNCHER SCRIPT HOST:PORT ...  # of all ranks; the first one listens at its own

PROCESS is the id of the one to watch, LAUNCHER that of paddle.distributed.launch, without which the process ends, too.
Standard input says how the process ends: the line ``done``, a line with what went wrong, or nothing if it was killed.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import time

BEAT = 2.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one from a process, after which it is lost
JOIN = 45.0  # seconds that processes have to come, once the first of them is there
DONE = "done"
HINT = "; all processes end. Run the same command on every machine again: it goes on from the newest saved state"


class Peer:
    """A connection to another companion. ``rank`` is None until it has said which it is."""

    def __init__(self, connection, rank=None):
        self.connection, self.rank = connection, rank
        self.received, self.heard = b"", time.monotonic()
        connection.settimeout(BEAT)

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


class Watch:
    """Args: rank, process: of the process to watch. launcher: its parent's id. endpoints: HOST:PORT of all ranks."""

    def __init__(self, rank, process, launcher, script, endpoints):
        self.rank, self.process, self.launcher, self.script = rank, process, launcher, script
        self.hosts = [endpoint.rpartition(":")[0] for endpoint in endpoints]
        self.address = self.hosts[0], int(endpoints[0].rpartition(":")[2])
        self.peers, self.done = [], set()
        self.started = self.awake = time.monotonic()
        self.server = None

    def run(self):
        if self.rank == 0:
            try:
                self.server = socket.create_server(("", self.address[1]), backlog=len(self.hosts))
            except OSError as error:
                self.lost(0, f"cannot listen at port {self.address[1]} ({os.strerror(error.errno)})")
        else:
            self.peers = [self.connect()]
            self.peers[0].send(f"rank {self.rank}")
        beaten = 0.0
        while True:
            watched = [0, *([self.server] if self.server else []), *(peer.connection for peer in self.peers)]
            readable = set(select.select(watched, [], [], BEAT / 4)[0])
            if 0 in readable:
                self.own_end()
            if self.server in readable:
                self.peers.append(Peer(self.server.accept()[0]))
            for peer in list(self.peers):
                if peer.connection in readable:
                    self.hear(peer)
            if time.monotonic() - beaten >= BEAT:
                beaten = time.monotonic()
                for peer in self.peers:
                    peer.send("alive")
                self.look()

    def connect(self):
        """To the first companion, which may not be there yet."""
        while True:
            try:
                return Peer(socket.create_connection(self.address, timeout=BEAT), rank=0)
            except OSError as error:
                why = error
            if select.select([0], [], [], BEAT / 4)[0]:
                self.own_end()
            if time.monotonic() - self.started > JOIN:
                self.lost(0, f"does not answer at {':'.join(map(str, self.address))} within {JOIN:.0f} s ({why})")

    def own_end(self):
        """The process beside this one has ended, well or not."""
        said = os.read(0, 4096).decode("utf-8", "replace").strip()
        if said == DONE:
            # Nobody waits for it any more, so its end ends nothing. The end of the first is that of the watching.
            for peer in self.peers:
                peer.send(DONE)
            os._exit(0)
        self.lost(self.rank, said or "has ended before the others", has_spoken=bool(said), is_alive=False)

    def hear(self, peer):
        lines = peer.lines()
        if lines is None:
            self.peers.remove(peer)
            if peer.rank is not None and peer.rank not in self.done:
                self.lost(peer.rank, "has ended before the others")
            return
        for line in lines:
            word, _, rest = line.partition(" ")
            if word == "rank" and rest.isdigit() and int(rest) < len(self.hosts):
                peer.rank = int(rest)
            elif peer.rank is None:
                continue  # not one of us
            elif word == "lost":
                lost, _, why = rest.partition(" ")
                self.lost(int(lost), why)
            elif word == DONE:
                if self.rank:
                    os._exit(0)
                self.done.add(peer.rank)

    def look(self):
        """For what no message comes from."""
        now = time.monotonic()
        if now - self.awake > SILENCE / 2:  # this machine slept: the silence was its own
            for peer in self.peers:
                peer.heard = now
        self.awake = now
        for peer in self.peers:
            if peer.rank is not None and peer.rank not in self.done and now - peer.heard > SILENCE:
                self.lost(peer.rank, f"has not answered for {SILENCE:.0f} s")
        if self.server and now - self.started > JOIN:
            missing = set(range(1, len(self.hosts))) - {peer.rank for peer in self.peers} - self.done
            if missing:
                self.lost(min(missing), f"has not come within {JOIN:.0f} s")
        parent = parent_of(self.process)
        if parent not in (None, self.launcher):
            self.lost(self.rank, "has ended, because its launcher has")

    def lost(self, rank, why, has_spoken=False, is_alive=True):
        """Tells all, prints the line, and ends the process.

        Args: has_spoken, is_alive: whether the process has printed a line of its own, and still has to be ended.
        """
        for peer in self.peers:
            peer.send(f"lost {rank} {why}")
        if is_alive and select.select([0], [], [], BEAT)[0]:
            # It ends by itself meanwhile: of what is wrong in all of them, such as a loss of NaN, each has said so.
            has_spoken, is_alive = bool(os.read(0, 4096).strip()), False
        if not has_spoken:
            line = f"{self.script}: error: rank {rank} (on {self.hosts[rank]}): {why}{HINT}\n"
            with contextlib.suppress(OSError):
                os.write(2, line.encode())
        if is_alive:
            with contextlib.suppress(OSError):
                os.kill(self.process, signal.SIGKILL)
        os._exit(1)


def parent_of(process):
    """The id of a process's parent; None if it cannot be known."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return None


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process, which says how it ends
    *numbers, name = sys.argv[1:5]
    companion = Watch(*map(int, numbers), name, sys.argv[5:])
    try:
        companion.run()
    except Exception as error:  # unwatched, the process could wait for ever
        companion.lost(companion.rank, f"its companion failed ({error!r})")
